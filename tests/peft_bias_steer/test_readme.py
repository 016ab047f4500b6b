import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi


README = (Path(__file__).parents[2] / "peft_bias_steer" / "README.md").read_text()


@pytest.fixture
def demo_model_on_the_hub(hub, tiny_language_model):
    HfApi().create_repo("HuggingFaceTB/SmolLM2-135M-Instruct", exist_ok=True)
    HfApi().upload_folder(repo_id="HuggingFaceTB/SmolLM2-135M-Instruct", folder_path=tiny_language_model)


def test_snippet_runs_and_is_short(demo_model_on_the_hub):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(snippet, names)

    assert len(snippet.strip().splitlines()) <= 6
    assert names["model"].get_nb_trainable_parameters()[0] == 2 * 32
