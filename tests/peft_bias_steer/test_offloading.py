"""A base of which parts are elsewhere computes what the whole one does, to the last bit, as it does with LoRA."""

import hashlib

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_bias_steer import BiasSteerConfig, load_vectors, set_steering_vectors, steering_vectors


CPU = torch.device("cpu")
# the lower half in memory, the upper one on disk
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
ADAPTED_MAP = {f"base_model.model.{name}": place for name, place in DEVICE_MAP.items()}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch, tmp_path):
    """PEFT puts weights of a base in parts beneath the working directory."""
    monkeypatch.chdir(tmp_path)


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(tokens).logits


def adapted(base, kind=BiasSteerConfig):
    torch.manual_seed(5)
    if kind is LoraConfig:
        return get_peft_model(base, LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    return get_peft_model(base, BiasSteerConfig(init_weights=False))


def to_cpu(model, folder, device_map):
    return cpu_offload(model, execution_device=CPU)


def to_disk(model, folder, device_map):
    return disk_offload(model, str(folder / "offload"), execution_device=CPU)


def to_both(model, folder, device_map):
    return dispatch_model(model, device_map, offload_dir=str(folder / "offload"))


@pytest.fixture
def in_parts(llama, tmp_path):
    """Loads the base with two of its layers left on disk."""
    llama().save_pretrained(tmp_path / "base")

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", device_map=DEVICE_MAP, offload_folder=str(tmp_path / "offload")
        )

    return load


@pytest.mark.parametrize("kind", [BiasSteerConfig, LoraConfig])
@pytest.mark.parametrize("offload", [to_cpu, to_disk, to_both])
def test_offloading_a_model_with_an_adapter_changes_nothing(llama, tokens, tmp_path, offload, kind):
    model = adapted(llama(), kind)
    expected = logits(model, tokens)
    offload(model, tmp_path, ADAPTED_MAP)

    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("offload", [to_cpu, to_disk, to_both])
def test_an_adapter_can_be_attached_to_an_offloaded_model(llama, tokens, tmp_path, offload):
    expected = logits(adapted(llama()), tokens)
    base = llama()
    offload(base, tmp_path, DEVICE_MAP)

    assert torch.equal(logits(adapted(base), tokens), expected)


def test_an_adapter_can_be_attached_to_a_model_that_was_loaded_in_parts(llama, tokens, in_parts):
    assert torch.equal(logits(adapted(in_parts()), tokens), logits(adapted(llama()), tokens))


@pytest.mark.parametrize("offload", [to_cpu, to_disk, to_both])
def test_an_adapter_can_be_loaded_into_an_offloaded_model(llama, tokens, tmp_path, offload):
    trained = adapted(llama())
    trained.save_pretrained(tmp_path / "adapter")
    base = llama()
    offload(base, tmp_path, DEVICE_MAP)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", offload_folder=str(tmp_path / "again"))

    assert torch.equal(logits(model, tokens), logits(trained, tokens))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_can_be_loaded_into_a_model_that_was_loaded_in_parts(
    llama, tokens, tmp_path, in_parts, low_cpu_mem_usage
):
    trained = adapted(llama())
    trained.save_pretrained(tmp_path / "adapter")
    places = {"device_map": ADAPTED_MAP, "offload_folder": str(tmp_path / "again")}
    model = PeftModel.from_pretrained(in_parts(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage, **places)

    assert torch.equal(logits(model, tokens), logits(trained, tokens))
    model.load_adapter(tmp_path / "adapter", "second")
    model.set_adapter("second")
    assert torch.equal(logits(model, tokens), logits(trained, tokens))


def test_loading_an_adapter_never_overwrites_a_base_that_was_loaded_in_parts(llama, tokens, tmp_path):
    trained = adapted(llama())
    trained.save_pretrained("adapter")
    llama().save_pretrained("base")  # a path that is not absolute, which PEFT writes over
    places = {"device_map": ADAPTED_MAP, "offload_folder": "again"}
    file = tmp_path / "base" / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()

    def in_parts():
        return AutoModelForCausalLM.from_pretrained("base", device_map=DEVICE_MAP, offload_folder="offload")

    with pytest.raises(ValueError, match="PEFT would overwrite the files in base, of which layers were left on disk"):
        PeftModel.from_pretrained(in_parts(), "adapter", **places)
    model = get_peft_model(in_parts(), BiasSteerConfig.from_pretrained("adapter"))
    set_steering_vectors(model, load_vectors("adapter"))
    assert torch.equal(logits(model, tokens), logits(trained, tokens))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("offload", [to_cpu, to_disk])
def test_an_offloaded_adapter_can_be_read_written_and_saved(llama, tokens, tmp_path, offload):
    model = adapted(llama())
    vectors = steering_vectors(model)
    offload(model, tmp_path, ADAPTED_MAP)
    read = steering_vectors(model)
    assert all(torch.equal(read[index], vectors[index]) for index in vectors)

    set_steering_vectors(model, {index: 2 * vector for index, vector in vectors.items()})
    written = steering_vectors(model)
    assert all(torch.equal(written[index], 2 * vectors[index]) for index in vectors)

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    adapted(llama()).save_pretrained(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", "default")
    assert torch.equal(logits(model, tokens), logits(adapted(llama()), tokens))


def test_an_offloaded_layer_is_neither_merged_nor_unmerged(llama, tokens, tmp_path):
    model = adapted(llama())
    expected = logits(model, tokens)
    cpu_offload(model, execution_device=CPU)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match="Linear that accelerate offloads .* merge and unmerge where the layer is"
        ):
            merge()
    assert torch.equal(logits(model, tokens), expected)

    merged = adapted(llama())
    merged.merge_adapter()
    expected = logits(merged, tokens)
    cpu_offload(merged, execution_device=CPU)
    assert torch.equal(logits(merged, tokens), expected)
    with pytest.raises(ValueError, match="accelerate offloads"):
        merged.unmerge_adapter()
