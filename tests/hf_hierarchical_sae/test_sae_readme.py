"""The snippet of the package's README runs as it stands."""

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi


README = (Path(__file__).parents[2] / "hf_hierarchical_sae" / "README.md").read_text()


@pytest.mark.slow
def test_snippet_runs(tiny_language_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HfApi().create_repo("HuggingFaceTB/SmolLM2-135M-Instruct", exist_ok=True)
    HfApi().upload_folder(repo_id="HuggingFaceTB/SmolLM2-135M-Instruct", folder_path=tiny_language_model)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}

    exec(compile(snippet, "README.md", "exec"), names)

    assert len([line for line in snippet.splitlines() if line.strip()]) <= 8
    assert set(names["quality"]) == {1, 2, 4, 8}
    assert (tmp_path / "sae" / "model.safetensors").exists()
