"""Shards on disk: they hold the stream, survive a kill, and are refused where they are damaged or do not fit."""

import inspect
import io
import json
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

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


LOADING = threading.Lock()


def harvest(path, folder, pause=0.0, layer=(0, 1), processes=(0, 1), **options):
    # While it loads, transformers has PreTrainedModel.tie_weights do nothing, for good if two threads load at once.
    with LOADING:
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


def test_a_worker_process_maps_the_shards_itself(harvested, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(harvested[0]).parent)
    shards = ActivationShards(Path(harvested[0]).name, layer=1)
    # What a spawned worker of `DataLoader` is sent.
    sent = bytes(ForkingPickler.dumps(shards))
    monkeypatch.chdir(tmp_path)
    found = pickle.loads(sent)

    assert len(sent) < 1000 < shards.rows(torch.arange(len(shards))).nbytes
    assert (found.layer, found.hook_point, found.target_hook_point) == (1, "output", None)
    assert torch.equal(found.rows(torch.arange(len(shards))), shards.rows(torch.arange(len(shards))))


@pytest.mark.slow
def test_a_killed_harvest_resumes_without_loss_or_repetition(tiny_language_model, harvested, tmp_path):
    program = "\n".join(
        [
            "import sys, threading, time",
            "LOADING = threading.Lock()",
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


def test_the_bar_ends_at_the_tokens_that_were_asked_for(model, tokenizer, tmp_path, monkeypatch):
    bars = []

    def make(*args, **options):
        bars.append(tqdm(*args, file=io.StringIO(), **options))
        return bars[-1]

    monkeypatch.setattr(logging, "tqdm", make)
    given = iterate_activations(model, tokenizer, TEXTS * 20, 0, max_tokens=300, context_length=64, batch_tokens=256)
    assert save_shards(given, tmp_path, shard_tokens=128) == 300
    assert [(bar.total, bar.n) for bar in bars if bar.desc == "harvest"] == [(300, 300)]


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


def test_a_harvest_from_before_tokens_were_left_out_goes_on(tiny_language_model, harvested, tmp_path):
    folder = shutil.copytree(harvested[0], tmp_path / "older")
    description = json.loads((folder / "harvest.json").read_text())
    added = ("skip_special_tokens", "skip_tokens", "model_dtype", "quantization")
    older = {name: value for name, value in description.items() if name not in added}
    (folder / "harvest.json").write_text(json.dumps(older))
    (folder / "shard-00000.safetensors").unlink()

    harvest(tiny_language_model, folder)

    assert len(older) == len(description) - 4 and contents(folder) == contents(harvested[0])
    with pytest.raises(ValueError, match=r"holds a harvest with skip_tokens=None, got skip_tokens=\[5\]"):
        harvest(tiny_language_model, folder, skip_tokens=[5])


def test_a_folder_without_a_harvest_or_without_tokens_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="expected a folder written by save_shards, got"):
        ActivationShards(tmp_path)
    with pytest.raises(ValueError, match="the dataset gave no tokens"):
        save_shards(iterate_activations(model, tokenizer, [], 0, show_progress=False), tmp_path / "none")


def test_a_harvest_that_failed_before_its_first_shard_is_not_in_the_way(model, tokenizer, tmp_path):
    def save(texts, **options):
        return save_shards(iterate_activations(model, tokenizer, texts, 0, show_progress=False, **options), tmp_path)

    with pytest.raises(ValueError, match=r"longer than one token, got none .*'first_position': 1"):
        save(["a"])
    assert not list(tmp_path.glob("shard-*"))
    tokens = save(["another text"], context_length=64)

    assert len(ActivationShards(tmp_path)) == tokens > 0
    with pytest.raises(ValueError, match="holds a harvest with context_length=64, got context_length=32"):
        save(["another text"], context_length=32)
    with pytest.raises(ValueError, match="the dataset gave no tokens"):
        save([], context_length=64)
    assert len(ActivationShards(tmp_path)) == tokens


def test_other_settings_of_another_process_are_refused_before_the_first_shard(model, tokenizer, tmp_path):
    def save(texts, process_index, **options):
        stream = iterate_activations(model, tokenizer, texts, 0, show_progress=False, **options)
        return save_shards(stream, tmp_path, process_index=process_index, num_processes=2)

    assert save(["a text"], 1) is None and not list(tmp_path.glob("shard-*"))
    with pytest.raises(ValueError, match="holds a harvest with context_length=.*, got context_length=32"):
        save(["a text"], 0, context_length=32)


def test_a_layer_that_was_not_harvested_is_refused(harvested):
    with pytest.raises(ValueError, match=r"layer must be one of the harvested layers \[0, 1\], got 2"):
        ActivationShards(harvested[0], layer=2)
    with pytest.raises(IndexError, match="token numbers must be in"):
        ActivationShards(harvested[0], layer=0).rows(torch.tensor([10**6]))


def test_a_finished_harvest_says_how_many_shards_and_tokens_it_has(harvested):
    count = len(list(harvested[0].glob("shard-*")))

    tokens = harvested[1]["tokens"]
    assert json.loads((harvested[0] / "complete.json").read_text()) == {"num_shards": count, "tokens": tokens}


DAMAGES = {
    "harvest.json": [b"", b"{", b"[]", b'{"layers": [0]', b'{"layers": 3, "hidden_size": 32}', b"{}"],
    "complete.json": [b"", b'{"num_sha', b"null", b'{"num_shards": "5", "tokens": 9}', b'{"num_shards": 4}'],
}


@pytest.mark.parametrize("name, content", [(name, content) for name in DAMAGES for content in DAMAGES[name]])
def test_a_damaged_record_is_named(harvested, tmp_path, name, content):
    folder = shutil.copytree(harvested[0], tmp_path / "copy")
    (folder / name).write_bytes(content)

    with pytest.raises(ValueError, match=f"copy/{name} is damaged or was not written by save_shards, it has no"):
        ActivationShards(folder, layer=0)


def test_a_harvest_whose_record_of_its_end_is_damaged_goes_on(tiny_language_model, harvested, tmp_path):
    folder = shutil.copytree(harvested[0], tmp_path / "copy")
    (folder / "complete.json").write_bytes(b"{")
    harvest(tiny_language_model, folder)
    assert contents(folder) == contents(harvested[0])

    (folder / "harvest.json").write_bytes(b"{")
    with pytest.raises(ValueError, match="harvest.json is damaged .* delete it and run the harvest again"):
        harvest(tiny_language_model, folder)


@pytest.mark.parametrize("metadata", [None, {}, {"harvest": "{"}, {"harvest": '{"sha256": "0"}'}, {"harvest": "[]"}])
def test_a_shard_without_its_record_is_named(harvested, tmp_path, metadata):
    folder = shutil.copytree(harvested[0], tmp_path / "copy")
    save_file({"layer_0": torch.zeros(5, 32)}, folder / "shard-00001.safetensors", metadata=metadata)

    with pytest.raises(ValueError, match="shard-00001.safetensors is damaged or was not written by save_shards"):
        ActivationShards(folder, layer=0)


def change_of_shard(folder, change):
    """The first shard with other tensors, under the record that was written with it."""
    path = folder / "shard-00000.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(change(tensors), path, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {"layer_0": tensors["layer_1"], "layer_1": tensors["layer_0"]},
        lambda tensors: {name: tensor.view(-1, 32).view(torch.int32) for name, tensor in tensors.items()},
        lambda tensors: {**tensors, "layer_1": tensors["layer_1"].view(2, -1, 32)},
    ],
    ids=["names", "dtypes", "shapes"],
)
def test_checksums_cover_names_types_and_shapes(harvested, tmp_path, change):
    folder = shutil.copytree(harvested[0], tmp_path / "copy")
    change_of_shard(folder, change)

    with pytest.raises(ValueError, match="shard-00000.safetensors is damaged, its checksum differs"):
        ActivationShards(folder, layer=0).verify()


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda tensors: {"layer_1": tensors["layer_1"]}, "None"),
        (lambda tensors: {**tensors, "layer_0": tensors["layer_0"][:, :16].contiguous()}, r"\(\d+, 16\)"),
    ],
)
def test_a_shard_without_the_layer_or_of_another_width_is_named(harvested, tmp_path, change, found):
    folder = shutil.copytree(harvested[0], tmp_path / "copy")
    change_of_shard(folder, change)

    with pytest.raises(ValueError, match=rf"shard-00000.safetensors must hold layer_0 of shape .*, got {found}"):
        ActivationShards(folder, layer=0)


def test_numbers_that_do_not_agree_with_the_shards_are_noticed(harvested, tmp_path):
    folder = shutil.copytree(harvested[0], tmp_path / "copy")
    complete = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps({"num_shards": complete["num_shards"] - 1, "tokens": 500}))
    with pytest.raises(
        ValueError, match=r"shard-\d+.safetensors belongs to no harvest: complete.json says \d+ shards"
    ):
        ActivationShards(folder, layer=0).verify()

    for tokens in (complete["tokens"] + 1, -3):
        (folder / "complete.json").write_text(json.dumps({**complete, "tokens": tokens}))
        with pytest.raises(ValueError, match=f"complete.json says {tokens} tokens, the .* shards hold"):
            ActivationShards(folder, layer=0)
    (folder / "complete.json").write_text(json.dumps({"num_shards": 0, "tokens": 9}))
    with pytest.raises(ValueError, match="the 0 shards in .* hold no tokens"):
        ActivationShards(folder, layer=0)


def test_what_is_no_token_number_gives_no_row(harvested):
    shards = ActivationShards(harvested[0], layer=0)

    for numbers in (torch.tensor([0.5]), torch.tensor([True])):
        with pytest.raises(IndexError, match="token numbers must be integers"):
            shards.rows(numbers)
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        next(shards.batches(0))


@pytest.mark.parametrize("layer", [True, 0.0, "0"])
def test_what_is_no_layer_number_names_no_shards(harvested, layer):
    with pytest.raises(ValueError, match="layer must be an integer, got"):
        ActivationShards(harvested[0], layer=layer)


def test_values_that_a_type_cannot_hold_are_refused_before_anything_is_written(
    tiny_language_model, tokenizer, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e10)
    given = iterate_activations(model, tokenizer, TEXTS, 0, max_norm_ratio=None, show_progress=False)

    with pytest.raises(ValueError, match=r"too large for float16, which ends at 65,504: .*bfloat16 or torch.float32"):
        save_shards(given, tmp_path / "half", dtype=torch.float16)
    assert not list((tmp_path / "half").glob("*.safetensors"))
    save_shards(given, tmp_path / "brain", dtype=torch.bfloat16)
    assert next(ActivationShards(tmp_path / "brain").batches()).abs().max() > 65504


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": torch.int8}, "dtype must be torch.float32, torch.bfloat16 or torch.float16, got torch.int8"),
        ({"dtype": "float16"}, "dtype must be .*, got 'float16'"),
        ({"shard_tokens": 10.5}, "shard_tokens must be an integer, got 10.5"),
        ({"process_index": True}, "process_index must be an integer, got True"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_before_a_folder_is_made(
    model, tokenizer, tmp_path, options, message
):
    given = iterate_activations(model, tokenizer, TEXTS, 0, show_progress=False)
    with pytest.raises(ValueError, match=message):
        save_shards(given, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_two_harvests_at_once_into_one_folder_write_one(tiny_language_model, harvested, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        for running in [pool.submit(harvest, tiny_language_model, tmp_path) for _ in range(4)]:
            running.result()

    assert contents(tmp_path) == contents(harvested[0])


def test_a_row_that_gives_infinities_late_in_the_text_is_left_out(tiny_language_model, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~")["input_ids"][-1]] = torch.inf
    texts = ["to be or not to be " * 5] * 60
    given = [*texts, "t~", *texts]
    options = {"batch_tokens": 256, "show_progress": False}

    for _ in range(2):
        poisoned = iterate_activations(model, tokenizer, given, 0, **options)
        save_shards(poisoned, tmp_path / "poisoned", shard_tokens=400)
    save_shards(iterate_activations(model, tokenizer, [*texts, "t", *texts], 0, **options), tmp_path / "clean")

    assert poisoned.counts["not_finite"] == 1
    rows = ActivationShards(tmp_path / "poisoned")
    assert len(rows) == poisoned.counts["tokens"] == len(ActivationShards(tmp_path / "clean"))
    assert all(batch.isfinite().all() for batch in rows.batches())


def test_each_site_is_read_back_as_the_stream_gives_it(model, tokenizer, tmp_path):
    sites = ["output", "mlp.output", "middle"]
    save_shards(
        iterate_activations(model, tokenizer, TEXTS, [0, 1], hook_point=sites, show_progress=False),
        tmp_path / "states",
    )

    for layer in (0, 1):
        for site in sites:
            alone = iterate_activations(model, tokenizer, TEXTS, layer, hook_point=site, show_progress=False)
            found = torch.cat(list(ActivationShards(tmp_path / "states", layer, site).batches()))
            torch.testing.assert_close(found, torch.cat(list(alone)))
    with pytest.raises(
        ValueError, match=r"hook_point must be one of the harvested hook_points \['output', .*, got None"
    ):
        ActivationShards(tmp_path / "states", 0)
    with pytest.raises(ValueError, match=r"hook_point must be one of the harvested .*\], got input"):
        ActivationShards(tmp_path / "states", 0, "input")


def test_modules_by_their_paths_are_read_back_without_a_layer(model, tokenizer, tmp_path):
    paths = ["model.layers.0.mlp", "model.layers.1.mlp"]
    reader = iterate_activations(model, tokenizer, TEXTS, None, hook_point=paths, show_progress=False)
    save_shards(reader, tmp_path)

    shards = ActivationShards(tmp_path, hook_point=paths[1])

    assert (shards.layer, shards.hook_point) == (None, paths[1])
    alone = iterate_activations(model, tokenizer, TEXTS, 1, hook_point="mlp", show_progress=False)
    torch.testing.assert_close(torch.cat(list(shards.batches())), torch.cat(list(alone)))


def test_a_harvest_without_sites_is_one_of_layer_outputs_and_goes_on(model, tokenizer, tmp_path):
    def reader(**options):
        return iterate_activations(model, tokenizer, TEXTS, 0, show_progress=False, **options)

    tokens = save_shards(reader(), tmp_path)
    path = tmp_path / "harvest.json"
    description = json.loads(path.read_text())
    assert description.pop("hook_points") == ["output"]
    # As they were written before sites could differ in width.
    assert description.pop("widths") == {"layer_0": 32}
    description["hidden_size"] = 32
    path.write_text(json.dumps(description))

    assert ActivationShards(tmp_path).hook_point == "output" and save_shards(reader(), tmp_path) == tokens
    with pytest.raises(ValueError, match=r"a harvest with hook_points=\['output'\], got hook_points=\['middle'\]"):
        save_shards(reader(hook_point="middle"), tmp_path)


def test_a_harvest_of_another_site_is_refused(model, tokenizer, tmp_path):
    save_shards(iterate_activations(model, tokenizer, TEXTS, 0, hook_point="middle", show_progress=False), tmp_path)
    shards = ActivationShards(tmp_path)
    config = {"d_in": 32, "d_sae": 64, "k": 4, "layer": 0}

    shards.check_reads(HierarchicalSaeModel(HierarchicalSaeConfig(**config, hook_point="middle")))
    with pytest.raises(ValueError, match="size 32 of layer 0, .* holds those of size 32 of middle of layer 0"):
        shards.check_reads(HierarchicalSaeModel(HierarchicalSaeConfig(**config, hook_point="output")))


@pytest.mark.parametrize("first", [150, 900])
@pytest.mark.parametrize("limit", [1500, None])
def test_a_harvest_that_grows_is_the_one_that_is_made_at_once(tiny_language_model, tmp_path, first, limit):
    harvest(tiny_language_model, tmp_path / "grown", max_tokens=first)
    assert len(ActivationShards(tmp_path / "grown", 0)) == first
    shards = sorted((tmp_path / "grown").glob("shard-*"))
    before = {path.name: path.stat().st_ino for path in shards}

    harvest(tiny_language_model, tmp_path / "grown", max_tokens=limit)

    harvest(tiny_language_model, tmp_path / "once", max_tokens=limit)
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")
    kept = [path.name for path in shards if path.exists() and path.stat().st_ino == before[path.name]]
    # Whole shards of 400 tokens of text stay; those that `max_tokens` had cut short are made again.
    assert kept == [path.name for path in shards][: len(kept)] and len(kept) >= first // 400
    ActivationShards(tmp_path / "grown", 0).verify()


def test_a_growing_harvest_is_unfinished_until_all_processes_are_done(tiny_language_model, tmp_path):
    harvest(tiny_language_model, tmp_path / "grown", max_tokens=900)

    for process in (1, 0):
        harvest(tiny_language_model, tmp_path / "grown", max_tokens=1500, processes=(process, 2))
        if process == 1:
            with pytest.raises(ValueError, match="is not finished"):
                ActivationShards(tmp_path / "grown", 0)

    harvest(tiny_language_model, tmp_path / "once", max_tokens=1500)
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")


def test_a_shard_that_another_process_has_still_to_replace_does_not_count(tiny_language_model, tmp_path):
    harvest(tiny_language_model, tmp_path / "grown", max_tokens=500)
    assert len(list((tmp_path / "grown").glob("shard-*"))) == 2

    for process in (0, 1):
        harvest(tiny_language_model, tmp_path / "grown", max_tokens=700, processes=(process, 2))
        assert (tmp_path / "grown" / "complete.json").exists() == (process == 1)

    harvest(tiny_language_model, tmp_path / "once", max_tokens=700)
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")


def test_processes_that_read_other_texts_do_not_make_one_harvest(tmp_path, model, tokenizer):
    for process, text in enumerate(("to be or not to be", "whether 'tis nobler")):
        stream = iterate_activations(model, tokenizer, [text] * 99, 0, batch_tokens=64, show_progress=False)
        options = {"shard_tokens": 400, "process_index": process, "num_processes": 2}
        if process == 0:
            assert save_shards(stream, tmp_path, **options) is None
    with pytest.raises(ValueError, match="shard-00000.safetensors was harvested from another text"):
        save_shards(stream, tmp_path, **options)


def test_a_harvest_does_not_shrink_and_grows_with_its_own_text_alone(tiny_language_model, tmp_path, model, tokenizer):
    harvest(tiny_language_model, tmp_path, max_tokens=900)
    before = contents(tmp_path)

    with pytest.raises(ValueError, match="a harvest with max_tokens=900, got max_tokens=300: .* more max_tokens"):
        harvest(tiny_language_model, tmp_path, max_tokens=300)
    assert contents(tmp_path) == before
    other = iterate_activations(
        model, tokenizer, ["another text"] * 99, (0, 1), max_tokens=1500, batch_tokens=256, context_length=64
    )
    with pytest.raises(ValueError, match="harvest with model_name|was harvested from another text"):
        save_shards(other, tmp_path, shard_tokens=400)
    shards = {name: content for name, content in before.items() if name.startswith("shard")}
    assert {name: content for name, content in contents(tmp_path).items() if name.startswith("shard")} == shards
