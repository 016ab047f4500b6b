import re
from pathlib import Path

from hf_based_kernel import RebasedForCausalLM
from hf_based_kernel.rebased_attention_chunked import QUERY_ROWS
from hf_based_kernel.rebased_features import state_size


README = (Path(__file__).parents[2] / "hf_based_kernel" / "README.md").read_text()


def test_snippet_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet, _ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert len(snippet.splitlines()) == 6
    assert names["tokens"].shape == (1, 80)
    assert RebasedForCausalLM.from_pretrained("rebased").num_parameters() == names["model"].num_parameters()


def test_a_llama_is_converted_as_shown(capsys):
    _, snippet = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out == "['full_attention', 'linear_attention', 'linear_attention', 'full_attention']\n"


def test_state_has_the_size_that_the_cost_model_states():
    assert f"{state_size(16) * (64 + 1) * 4:,} bytes per" in README.replace("\n", " ")
    assert f"{(128 + QUERY_ROWS) * (16 + 64) + 4 * state_size(16) * 64:,} flops" in README.replace("\n", " ")
