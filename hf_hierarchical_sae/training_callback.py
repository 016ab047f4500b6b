"""What a model cannot do for itself under stock `Trainer`: put its own numbers into the logs."""

import inspect
from types import FrameType
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class HierarchicalSaeCallback(TrainerCallback):
    """
    Adds `explained_variance_<budget>` and `dead_fraction` to each training log of a [`HierarchicalSaeModel`]. What
    `report_to` names gets them, as do `trainer.state.log_history` and the progress bar.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # `Trainer` puts the callbacks of `report_to` before those that it is given, and they would see logs without
        # these numbers. The list is held by the caller alone.
        caller = cast(FrameType, cast(FrameType, inspect.currentframe()).f_back).f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            caller.callbacks = [self, *(callback for callback in caller.callbacks if callback is not self)]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        # Logs of an evaluation have others, and what was summed up so far belongs to the next training log.
        if "loss" not in logs and "train_loss" not in logs:
            return
        metrics = model.pop_training_metrics()
        logs.update(metrics)
        state.log_history[-1].update(metrics)
