"""Bars that move while one step, or one batch of answers, is computed: a forward pass is short, a step of GRPO is not."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


SECONDS_BETWEEN = 1.0


def base_of(model: Any) -> Any:
    """What training and `generate` both call, also where an adapter is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def shown(model: Any) -> Generator[None]:
    """Inside, a bar counts the forward passes of a model, one for each token of its answers."""
    with tqdm(desc="answers", unit="token", leave=False, disable=not PartialState().is_main_process) as bar:
        handle = base_of(model).register_forward_hook(lambda *given: bar.update() and None)
        try:
            yield
        finally:
            handle.remove()


class PassesShown(TrainerCallback):
    """The bar of training counts the forward passes as well, of sampling and of learning."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.passes, self.drawn = trainer, count(1), 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.handle = base_of(self.trainer.accelerator.unwrap_model(self.trainer.model)).register_forward_hook(
            self.show
        )

    def show(self, *given: Any) -> None:
        number, now = next(self.passes), time.monotonic()
        # A log has a line for each time that a bar is drawn.
        if now - self.drawn < SECONDS_BETWEEN:
            return
        self.drawn = now
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(f"{number} passes of the model")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.handle.remove()
