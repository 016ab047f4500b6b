"""The experiments for PEFT's own comparison of methods, as far as its suite can be followed without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bias_steer import BiasSteerConfig


STUDY = Path(__file__).parents[2] / "examples" / "studies" / "peft_method_comparison"
EXPERIMENTS = sorted(STUDY.glob("experiments/*/*"))
# of method_comparison/MetaMathQA/default_training_params.json
TRAINING_PARAMS = {"optimizer_kwargs"}


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_is_what_the_suite_reads(experiment):
    config = PeftConfig.from_pretrained(str(experiment))
    assert isinstance(config, BiasSteerConfig)
    # the sizes of Llama-3.2-3B; heads and MLP are small, since only layers and width count
    sizes = {"hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8, "vocab_size": 8}
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config, autocast_adapter_dtype=True)
    params = json.loads((experiment / "training_params.json").read_text())

    assert model.get_nb_trainable_parameters()[0] == 86_016
    assert params.keys() == TRAINING_PARAMS and experiment.name.endswith(f"lr_{params['optimizer_kwargs']['lr']}")


def test_there_are_experiments():
    assert len(EXPERIMENTS) == 2


@pytest.mark.slow
def test_the_command_starts_a_script_beside_its_modules_in_this_folder(tmp_path):
    # as run.py of the suite: siblings are imported by their bare names, the path is relative to the working directory
    (tmp_path / "utils.py").write_text("from peft import PeftConfig as Config")
    (tmp_path / "run.py").write_text(
        "import sys, utils; print(utils.Config.from_pretrained(sys.argv[2]).peft_type.value)"
    )
    experiment = str(EXPERIMENTS[0].relative_to(STUDY))
    command = [Path(sys.executable).with_name("bias-steer"), "run", tmp_path / "run.py", "-v", experiment]
    done = subprocess.run(command, cwd=STUDY, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "BIAS_STEER"
