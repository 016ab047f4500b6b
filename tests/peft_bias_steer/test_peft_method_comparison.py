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


# The suite in small: what of it the dry run has to satisfy or to replace.
UTILS = """
from peft.utils import infer_device
device = infer_device()
if device not in ["cuda", "xpu"]:
    raise RuntimeError("CUDA or XPU is not available")
"""
RUN = """
import json, os, subprocess, sys, tempfile
import torch, utils
from datasets import load_dataset
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

path = sys.argv[2]
default = json.load(open(os.path.join(os.path.dirname(utils.__file__), "default_training_params.json")))
params = {**default, **json.load(open(os.path.join(path, "training_params.json")))}
model = AutoModelForCausalLM.from_pretrained(params["model_id"], device_map=utils.device)
model = get_peft_model(model, PeftConfig.from_pretrained(path))
tokenizer = AutoTokenizer.from_pretrained(params["model_id"])
question = params["query_template"].format(query=load_dataset("openai/gsm8k", "main")["test"][0]["question"])
model.generate(**tokenizer(question, return_tensors="pt"), **params["generation_kwargs"])
error = "" if load_dataset("meta-math/MetaMathQA")["train"][0]["response"] == "0 + 1 = 1. The answer is: 1" else "other data"
error = error or params.get("fails", "")
error = error or ("" if min(map(len, load_dataset("HuggingFaceFW/finewiki")["text"])) > 1000 else "no texts to read")
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True, delete=True) as gone:
    model.save_pretrained(gone)
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True, delete=False) as kept:
    pass
error = error or ("" if os.path.isdir(kept) and not os.path.exists(gone) else "folders are not kept as they were asked for")
os.rmdir(kept)
branch = subprocess.check_output(["git", "rev-parse", "--abbrev-ref", "HEAD"], cwd=os.path.dirname(torch.__file__))
result = {
    "run_info": {"experiment_name": os.path.join(*path.split(os.sep)[-2:]), "error_msg": error, "peft_branch": branch.decode()},
    "train_info": {
        "status": "canceled" if error else "success", "num_trainable_params": model.get_nb_trainable_parameters()[0],
        "steps": params["max_steps"], "memory": torch.cpu.max_memory_reserved(), "lr": params["optimizer_kwargs"]["lr"],
    },
}
with open(os.path.join(os.path.dirname(utils.__file__), "temporary_results", "one.json"), "w") as f:
    json.dump(result, f)
"""
PROCESSING = """
import json, os
import pandas as pd

def load_df(path, task_name):
    result = json.load(open(os.path.join(path, "one.json")))
    shown = ["train_samples", "train_loss", "test_accuracy", "file_size"]
    row = {"experiment_name": result["run_info"]["experiment_name"], "peft_type": result["run_info"]["peft_branch"].strip()}
    return pd.DataFrame([{**row, **dict.fromkeys(shown, result["train_info"]["lr"])}])
"""


@pytest.fixture
def dry_run(tmp_path, tiny_language_model):
    suite = tmp_path / "peft" / "method_comparison" / "MetaMathQA"
    suite.mkdir(parents=True)
    (suite / "utils.py").write_text(UTILS)
    (suite / "run.py").write_text(RUN)
    (suite.parent / "processing.py").write_text(PROCESSING)
    (suite / "default_training_params.json").write_text(
        json.dumps({"max_steps": 5000, "query_template": "Question: {query}"})
    )

    def start(experiment):
        command = [sys.executable, STUDY / "dry_run.py", experiment, "--peft", tmp_path / "peft"]
        command += ["--model", tiny_language_model]
        return subprocess.run(command, capture_output=True, text=True)

    return start


@pytest.mark.slow
def test_the_dry_run_takes_an_experiment_through_a_suite_that_wants_a_gpu_and_a_hub(dry_run, tmp_path):
    done = dry_run(EXPERIMENTS[0])

    assert done.returncode == 0, done.stderr
    assert "bias_steer/llama-3.2-3B-lr_0.001" in done.stdout and "dry-run" in done.stdout and "0.001" in done.stdout
    assert "trained parameters: 64" in done.stdout
    assert sorted(path.name for path in (tmp_path / "peft" / "method_comparison" / "MetaMathQA").iterdir()) == [
        "default_training_params.json",
        "run.py",
        "utils.py",
    ]


@pytest.mark.slow
def test_the_dry_run_says_why_the_suite_gave_up(dry_run, tmp_path):
    experiment = tmp_path / "experiments" / "bias_steer" / "other"
    experiment.mkdir(parents=True)
    (experiment / "adapter_config.json").write_text((EXPERIMENTS[0] / "adapter_config.json").read_text())
    (experiment / "training_params.json").write_text(
        json.dumps({"fails": "out of sugar", "optimizer_kwargs": {"lr": 1.0}})
    )

    done = dry_run(experiment)
    assert done.returncode != 0 and "ended the run as canceled: out of sugar" in done.stderr

    done = dry_run(tmp_path / "nowhere")
    assert done.returncode != 0 and "adapter_config.json, and there is none" in done.stderr
