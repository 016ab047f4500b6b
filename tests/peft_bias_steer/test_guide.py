import re
from pathlib import Path

import torch
from huggingface_hub import HfApi


GUIDE = (Path(__file__).parents[2] / "docs" / "guide_bias_steer.md").read_text()


def test_every_block_of_the_guide_runs_and_does_what_the_text_says(hub, tiny_language_model, tmp_path, monkeypatch):
    HfApi().create_repo("HuggingFaceTB/SmolLM2-135M-Instruct", exist_ok=True)
    HfApi().upload_folder(repo_id="HuggingFaceTB/SmolLM2-135M-Instruct", folder_path=tiny_language_model)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL):
        exec(block, names)

    steered, unsteered, rows = names["steered"], names["unsteered"], names["rows"]
    assert not torch.equal(steered, unsteered)
    assert 0 < (names["halfway"] - unsteered).abs().max() < (steered - unsteered).abs().max()
    torch.testing.assert_close(rows[0], unsteered[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rows[1], steered[0], rtol=1e-4, atol=1e-6)
    assert names["happy"].base_model.steering_layers.keys() == {"model.layers.0", "model.layers.1"}
    assert names["difference"] < 1e-4 < names["rounded"] < 0.0625
    inputs = names["inputs"]
    assert torch.equal(names["large"](**inputs).logits, steered)
    torch.testing.assert_close(names["reloaded"](**inputs).logits, steered, rtol=1e-4, atol=1e-6)
