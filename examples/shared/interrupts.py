"""Ctrl-C, kills and resuming, for the examples that train with `Trainer`."""

import argparse
import json
import os
import shutil
import signal
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


SETTINGS_NAME = "settings.json"
# Options that may be others when a training goes on: where, how long, how it is watched, by what it samples.
CHANGEABLE = {"output_dir", "resume_from_checkpoint", "save_steps", "max_steps", "report_to", "use_vllm"}
CHANGEABLE |= {
    "eval_examples",
    "eval_samples",
    "eval_steps",
    "skip_eval_before",
    "signal_patience",
    "stop_without_signal",
}


class StopOnInterrupt(TrainerCallback):
    """
    The first Ctrl-C ends training after the current step with a checkpoint; a second one ends it at once. Options that are
    given are kept in every checkpoint, so that `find_checkpoint` knows whose it is.
    """

    def __init__(self, options: argparse.Namespace | None = None):
        self.options, self.interrupted = options, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.previous = signal.signal(signal.SIGINT, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self.previous)
        # What was interrupted may itself be a print, which cannot be entered twice.
        os.write(2, b"\nCtrl-C: saving a checkpoint after this step\n")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1:
            # One process may have heard of it a step before the others, which would wait for it in vain.
            heard = torch.tensor(int(self.interrupted), device=args.device)
            torch.distributed.all_reduce(heard, op=torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(heard)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.options and state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            with whole(checkpoint / SETTINGS_NAME) as unfinished:
                unfinished.write_text(json.dumps(as_json(vars(self.options)), indent=1) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGINT, self.previous)


def last_checkpoint(folder: str | Path) -> str | None:
    """
    The newest checkpoint in a folder, which need not exist, that was written to its end. Of an earlier training there, one of
    more steps may lie beside it.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    written = {
        ((path / TRAINER_STATE_NAME).stat().st_mtime_ns, steps_made(path)): path for path in found if is_whole(path)
    }
    return str(written[max(written)]) if written else None


def steps_made(checkpoint: str | Path) -> int:
    return json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text())["global_step"]


def train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """`Trainer.train`, which by itself makes one step more where the checkpoint has made them all."""
    if checkpoint:
        steps, plan = steps_made(checkpoint), trainer.set_initial_training_values

        def none_after_the_last(*args: Any, **kwargs: Any) -> tuple:
            num_train_epochs, *others, max_steps = plan(*args, **kwargs)
            return (0 if steps >= max_steps else num_train_epochs, *others, max_steps)

        trainer.set_initial_training_values = none_after_the_last
    trainer.train(resume_from_checkpoint=checkpoint)


def is_whole(checkpoint: Path) -> bool:
    """Whether the file that `Trainer` writes last is there, the optimizer is, and no file is cut short."""
    try:
        for file in checkpoint.glob("*.json"):
            json.loads(file.read_text())
        steps_made(checkpoint)
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
    except (OSError, ValueError, LookupError, TypeError, SafetensorError):
        return False
    # DeepSpeed keeps the optimizer in a folder.
    has_optimizer = any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*"))
    return has_optimizer and all(
        zipfile.is_zipfile(path) for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth")
    )


@contextmanager
def whole(path: Path) -> Generator[Path]:
    """
    Inside, a name beside `path` for a file or a new folder, which takes its own name at the end: what is there was written
    to its end. What a killed run left is written over. Only one process may write.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    yield unfinished
    unfinished.replace(path)


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=str))


def differing(found: dict[str, Any], settings: dict[str, Any], names: set[str]) -> str:
    """The names whose values differ, with both."""
    others = sorted(name for name in names if found.get(name) != settings.get(name))
    return ", ".join(f"{name} {found.get(name)!r} and not {settings.get(name)!r}" for name in others)


def record_settings(folder: Path, settings: dict[str, Any]) -> None:
    """
    Make a folder and record what its results are made with; end the program where it holds some that were made otherwise.
    A run that was refused its options has left nothing but the record, which gives way.
    """
    record, settings = folder / SETTINGS_NAME, as_json(settings)
    if record.exists() and (found := json.loads(record.read_text())) != settings:
        begun = (path for path in folder.rglob("*") if path.is_file() and path != record)
        if any(path.suffix != ".unfinished" for path in begun):
            others = differing(found, settings, {*found, *settings})
            raise SystemExit(f"{folder} holds results with {others}: give another --output_dir, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    if PartialState().is_main_process:
        with whole(record) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=1) + "\n")


def add_resume_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        default=False,
        help="go on from the last whole checkpoint in --output_dir, or from the one given",
    )


def find_checkpoint(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """
    Put the last checkpoint in `output_dir` where the option was given without one; refuse one that is not whole or of a
    training with other options, and a file.
    """
    if Path(arguments.output_dir).is_file():
        parser.error(f"--output_dir: expected a folder to write, got the file {arguments.output_dir}")
    if arguments.resume_from_checkpoint is True:
        arguments.resume_from_checkpoint = last_checkpoint(arguments.output_dir)
        if arguments.resume_from_checkpoint is None:
            parser.error(
                f"--resume_from_checkpoint: {arguments.output_dir} holds no checkpoint that was written to its end; leave "
                "the option out to start afresh"
            )
    elif arguments.resume_from_checkpoint and not is_whole(Path(arguments.resume_from_checkpoint)):
        parser.error(
            "--resume_from_checkpoint: expected a checkpoint that was written to its end, got "
            f"{arguments.resume_from_checkpoint}"
        )
    if arguments.resume_from_checkpoint:
        refuse_another_training(parser, arguments)


def refuse_another_training(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    checkpoint, settings = Path(arguments.resume_from_checkpoint), as_json(vars(arguments))
    record = checkpoint / SETTINGS_NAME
    found = json.loads(record.read_text()) if record.exists() else {}
    if others := differing(found, settings, (found.keys() & settings.keys()) - CHANGEABLE):
        parser.error(
            f"--resume_from_checkpoint: {checkpoint} was trained with {others}; give its options to go on from it, or leave "
            "this one out to start afresh"
        )
    if arguments.max_steps < (made := steps_made(checkpoint)):
        parser.error(
            f"--max_steps must be at least the {made} steps that {checkpoint} has made, got {arguments.max_steps}"
        )
