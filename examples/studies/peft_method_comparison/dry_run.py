# /// script
# dependencies = ["peft_bias_steer", "bitsandbytes", "datasets", "pandas"]
# ///
"""Take an experiment through PEFT's own MetaMathQA suite on a CPU, offline, in a minute, before a GPU spends hours on it.

    python examples/studies/peft_method_comparison/dry_run.py experiments/bias_steer/llama-3.2-3B-lr_0.001 --peft CHECKOUT

The suite's files are those of the checkout. What is small here is what they are given: a model of --model's size, made-up
questions in the place of MetaMathQA and GSM8K, three steps. Everything is written to a temporary folder; the result is read by
the `processing.py` of the same checkout and printed.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import peft
import torch

from peft_bias_steer import cli


sys.path.append(str(Path(__file__).parents[2] / "shared"))
from packed_text import DEMO_MODEL


STUDY = Path(__file__).parent
# What the dry run puts in the place of the suite's own parameters, beside those that the experiment names.
SMALL = {"max_steps": 3, "eval_steps": 3, "batch_size_eval": 16, "max_seq_length": 96, "use_gc": False}
GENERATION = {"cache_implementation": "static", "max_new_tokens": 8}
QUESTIONS = 64
PROSE = [topics[name] for name in ("assert", "class", "for", "function", "import", "try", "while", "yield")]
SHOWN = ["experiment_name", "peft_type", "train_samples", "train_loss", "test_accuracy", "file_size"]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="folder with adapter_config.json, in the form of the suite")
    parser.add_argument("--peft", type=Path, required=True, help="a checkout of PEFT")
    parser.add_argument(
        "--model", type=Path, default=DEMO_MODEL, help="folder of a small language model (%(default)s)"
    )
    arguments = parser.parse_args()
    suite = arguments.peft / "method_comparison" / "MetaMathQA"
    arguments.experiment = next(
        (path for path in (arguments.experiment, STUDY / arguments.experiment) if path.is_dir()), arguments.experiment
    )
    for path in (suite / "run.py", arguments.experiment / "adapter_config.json", arguments.model / "config.json"):
        if not path.is_file():
            parser.error(f"expected a file {path}, and there is none")
    return arguments, suite


def make_questions():
    """What the suite loads, by the name under which it asks for it."""
    sums = [(f"What is {i} plus {i + 1}?", f"{i} + {i + 1} = {2 * i + 1}.") for i in range(QUESTIONS)]
    texts = [question for question, _ in sums]
    metamath = {
        "type": ["GSM_AnsAug"] * len(sums),
        "query": texts,
        "original_question": texts,
        "response": [f"{answer} The answer is: {answer[:-1].split()[-1]}" for _, answer in sums],
    }
    gsm8k = {"question": texts, "answer": [f"{answer}\n#### {answer[:-1].split()[-1]}" for _, answer in sums]}
    return {
        "meta-math/MetaMathQA": datasets.DatasetDict({"train": datasets.Dataset.from_dict(metamath)}),
        "openai/gsm8k": datasets.DatasetDict(dict.fromkeys(("train", "test"), datasets.Dataset.from_dict(gsm8k))),
        # the suite wants a loss between 1 and 2 on these before it trains; what is read twice costs half
        "HuggingFaceFW/finewiki": datasets.Dataset.from_dict({"text": [2 * text[:1500] for text in PROSE]}),
    }


class TemporaryDirectory(tempfile.TemporaryDirectory):
    """With the argument that Python has from 3.12 on; without it the suite saves no checkpoint and gives no file size."""

    def __init__(self, *args, delete=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.delete = delete
        if not delete:
            vars(self)["_finalizer"].detach()

    def __exit__(self, exc, value, tb):
        if self.delete:
            super().__exit__(exc, value, tb)


def stand_in(known, folder):
    """What this machine lacks and the suite asks for: a GPU's name and memory, and the hub's data sets."""

    def load_dataset(name, *args, **kwargs):
        if name not in known:
            raise SystemExit(f"the suite of this checkout loads {name!r}; the dry run knows {', '.join(known)}")
        return known[name]

    memory = ("memory_allocated", "memory_reserved", "max_memory_reserved", "reset_peak_memory_stats", "empty_cache")
    replacements: Any = {
        datasets: {"load_dataset": load_dataset},
        torch.cpu: {
            **dict.fromkeys(memory, lambda: 0),
            "manual_seed_all": torch.manual_seed,
            "get_device_name": lambda index: platform.processor() or platform.machine(),
        },
        # It refuses any other device once, when it is imported.
        peft.utils: {"infer_device": lambda: "cuda"},
    }
    if sys.version_info < (3, 12):
        replacements[tempfile] = {"TemporaryDirectory": TemporaryDirectory}
    for module, names in replacements.items():
        vars(module).update(names)
    sys.path.insert(0, str(folder))
    vars(importlib.import_module("utils")).update(infer_device=lambda: "cpu", device="cpu")
    vars(peft.utils).update(infer_device=lambda: "cpu")


def prepare(arguments, suite, folder):
    """The suite's files and the experiment in a folder of their own, in which they can write."""
    for path in (*suite.glob("*.py"), *suite.glob("*.json"), suite.parent / "processing.py"):
        shutil.copy(path, folder)
    for name in ("results", "temporary_results", "cancelled_results"):
        (folder / name).mkdir()
    experiment = folder / "experiments" / arguments.experiment.parent.name / arguments.experiment.name
    shutil.copytree(arguments.experiment, experiment)
    own = experiment / "training_params.json"
    params = json.loads(own.read_text()) if own.exists() else {}
    known = json.loads((suite / "default_training_params.json").read_text())
    params |= {name: value for name, value in SMALL.items() if name in known}
    params |= {"model_id": str(arguments.model.resolve()), "generation_kwargs": GENERATION}
    own.write_text(json.dumps(params))
    # The suite asks git for a branch, and counts what is not on `main` as a trial.
    os.environ["GIT_DIR"] = str(folder / ".git")
    author = ("-c", "user.name=dry-run", "-c", "user.email=dry-run@localhost")
    for command in (("init", "-q", "-b", "dry-run"), (*author, "commit", "-q", "--allow-empty", "-m", "dry run")):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return experiment.relative_to(folder)


def main():
    arguments, suite = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        experiment = prepare(arguments, suite, folder)
        stand_in(make_questions(), folder)
        os.chdir(folder)
        cli.main(["run", str(folder / "run.py"), "-v", str(experiment)])
        results = [*folder.glob("*_results/*.json")]
        if len(results) != 1:
            raise SystemExit(f"expected one result of the suite, got {len(results)}")
        result = json.loads(results[0].read_text())
        if result["train_info"]["status"] != "success":
            raise SystemExit(
                f"the suite ended the run as {result['train_info']['status']}: {result['run_info']['error_msg']}"
            )
        table = importlib.import_module("processing").load_df(results[0].parent, "MetaMathQA")
        print(f"\n{table[SHOWN].to_string(index=False)}")
        print(f"trained parameters: {result['train_info']['num_trainable_params']:,}")


if __name__ == "__main__":
    main()
