"""The numbers that the callback adds to the logs of stock `Trainer`."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_hierarchical_sae import (
    HierarchicalSaeCallback,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    explained_variance,
)


def make_trainer(tmp_path, x, lr=0.0, report_to="none", **config):
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": 6, "d_sae": 24, "k": 5, **config}))
    sae.initialize_from_activations(x)
    arguments = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=25, logging_steps=2, learning_rate=lr, report_to=report_to
    )
    data = torch.utils.data.StackDataset(hidden_states=x)
    return Trainer(model=sae, args=arguments, train_dataset=data, callbacks=[HierarchicalSaeCallback()])


def test_training_logs_hold_explained_variance_over_all_batches_since_the_last_log(tmp_path):
    x = torch.randn(50, 6) * torch.linspace(1, 9, 50).unsqueeze(1) + 40
    trainer = make_trainer(tmp_path, x)

    trainer.train()

    # With a learning rate of 0, two batches of 25 are one look at all 50 tokens.
    expected = explained_variance(trainer.model, x)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        found = {budget: log[f"explained_variance_{budget}"] for budget in (1, 2, 4, 5)}
        assert found == pytest.approx(expected, abs=1e-5)
        assert "explained_variance_3" not in log
        assert log["dead_fraction"] == 0.0


def test_prefixes_of_a_matryoshka_dictionary_are_named(tmp_path):
    x = torch.randn(50, 6)
    trainer = make_trainer(tmp_path, x, budgets=[5], matryoshka_prefixes=[8, 24])

    trainer.train()

    log = trainer.state.log_history[0]
    assert {name for name in log if name.startswith("explained")} == {"explained_variance_8", "explained_variance_24"}
    # The last prefix is the whole dictionary.
    assert log["explained_variance_24"] == pytest.approx(explained_variance(trainer.model, x, [5])[5], abs=1e-5)


@pytest.mark.parametrize("place", ["before", "behind", "report_to"])
def test_other_callbacks_see_the_numbers_wherever_they_stand(tmp_path, place, monkeypatch):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "reporter", Reporter)
    trainer = make_trainer(tmp_path, torch.randn(50, 6), report_to="reporter" if place == "report_to" else "none")
    if place == "behind":
        trainer.add_callback(Reporter)
    if place == "before":
        trainer.callback_handler.callbacks.insert(0, Reporter())
    trainer.train()
    trainer.train()

    # Two logs and a summary of each run.
    assert len(seen) == 6
    for numbers in (seen[0], seen[1], seen[3], seen[4]):
        assert {"loss", "explained_variance_5", "dead_fraction"} <= numbers


def test_evaluation_does_not_count_as_training(tmp_path):
    trainer = make_trainer(tmp_path, torch.randn(50, 6))

    trainer.evaluate(trainer.train_dataset)

    assert trainer.model.pop_training_metrics() == {}


def test_an_evaluation_between_two_logs_leaves_the_numbers_to_the_training_log(tmp_path):
    x = torch.randn(50, 6)
    plain, evaluated = make_trainer(tmp_path, x), make_trainer(tmp_path, x)
    # Behind the first of the two batches that a log is about.
    evaluated.args.eval_strategy, evaluated.args.eval_steps = "steps", 1
    evaluated.eval_dataset = evaluated.train_dataset
    evaluated.model.load_state_dict(plain.model.state_dict())

    plain.train()
    evaluated.train()

    training, others = ([log for log in evaluated.state.log_history if ("loss" in log) == wanted] for wanted in (1, 0))
    expected = [log["explained_variance_5"] for log in plain.state.log_history if "loss" in log]
    assert [log["explained_variance_5"] for log in training] == pytest.approx(expected, abs=1e-6)
    assert len(others) == 5 and not any("dead_fraction" in log for log in others if "eval_loss" in log)
