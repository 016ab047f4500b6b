"""The snippets of README.md run as they stand, against a hub that holds a tiny model under the name they use."""

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi


README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def tiny_model_on_the_hub(tiny_language_model):
    HfApi().create_repo("HuggingFaceTB/SmolLM2-135M-Instruct", exist_ok=True)
    HfApi().upload_folder(repo_id="HuggingFaceTB/SmolLM2-135M-Instruct", folder_path=tiny_language_model)


def test_there_is_one_snippet_per_package():
    names = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel"]
    assert [
        name for snippet in SNIPPETS for name in names if f"import {name}" in snippet or f"from {name}" in snippet
    ] == names


@pytest.mark.parametrize("index", range(3))
def test_snippet_runs(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippet = SNIPPETS[index]

    assert len([line for line in snippet.splitlines() if line.strip()]) <= 6
    exec(compile(snippet, "README.md", "exec"), {})


def test_first_screen_shows_both_commands():
    first_screen = README.splitlines()[:40]

    assert any(line.startswith("make demo") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)
