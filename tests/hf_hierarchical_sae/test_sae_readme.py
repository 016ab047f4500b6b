"""The snippets of the package's README and of the guide run as they stand, its commands at small size."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi

from hf_hierarchical_sae.cli import main


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
    model, inputs = names["model"], names["inputs"]
    clean = model(**inputs).logits
    assert torch.equal(names["unchanged"], clean)
    assert not torch.equal(names["spliced"], clean) and not torch.equal(names["ablated"], clean)
    assert names["steered"].shape[1] > inputs["input_ids"].shape[1]
    assert names["attribution"].abs().sum() > 0
    assert (names["from_saelens"].config.k, names["from_sparsify"].config.k) == (4, 8)
    assert not torch.equal(names["transcoded"], clean) and names["computed"].shape == names["given"].shape
    assert set(names["of_four"]) == {4} and names["of_four"][4] > names["untrained"][4]
    # The end of each message; its start is the first position.
    assert names["left_out"] == 20 and names["of_chats"].isfinite().all()
    torch.testing.assert_close(names["middle"] + names["added"], names["after"])
    assert (
        names["from_text"].input_scale == 1 and (tmp_path / "sae_from_text" / "checkpoint-50" / "stream_0.pt").exists()
    )


@pytest.mark.slow
def test_the_commands_lead_from_nothing_to_a_dashboard_and_a_transcoder(
    tiny_language_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    HfApi().create_repo("HuggingFaceTB/SmolLM2-135M-Instruct", exist_ok=True)
    HfApi().upload_folder(repo_id="HuggingFaceTB/SmolLM2-135M-Instruct", folder_path=tiny_language_model)
    HfApi().create_repo("roneneldan/TinyStories", repo_type="dataset", exist_ok=True)
    for split in ("train", "validation"):
        rows = [
            json.dumps({"text": f"Once upon a time there were {number} cats in {split}."}) for number in range(200)
        ]
        HfApi().upload_file(
            repo_id="roneneldan/TinyStories",
            repo_type="dataset",
            path_or_fileobj="\n".join(rows).encode(),
            path_in_repo=f"{split}.jsonl",
        )
    chats = [json.dumps({"messages": [{"role": "user", "content": f"How many cats? {n}"}]}) for n in range(200)]
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("all", "everyday")]
    HfApi().create_repo("HuggingFaceTB/smoltalk", repo_type="dataset", exist_ok=True)
    files = {"all.jsonl": "\n".join(chats), "everyday.jsonl": chats[0]}
    files["README.md"] = f"---\nconfigs: {json.dumps(configs)}\n---\n"
    for name, content in files.items():
        HfApi().upload_file(
            repo_id="HuggingFaceTB/smoltalk",
            repo_type="dataset",
            path_or_fileobj=content.encode(),
            path_in_repo=name,
        )
    install, *commands = [
        line for block in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL) for line in block.splitlines()
    ]
    small = {"harvest": "--tokens 3000", "train": "--d_sae 64 --k 32 --steps 30 --batch_size 64", "circuits": ""}

    for command in commands:
        # As a shell does with the two layers that the model here has.
        loop = re.fullmatch(r"for layer in \{0\.\.29\}; do (.*); done", command)
        for line in [loop[1].replace("$layer", layer) for layer in "01"] if loop else [command]:
            line = line.replace("--layer 15", "--layer 1").replace("{0..29}", "0 1")
            program, part, *arguments = shlex.split(line.replace("transcoders/*", "transcoders/0 transcoders/1"))
            assert program == "hierarchical-sae"
            main([part, *arguments, *shlex.split(small.get(part, "--tokens 1000"))])

    assert install.startswith("pip install") and len(commands) == 14
    assert json.loads((tmp_path / "chats" / "harvest.json").read_text())["skip_special_tokens"]
    for k in (8, 32):
        settings = yaml.safe_load((tmp_path / f"circuits_k{k}" / "config.yaml").read_text())
        assert settings["k"] == k and (tmp_path / f"circuits_k{k}" / "layer_1.safetensors").exists()
    assert (tmp_path / "sae.html").stat().st_size > 10_000 and (tmp_path / "quality.png").exists()
    assert capsys.readouterr().out.count("recovered") == 2
    assert json.loads((tmp_path / "transcoder" / "config.json").read_text())["target_hook_point"] == "mlp.output"
