"""Ctrl-C and resuming, for the examples that train with `Trainer`."""

import argparse
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends training after the current step with a checkpoint; a second one ends it at once."""

    def __init__(self):
        self.interrupted = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.previous = signal.signal(signal.SIGINT, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self.previous)
        print("\nCtrl-C: saving a checkpoint after this step", flush=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        signal.signal(signal.SIGINT, self.previous)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a folder, which need not exist."""
    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None


def add_resume_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const=True,
        default=False,
        help="go on from the last checkpoint in --output_dir, or from the one given",
    )


def find_checkpoint(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Put the last checkpoint in `output_dir` where the option was given without one."""
    if arguments.resume_from_checkpoint is True:
        arguments.resume_from_checkpoint = last_checkpoint(arguments.output_dir)
        if arguments.resume_from_checkpoint is None:
            parser.error(
                f"--resume_from_checkpoint: {arguments.output_dir} holds no checkpoint; leave the option out to start "
                "afresh"
            )
