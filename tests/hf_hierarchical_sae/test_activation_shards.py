"""Shards on disk: they hold the stream, survive a kill, and are refused where they are damaged or do not fit."""

import inspect
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import (
    ActivationShards,
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    explained_variance,
    iterate_activations,
    save_shards,
)


TEXTS = ["To be, or not to be, that is the question.", "Whether", "tis nobler in the mind to suffer " * 3]


@pytest.fixture(scope="module")
def model(tiny_language_model):
    return AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


def stream(model, tokenizer, texts=TEXTS, layer=0, **options):
    options = {"max_norm_ratio": None, "show_progress": False, **options}
    return torch.cat(list(iterate_activations(model, tokenizer, texts, layer, **options)))


def numbered_texts(pause=0.0):
    for number in range(40):
        time.sleep(pause)
        yield {"text": f"{number}: to be, or not to be" * (1 + number % 5)}


def harvest(path, folder, pause=0.0, layer=(0, 1), processes=(0, 1), **options):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    options = {"batch_tokens": 256, "context_length": 64, "show_progress": False, **options}
    stream = iterate_activations(model, tokenizer, numbered_texts(pause), layer, **options)
    save_shards(stream, folder, shard_tokens=400, process_index=processes[0], num_processes=processes[1])
    return stream


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def harvested(tiny_language_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harvested")
    return folder, harvest(tiny_language_model, folder).counts


def test_shards_hold_the_tokens_of_the_stream(model, tokenizer, harvested):
    folder, counts = harvested
    expected = stream(
        model, tokenizer, list(numbered_texts()), 1, max_norm_ratio=5.0, batch_tokens=256, context_length=64
    )

    shards = ActivationShards(folder, layer=1)

    assert len(list(folder.glob("shard-*.safetensors"))) > 3
    assert len(shards) == counts["tokens"] == len(expected)
    assert torch.equal(torch.cat(list(shards.batches(100))), expected)
    numbers = torch.randperm(len(shards))
    assert torch.equal(shards.rows(numbers), expected[numbers])
    assert torch.equal(shards[-1]["hidden_states"], expected[-1])
    shards.verify()


def test_shards_are_mapped_not_read(harvested):
    shards = ActivationShards(harvested[0], layer=0)

    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if str(harvested[0]) in line]
    assert len(mapped) >= len(shards._shards)


@pytest.mark.slow
def test_a_killed_harvest_resumes_without_loss_or_repetition(tiny_language_model, harvested, tmp_path):
    program = "\n".join(
        [
            "import sys, time",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "from hf_hierarchical_sae import iterate_activations, save_shards",
            inspect.getsource(numbered_texts),
            inspect.getsource(harvest),
            "harvest(sys.argv[1], sys.argv[2], pause=0.1)",
        ]
    )
    process = subprocess.Popen([sys.executable, "-c", program, tiny_language_model, tmp_path], stderr=subprocess.PIPE)
    first, second = tmp_path / "shard-00000.safetensors", tmp_path / "shard-00001.safetensors"
    while not second.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "complete.json").exists()
    written = first.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"not finished, it has \d+ shards so far: run it again"):
        ActivationShards(tmp_path, layer=0)

    resumed = harvest(tiny_language_model, tmp_path)

    assert first.stat().st_mtime_ns == written
    assert contents(tmp_path) == contents(harvested[0])
    assert resumed.counts == harvested[1]


def test_a_shard_gets_its_name_only_once_it_is_whole(tiny_language_model, tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a shard")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hf_hierarchical_sae.activation_shards.save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            harvest(tiny_language_model, tmp_path)
    assert not list(tmp_path.glob("shard-*.safetensors"))

    harvest(tiny_language_model, tmp_path)
    assert not list(tmp_path.glob("*.tmp")) and ActivationShards(tmp_path, layer=0)


def test_several_processes_write_together_what_one_writes_alone(tiny_language_model, harvested, tmp_path):
    harvest(tiny_language_model, tmp_path, processes=(1, 2))
    mine = {file.name for file in tmp_path.glob("shard-*")}
    harvest(tiny_language_model, tmp_path, processes=(0, 2))

    assert contents(tmp_path) == contents(harvested[0])
    assert len(mine) == len(list(harvested[0].glob("shard-*"))) // 2


def tear(path):
    path.write_bytes(path.read_bytes()[:-40])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [tear, empty, flip_a_bit, lambda path: path.unlink()])
def test_a_damaged_shard_is_named_and_harvested_again(damage, tiny_language_model, harvested, tmp_path):
    for name, content in contents(harvested[0]).items():
        (tmp_path / name).write_bytes(content)
    damage(tmp_path / "shard-00002.safetensors")

    with pytest.raises(
        ValueError, match="shard-00002.safetensors is (torn or missing|damaged).*run the harvest again"
    ):
        ActivationShards(tmp_path, layer=0).verify()

    harvest(tiny_language_model, tmp_path)
    assert contents(tmp_path) == contents(harvested[0])


def test_half_precision_shards_are_read_as_float32(tiny_language_model, model, tokenizer, tmp_path):
    given = iterate_activations(model, tokenizer, TEXTS, 1, show_progress=False)
    save_shards(given, tmp_path, dtype=torch.bfloat16)

    shards = ActivationShards(tmp_path)

    assert shards.description["dtype"] == "bfloat16" and shards.description["layers"] == [1]
    expected = stream(model, tokenizer, layer=1, max_norm_ratio=5.0).bfloat16().float()
    assert torch.equal(next(shards.batches()), expected)
    assert torch.equal(shards[3]["hidden_states"], expected[3])


@pytest.mark.parametrize("max_norm_ratio", [5.0, 1.3])
def test_max_tokens_is_exact_however_many_processes_write_and_tokens_are_left_out(
    max_norm_ratio, tiny_language_model, model, tokenizer, tmp_path
):
    options = {"max_tokens": 1000, "max_norm_ratio": max_norm_ratio}
    for index in range(2):
        harvest(tiny_language_model, tmp_path / "two", processes=(index, 2), **options)
    harvest(tiny_language_model, tmp_path / "one", **options)
    expected = stream(model, tokenizer, list(numbered_texts()), batch_tokens=256, context_length=64, **options)

    shards = ActivationShards(tmp_path / "one", layer=0)

    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(shards) == sum(map(len, shards.batches())) == len(expected) == 1000
    assert torch.equal(shards.rows(torch.arange(1000)), expected)
    shards.verify()


def test_a_harvest_is_complete_only_once_every_process_has_written(tiny_language_model, tmp_path):
    harvest(tiny_language_model, tmp_path, processes=(1, 2))

    with pytest.raises(ValueError, match="is not finished, it has"):
        ActivationShards(tmp_path, layer=0)


def test_a_text_shorter_than_max_tokens_gives_all_of_its_tokens(tiny_language_model, harvested, tmp_path):
    harvest(tiny_language_model, tmp_path, max_tokens=10**6)

    assert len(ActivationShards(tmp_path, layer=0)) == harvested[1]["tokens"]


@pytest.mark.slow
def test_trainer_learns_from_shards(harvested, tmp_path):
    shards = ActivationShards(harvested[0], layer=1)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=32, d_sae=64, k=8))
    everything = torch.cat(list(shards.batches()))
    sae.initialize_from_activations(everything)
    before = explained_variance(sae, everything)[8]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=30,
        per_device_train_batch_size=256,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )

    transformers.Trainer(model=sae, args=arguments, train_dataset=shards).train()

    assert explained_variance(sae, shards.batches())[8] > before + 0.05


def test_a_harvest_with_other_settings_or_text_is_refused(tiny_language_model, model, tokenizer, harvested):
    with pytest.raises(ValueError, match=r"holds a harvest with layers=\[0, 1\], got layers=\[1\]"):
        harvest(tiny_language_model, harvested[0], layer=1)
    options = {"batch_tokens": 256, "context_length": 64, "show_progress": False}
    other = iterate_activations(model, tokenizer, ["another text " * 99], [0, 1], **options)
    with pytest.raises(ValueError, match="shard-00000.safetensors was harvested from another text"):
        save_shards(other, harvested[0], shard_tokens=400)


def test_a_folder_without_a_harvest_or_without_tokens_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="expected a folder written by save_shards, got"):
        ActivationShards(tmp_path)
    with pytest.raises(ValueError, match="the dataset gave no tokens"):
        save_shards(iterate_activations(model, tokenizer, [], 0, show_progress=False), tmp_path / "none")
    save_shards(iterate_activations(model, tokenizer, ["a"], 0, show_progress=False), tmp_path / "one")
    with pytest.raises(ValueError, match="the 1 shards in .* hold no tokens: harvest more text"):
        ActivationShards(tmp_path / "one")


def test_a_layer_that_was_not_harvested_is_refused(harvested):
    with pytest.raises(ValueError, match=r"layer must be one of the harvested layers \[0, 1\], got 2"):
        ActivationShards(harvested[0], layer=2)
    with pytest.raises(IndexError, match="token numbers must be in"):
        ActivationShards(harvested[0], layer=0).rows(torch.tensor([10**6]))


def test_a_finished_harvest_says_how_many_shards_and_tokens_it_has(harvested):
    count = len(list(harvested[0].glob("shard-*")))

    tokens = harvested[1]["tokens"]
    assert json.loads((harvested[0] / "complete.json").read_text()) == {"num_shards": count, "tokens": tokens}
