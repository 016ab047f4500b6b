"""Training that goes on after a stop or a kill, that no other training is taken for, and what is left at its end."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from hf_hierarchical_sae import (
    ActivationDataset,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    iterate_activations,
    record_statistics,
)
from hf_hierarchical_sae.training import last_checkpoint, starting_point, train_sae, training_arguments


REPOSITORY = Path(__file__).parents[2]


def activations(seed=0, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 3


def train(folder, x=None, *, steps=8, resume=False, overwrite=False, callbacks=(), settings=None, **config):
    x = activations() if x is None else x
    torch.manual_seed(0)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": 8, "d_sae": 32, "k": 4, **config}))
    sae.initialize_from_activations(x)
    options = {
        "batch_size": 50,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "save_total_limit": None,
        "disable_tqdm": True,
    }
    arguments = training_arguments(folder, max_steps=steps, **{**options, **(settings or {})})
    data = torch.utils.data.StackDataset(hidden_states=x)
    return train_sae(sae, data, x, arguments, resume=resume, overwrite=overwrite, callbacks=callbacks)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """Of a finished folder with a checkpoint every second step."""
    subprocess.run(["cp", "-r", finished, tmp_path / "run"], check=True)
    return tmp_path / "run"


def test_training_ends_in_an_autoencoder_that_is_ready_for_use(finished):
    sae = HierarchicalSaeModel.from_pretrained(finished)
    expected, x = HierarchicalSaeModel.from_pretrained(finished), activations()
    record_statistics(expected, x)

    assert sae.input_scale == 1 and sae.median_norm == expected.median_norm > 0
    torch.testing.assert_close(sae.mean_activation, expected.mean_activation)


@pytest.mark.parametrize(
    "damage",
    [
        lambda checkpoint: (checkpoint / "trainer_state.json").unlink(),
        lambda checkpoint: cut(checkpoint / "trainer_state.json"),
        lambda checkpoint: cut(checkpoint / "model.safetensors"),
        lambda checkpoint: cut(checkpoint / "optimizer.pt"),
        lambda checkpoint: cut(checkpoint / "rng_state.pth"),
        lambda checkpoint: (checkpoint / "optimizer.pt").unlink(),
        lambda checkpoint: (checkpoint / "scheduler.pt").unlink(),
        lambda checkpoint: (checkpoint / "model.safetensors").unlink(),
        lambda checkpoint: cut(checkpoint / "config.json"),
        lambda checkpoint: (checkpoint / "trainer_state.json").write_text("{}"),
        lambda checkpoint: (checkpoint / "trainer_state.json").write_text("null"),
    ],
    ids=[
        "no_state",
        "state",
        "weights",
        "optimizer",
        "random_state",
        "no_optimizer",
        "no_scheduler",
        "no_weights",
        "config",
        "no_step",
        "null",
    ],
)
def test_training_goes_on_from_the_newest_whole_checkpoint(copy, finished, damage):
    damage(copy / "checkpoint-8")

    assert last_checkpoint(copy) == str(copy / "checkpoint-6")
    train(copy, resume=True)

    expected = load_file(finished / "model.safetensors")
    assert all(tensor.equal(expected[name]) for name, tensor in load_file(copy / "model.safetensors").items())
    assert last_checkpoint(copy) == str(copy / "checkpoint-8")


KILLED = """
import os, signal, torch
from tests.hf_hierarchical_sae.test_training import train

save = torch.save
def die(content, path, *args, **kwargs):
    if str(path).endswith("checkpoint-4/{file}"):
        save(content, path, *args, **kwargs)
        open(path, "rb+").truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, path, *args, **kwargs)
torch.save = die
train({folder!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt"])
def test_a_kill_while_a_checkpoint_is_written_costs_that_checkpoint_only(tmp_path, finished, file):
    folder = str(tmp_path / "run")
    code = KILLED.format(file=file, folder=folder)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == -signal.SIGKILL and os.path.exists(f"{folder}/checkpoint-4")

    with pytest.raises(
        ValueError,
        match="holds an unfinished training: give resume .--resume. to go on, overwrite .--overwrite. to start",
    ):
        train(folder)
    assert last_checkpoint(folder) == f"{folder}/checkpoint-2"
    shutil.rmtree(f"{folder}/checkpoint-2")
    for options, advice in (
        ({}, "give overwrite .--overwrite. to start"),
        ({"resume": True}, "has none: give overwrite .--overwrite. to start"),
    ):
        with pytest.raises(ValueError, match=advice):
            train(folder, **options)
    shutil.copytree(finished / "checkpoint-2", f"{folder}/checkpoint-2")
    train(folder, resume=True)

    expected = load_file(finished / "model.safetensors")
    assert all(tensor.equal(expected[name]) for name, tensor in load_file(f"{folder}/model.safetensors").items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 3}, "holds a training with k=4, got k=3: give what it was started with to go on"),
        ({"d_sae": 64}, "holds a training with d_sae=32, got d_sae=64"),
        ({"budgets": [1, 4]}, r"holds a training with budgets=None, got budgets=\[1, 4\]"),
        ({"layer": 2}, "holds a training with layer=None, got layer=2"),
        ({"settings": {"learning_rate": 1e-3}}, "holds a training with learning_rate=0.01, got learning_rate=0.001"),
        ({"settings": {"batch_size": 25}}, "per_device_train_batch_size=50, got per_device_train_batch_size=25"),
        ({"settings": {"seed": 1}}, "holds a training with seed=42, got seed=1"),
        ({"settings": {"data_seed": 7}}, "holds a training with data_seed=None, got data_seed=7"),
        ({"settings": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps=1, got .*_steps=2"),
        ({"settings": {"lr_scheduler_type": "cosine"}}, "lr_scheduler_type='linear', got lr_scheduler_type='cosine'"),
        ({"settings": {"optim": "sgd"}}, "holds a training with optim='adamw_torch.*', got optim='sgd'"),
        ({"settings": {"weight_decay": 0.5}}, "holds a training with weight_decay=0.0, got weight_decay=0.5"),
        ({"settings": {"max_grad_norm": 0.1}}, "holds a training with max_grad_norm=1.0, got max_grad_norm=0.1"),
        ({"x": activations(tokens=190)}, "holds a training with tokens=200, got tokens=190"),
        ({"x": activations(seed=1)}, "holds a training on other activations"),
        # all tokens of the same lengths, as behind a norm without weights
        ({"x": activations().flip(1)}, "holds a training on other activations"),
        ({"steps": 4}, "checkpoint-8 has made 8 steps already, got 4 in all"),
    ],
)
def test_another_training_is_not_gone_on_with(copy, finished, change, message):
    with pytest.raises(ValueError, match=message):
        train(copy, resume=True, **change)

    assert (copy / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


class StopAtThree(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def test_epochs_end_a_training_as_steps_do(finished, tmp_path):
    epochs = {"steps": -1, "settings": {"num_train_epochs": 2, "logging_steps": 1}}
    train(tmp_path, callbacks=[StopAtThree()], **epochs)
    assert not (tmp_path / "model.safetensors").exists()
    train(tmp_path, resume=True, **epochs)

    expected = load_file(finished / "model.safetensors")
    assert all(tensor.equal(expected[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items())


@pytest.mark.parametrize("steps", [7, 8], ids=["within an epoch", "at its end"])
def test_a_training_that_was_killed_before_its_result_makes_no_step_more(tmp_path, steps):
    options = {
        "steps": steps,
        "settings": {"lr_scheduler_type": "constant"},
        "selection": "batch_topk",
        "budgets": [4],
    }
    train(tmp_path, **options)
    expected = (tmp_path / "model.safetensors").read_bytes()
    # Whether the result is there or not.
    for _ in range(2):
        assert train(tmp_path, resume=True, **options).state.global_step == steps
        assert (tmp_path / "model.safetensors").read_bytes() == expected
        (tmp_path / "model.safetensors").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{steps}")


def test_a_finished_training_may_get_more_steps(copy):
    assert train(copy, steps=10, resume=True).state.global_step == 10


def test_the_same_activations_from_another_machine_are_gone_on_with(copy):
    assert train(copy, activations() + 1e-4, resume=True).state.global_step == 8


def test_a_training_is_replaced_only_if_told_and_then_whole(copy):
    with pytest.raises(
        ValueError,
        match="holds a finished autoencoder: give resume .--resume. to go on, overwrite .--overwrite. to start",
    ):
        train(copy, d_sae=64)

    with pytest.raises(KeyboardInterrupt):
        train(copy, d_sae=64, overwrite=True, callbacks=[Stop(3)])

    # What the old training left would be newer than this one's checkpoint.
    assert last_checkpoint(copy) == str(copy / "checkpoint-2") and not (copy / "model.safetensors").exists()
    train(copy, d_sae=64, resume=True)
    assert HierarchicalSaeModel.from_pretrained(copy).config.d_sae == 64


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_callback_that_stops_training_leaves_it_unfinished(tmp_path):
    class Early(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = train(tmp_path, callbacks=[Early()])

    assert trainer.state.global_step == 1 and not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    "resume, message",
    [
        (True, "resume goes on from a whole checkpoint in .*, which has none"),
        ("nothing", "got nothing, which is none"),
    ],
)
def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path, resume, message):
    (tmp_path / "checkpoint-3").mkdir()

    with pytest.raises(ValueError, match=message):
        starting_point(tmp_path, resume=resume)


@pytest.mark.parametrize("record", [None, "{", "[]", "{}"])
def test_a_checkpoint_of_something_else_is_not_gone_on_with(copy, record):
    (copy / "training.json").unlink()
    if record is not None:
        (copy / "training.json").write_text(record)

    with pytest.raises(ValueError, match=r"training.json"):
        train(copy, resume=True)


def test_a_dictionary_for_use_is_refused_before_anything_is_written(tmp_path):
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=8, d_sae=32, k=32, budgets=[32], selection="relu"))
    data = torch.utils.data.StackDataset(hidden_states=activations())
    arguments = training_arguments(tmp_path / "run", max_steps=1, batch_size=50, learning_rate=1e-2)

    with pytest.raises(ValueError, match="a relu SAE is for use"):
        train_sae(sae, data, activations(), arguments)
    assert not (tmp_path / "run").exists()


def test_less_than_one_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least one batch of 50 tokens, got 40"):
        train(tmp_path, activations(tokens=40))


MEMORY = """
import torch
from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, evaluate_budgets, record_statistics

# getrusage counts from the peak of the process that started this one, which a whole test suite has made larger.
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
sae, x = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=16, d_sae=32768, k=8)), torch.randn(4096, 16)
sae.initialize_from_activations(x)
sae.train()
optimizer = torch.optim.Adam(sae.parameters())
for _ in range(2):
    sae(x[:1024]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
trained = peak()
sae.eval()
sae.fold_input_scale()
record_statistics(sae, x)
evaluate_budgets(sae, x, [8])
sae(x)
print(trained, peak())
"""


@pytest.mark.slow
def test_nothing_after_training_needs_more_memory_than_training_did():
    """In MiB: scores of 4096 tokens for 32,768 latents at once would be 512, those of a training batch are 128."""
    # Without it glibc keeps some of what was freed, another amount at every run (0, 4, 9 or 13 MiB).
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **exact}
    )
    trained, after = map(float, done.stdout.split())

    assert after <= trained + 1, json.dumps([trained, after])


TEXTS = [f"To be, or not to be, that is question {number}: whether 'tis nobler to suffer." for number in range(12)]


@pytest.fixture(scope="module")
def language_model(tiny_language_model):
    return AutoModelForCausalLM.from_pretrained(tiny_language_model), AutoTokenizer.from_pretrained(
        tiny_language_model
    )


def train_on_text(language_model, folder, *, steps=8, resume=False, transcoder=False, seed=0, **settings):
    torch.manual_seed(0)
    sites = {"hook_point": "mlp.input", "target_hook_point": "mlp.output"} if transcoder else {}
    stream = iterate_activations(
        *language_model, TEXTS, 1, **sites, batch_tokens=64, shuffle_tokens=300, show_progress=False, seed=seed
    )
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=32, d_sae=64, k=4, layer=1, **sites))
    sample = stream.sample(200)
    sae.initialize_from_activations(*(sample if transcoder else [sample]))
    options = {"batch_size": 48, "learning_rate": 1e-2, "save_steps": 3, "disable_tqdm": True, **settings}
    arguments = training_arguments(folder, max_steps=steps, **options)
    return train_sae(sae, ActivationDataset(stream), sample, arguments, resume=resume), stream


@pytest.mark.parametrize("transcoder", [False, True], ids=["autoencoder", "transcoder"])
def test_training_from_text_goes_on_exactly_and_past_the_end_of_the_text(language_model, tmp_path, transcoder):
    options = {"transcoder": transcoder, "gradient_accumulation_steps": 2}
    whole, stream = train_on_text(language_model, tmp_path / "whole", steps=14, **options)
    # The text was read more than once.
    assert (
        1.3 * len(torch.cat(list(iterate_activations(*language_model, TEXTS, 1, show_progress=False)))) < 14 * 2 * 48
    )
    train_on_text(language_model, tmp_path / "stopped", steps=14, save_total_limit=None, **options)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    # Killed before the result, and long before.
    for lost in ((), (14, 12, 9)):
        for step in lost:
            subprocess.run(["rm", "-r", tmp_path / "stopped" / f"checkpoint-{step}"], check=True)
        (tmp_path / "stopped" / "model.safetensors").unlink()
        resumed, _ = train_on_text(
            language_model, tmp_path / "stopped", steps=14, resume=True, save_total_limit=None, **options
        )

        assert resumed.state.global_step == 14
        for name, tensor in load_file(tmp_path / "stopped" / "model.safetensors").items():
            assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_without_its_place_in_the_text_reads_again_and_goes_on_exactly(language_model, tmp_path, caplog):
    train_on_text(language_model, tmp_path / "whole")
    train_on_text(language_model, tmp_path / "run", save_total_limit=None)
    (tmp_path / "run" / "model.safetensors").unlink()
    subprocess.run(["rm", "-r", tmp_path / "run" / "checkpoint-8", tmp_path / "run" / "checkpoint-6"], check=True)
    (tmp_path / "run" / "checkpoint-3" / "stream_0.pt").unlink()

    train_on_text(language_model, tmp_path / "run", resume=True)

    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_training_on_other_text_settings_is_not_gone_on_with(language_model, tmp_path):
    train_on_text(language_model, tmp_path)

    stream = iterate_activations(*language_model, TEXTS, 1, context_length=32, show_progress=False)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=32, d_sae=64, k=4, layer=1))
    sample = stream.sample(100)
    sae.initialize_from_activations(sample)
    arguments = training_arguments(tmp_path, max_steps=8, batch_size=48, learning_rate=1e-2)
    with pytest.raises(ValueError, match="holds a training with context_length=256, got context_length=32"):
        train_sae(sae, ActivationDataset(stream), sample, arguments, resume=True)


@pytest.mark.parametrize("on_text", [False, True])
def test_a_training_of_other_processes_is_not_gone_on_with(on_text, language_model, tmp_path):
    go = partial(train_on_text, language_model) if on_text else train
    go(tmp_path)
    record = json.loads((tmp_path / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps({**record, "num_processes": 2}))

    with pytest.raises(ValueError, match="holds a training with num_processes=2, got num_processes=1"):
        go(tmp_path, resume=True)


def test_workers_that_would_each_read_the_whole_text_are_refused(language_model):
    stream = iterate_activations(*language_model, TEXTS, 1, show_progress=False)
    loader = torch.utils.data.DataLoader(ActivationDataset(stream), batch_size=4, num_workers=1)

    with pytest.raises(ValueError, match="give dataloader_num_workers=0"):
        next(iter(loader))


def test_text_that_is_read_again_is_told(language_model, caplog):
    stream = iterate_activations(*language_model, TEXTS, 1, max_tokens=97, show_progress=False)
    items = iter(ActivationDataset(stream))

    transformers.logging.enable_propagation()
    first, second = ([next(items)["hidden_states"] for _ in range(97)] for _ in range(2))
    transformers.logging.disable_propagation()

    assert torch.equal(torch.stack(first), torch.stack(second))
    assert "WARNING" in caplog.text and "all 97 tokens of the text were read: it starts again" in caplog.text


def test_a_stream_trains_under_a_plain_trainer(language_model, tmp_path):
    stream = iterate_activations(*language_model, TEXTS, 1, show_progress=False, shuffle_tokens=200)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=32, d_sae=64, k=4))
    sae.initialize_from_activations(stream.sample(200))
    arguments = training_arguments(tmp_path, max_steps=30, batch_size=64, learning_rate=1e-2, logging_steps=10)

    trainer = Trainer(model=sae, args=arguments, train_dataset=ActivationDataset(stream))
    trainer.train()

    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_no_stream_of_one_site_is_no_dataset(language_model):
    several = iterate_activations(*language_model, TEXTS, [0, 1], show_progress=False)

    for wrong in (several, torch.zeros(3, 8)):
        with pytest.raises(ValueError, match="expected a stream from iterate_activations of one site"):
            ActivationDataset(wrong)
