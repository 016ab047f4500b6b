"""What a model cannot do for itself under stock `Trainer`: put its own numbers into the logs."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class HierarchicalSaeCallback(TrainerCallback):
    """
    Adds `explained_variance_<budget>` and `dead_fraction` to each training log of a [`HierarchicalSaeModel`].

    `Trainer` calls callbacks in order, with those of `report_to` first: a reporting callback that is to see these
    numbers has to be passed behind this one, as in `callbacks=[HierarchicalSaeCallback(), TensorBoardCallback()]`
    with `report_to="none"`. `trainer.state.log_history` and the progress bar show them in any case.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        metrics = model.pop_training_metrics()
        logs.update(metrics)
        state.log_history[-1].update(metrics)
