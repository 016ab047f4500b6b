"""Two processes train what one process trains: parameters, counters and logged numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_hierarchical_sae import (
    ActivationDataset,
    HierarchicalSaeCallback,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    iterate_activations,
)
from hf_hierarchical_sae.training import train_sae, training_arguments


STEPS = 6
TEXTS = [f"To be, or not to be, that is question {number}: whether 'tis nobler to suffer." for number in range(30)]
TRANSCODER = {"d_out": 10, "hook_point": "mlp.input", "target_hook_point": "mlp.output", "skip_connection": True}


def make_sae_and_data(config):
    torch.manual_seed(0)
    x = torch.randn(256, 16) @ torch.randn(16, 16) + 3
    sae = HierarchicalSaeModel(
        HierarchicalSaeConfig(**{"d_in": 16, "d_sae": 64, "k": 8, "dead_after_tokens": 100, **config})
    )
    sae.initialize_from_activations(*columns(sae, x).values())
    with torch.no_grad():
        sae.b_enc[:5] = -100
    return sae.train(), x


def columns(sae, x):
    """What it reads and, for a transcoder, what it is to compute from it."""
    targets = {"targets": torch.relu(x)[:, :10]} if sae.config.is_transcoder else {}
    return {"hidden_states": x, **targets}


def train_with_trainer(folder, config, **arguments):
    """Stock `Trainer`, under DDP where there are several processes."""
    # A forked process inherits the parent's view of itself as the only one.
    AcceleratorState._reset_state(reset_partial_state=True)
    sae, x = make_sae_and_data(config)
    training = TrainingArguments(
        folder, max_steps=STEPS, learning_rate=1e-2, logging_steps=3, save_strategy="no", report_to="none",
        use_cpu=True, **arguments,
    )  # fmt: skip
    data = torch.utils.data.StackDataset(**columns(sae, x))
    trainer = Trainer(model=sae, args=training, train_dataset=data, callbacks=[HierarchicalSaeCallback()])
    trainer.train()
    write_result(folder, sae.state_dict(), [log for log in trainer.state.log_history if "loss" in log])


def train_with_fsdp2(folder, config):
    """A plain loop: Accelerate, and so `Trainer`, offers FSDP on accelerators only."""
    sae, x = make_sae_and_data(config)
    fully_shard(sae, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    assert isinstance(sae, FSDPModule)
    train_with_loop(folder, sae, x, torch.distributed.get_rank(), processes=2)


def train_with_loop(folder, sae, x, rank=0, processes=1):
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = x[32 * step : 32 * (step + 1)].chunk(processes)[rank]
        sae(**columns(sae, batch)).loss.backward()
        optimizer.step()
    state = get_model_state_dict(sae, options=StateDictOptions(full_state_dict=True))
    write_result(folder, state, [sae.pop_training_metrics()])


def write_result(folder, state, logs):
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, Path(folder) / "state.safetensors")
        (Path(folder) / "logs.json").write_text(json.dumps(logs))


def result_of(function, folder, *arguments, processes=1, **options):
    folder.mkdir()

    def call():
        function(str(folder), *arguments, **options)

    if processes > 1:
        debug_launcher(call, num_processes=processes)
    else:
        call()
    return load_file(folder / "state.safetensors"), json.loads((folder / "logs.json").read_text())


def assert_same_training(found, expected, *, same_counters=True):
    (state, logs), (expected_state, expected_logs) = found, expected
    counters, expected_counters = state.pop("tokens_since_fired"), expected_state.pop("tokens_since_fired")
    assert torch.equal(counters, expected_counters) is same_counters
    for name, tensor in expected_state.items():
        # Adam turns the rounding of a gradient near zero into a step of its own; six steps keep it this small.
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-4)
    assert len(logs) == len(expected_logs) > 0
    for log, expected_log in zip(logs, expected_logs):
        assert log == pytest.approx(expected_log, rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{}, {"budgets": [8], "matryoshka_prefixes": [16, 64]}, {"aux_loss_coefficient": 0.1}, TRANSCODER],
    ids=["hierarchical", "matryoshka", "auxiliary", "transcoder"],
)
def test_ddp_with_two_processes_equals_one_process(tmp_path, config):
    one = result_of(train_with_trainer, tmp_path / "one", config, per_device_train_batch_size=64)
    two = result_of(train_with_trainer, tmp_path / "two", config, per_device_train_batch_size=32, processes=2)

    assert (one[0]["tokens_since_fired"][:5] == STEPS * 64).all()
    assert one[1][-1]["dead_fraction"] >= 5 / 64
    assert_same_training(two, one)


@pytest.mark.slow
def test_processes_share_one_threshold(tmp_path):
    config = {"budgets": [8], "selection": "batch_topk"}
    one, _ = result_of(train_with_trainer, tmp_path / "one", config, per_device_train_batch_size=64)
    two, _ = result_of(train_with_trainer, tmp_path / "two", config, per_device_train_batch_size=32, processes=2)

    # Each process keeps the strongest of its own half batch, so the thresholds differ a little by design.
    torch.testing.assert_close(two["threshold"], one["threshold"], rtol=0.1, atol=0)


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    one = result_of(train_with_trainer, tmp_path / "one", {}, per_device_train_batch_size=64)
    options = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2}
    two = result_of(train_with_trainer, tmp_path / "two", {}, **options)

    # A latent that fires in the first half batch alone is 32 tokens old after the second.
    assert_same_training(two, one, same_counters=False)


def test_bf16_training_keeps_float32_weights_and_stays_close(tmp_path):
    expected_state, expected_logs = result_of(
        train_with_trainer, tmp_path / "float32", {}, per_device_train_batch_size=64
    )
    state, logs = result_of(train_with_trainer, tmp_path / "bf16", {}, per_device_train_batch_size=64, bf16=True)

    del state["tokens_since_fired"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert logs[-1]["loss"] == pytest.approx(expected_logs[-1]["loss"], rel=0.02)
    assert logs[-1]["loss"] != expected_logs[-1]["loss"]


# Pinned: torch before 2.10 sums FSDP2's gradients over gloo, of a plain linear layer too.
@pytest.mark.pinned
@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, TRANSCODER], ids=["autoencoder", "transcoder"])
def test_fsdp2_with_two_processes_equals_one_process(tmp_path, config):
    two = result_of(train_with_fsdp2, tmp_path / "two", config, processes=2)
    (tmp_path / "one").mkdir()
    train_with_loop(tmp_path / "one", *make_sae_and_data(config))
    one = load_file(tmp_path / "one" / "state.safetensors"), json.loads((tmp_path / "one" / "logs.json").read_text())

    assert_same_training(two, one)


def stream_of(model, texts):
    language_model = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    return iterate_activations(
        *language_model, texts, 1, batch_tokens=64, shuffle_tokens=300, max_norm_ratio=None, show_progress=False
    )


def train_on_text(folder, model, resume=False):
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {"save_steps": 3, "save_total_limit": None, "disable_tqdm": True}
    arguments = training_arguments(folder, max_steps=STEPS, batch_size=40, learning_rate=1e-2, **options)
    stream = stream_of(model, TEXTS)
    stream.take_part(arguments.process_index, arguments.world_size)
    torch.manual_seed(0)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=32, d_sae=64, k=4))
    sample = stream.sample(200)
    sae.initialize_from_activations(sample)
    train_sae(sae, ActivationDataset(stream), sample, arguments, resume=resume)


@pytest.mark.slow
@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.9", reason="torch 2.8 loads no optimizer onto cpu:0")
def test_two_processes_train_each_on_its_own_text_and_go_on_exactly(tmp_path, tiny_language_model):
    debug_launcher(train_on_text, (str(tmp_path), tiny_language_model), num_processes=2)
    expected = load_file(tmp_path / "model.safetensors")
    for index in (0, 1):
        own = torch.cat(list(stream_of(tiny_language_model, TEXTS[index::2])))
        state = torch.load(tmp_path / "checkpoint-3" / f"stream_{index}.pt")
        left = torch.cat([*state["rest"], *state["stream"]["buffer"]])
        assert len(left) > 100 and set(map(tuple, left.tolist())) < set(map(tuple, own.tolist()))

    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "model.safetensors").unlink()
    debug_launcher(train_on_text, (str(tmp_path), tiny_language_model, True), num_processes=2)

    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
