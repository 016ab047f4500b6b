"""The snippets of the package's README and of the guide run as they stand."""

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi


README = (Path(__file__).parents[2] / "hf_hierarchical_sae" / "README.md").read_text()
GUIDE = (Path(__file__).parents[2] / "docs" / "guide_sae.md").read_text()


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


@pytest.mark.slow
def test_the_guide_runs_from_top_to_bottom(tiny_language_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HfApi().create_repo("HuggingFaceTB/SmolLM2-135M-Instruct", exist_ok=True)
    HfApi().upload_folder(repo_id="HuggingFaceTB/SmolLM2-135M-Instruct", folder_path=tiny_language_model)
    (tmp_path / "book.txt").write_text("To be, or not to be, that is the question.\n" * 300)
    names = {}

    for snippet in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL):
        exec(compile(snippet, "guide_sae.md", "exec"), names)

    assert names["evaluation"][names["sae"].config.k] > names["untrained"][names["sae"].config.k]
