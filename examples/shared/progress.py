"""Bars that move while one step, or one batch of answers, is computed: a forward pass is short, a step of GRPO is not."""

from collections.abc import Generator
from contextlib import contextmanager
from itertools import count
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def base_of(model: Any) -> Any:
    """What training and `generate` both call, also where an adapter is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def shown(model: Any, desc: str = "answers", unit: str = "token") -> Generator[None]:
    """Inside, a bar counts the forward passes of a model."""
    with tqdm(desc=desc, unit=unit, leave=False, disable=not PartialState().is_main_process) as bar:
        handle = base_of(model).register_forward_hook(lambda *given: bar.update() and None)
        try:
            yield
        finally:
            handle.remove()


class PassesShown(TrainerCallback):
    """The bar of training counts the forward passes as well, of sampling and of learning."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.passes = trainer, count(1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.handle = base_of(self.trainer.accelerator.unwrap_model(self.trainer.model)).register_forward_hook(
            self.show
        )

    def show(self, *given: Any) -> None:
        number = next(self.passes)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(f"{number} passes of the model")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.handle.remove()
