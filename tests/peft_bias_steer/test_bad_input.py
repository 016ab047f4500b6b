"""What a user gets wrong is answered with what was expected, what came and what to do, and harms nothing."""

from contextlib import contextmanager

import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_bias_steer import BiasSteerConfig


@pytest.fixture
def saved(llama, set_vectors, tmp_path):
    model = get_peft_model(llama(), BiasSteerConfig())
    set_vectors(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def traces_of(model):
    """All that an adapter changes in a model: modules, hooks, attributes, weights, what is trained, bookkeeping."""
    return {
        "modules": [(name, type(m), len(m._forward_hooks), m.training) for name, m in model.named_modules()],
        "attributes": set(vars(model)),
        "parameters": [(name, p.requires_grad, p.data_ptr(), p._version) for name, p in model.named_parameters()],
        "adapters": list(getattr(model, "peft_config", {})),
        "targets": list(getattr(getattr(model, "base_model", None), "targeted_module_names", [])),
    }


@contextmanager
def refused(model, error, match):
    """Checks that the block raises, and that `model` is left as it was."""
    before = traces_of(model)
    with pytest.raises(error, match=match):
        yield
    assert traces_of(model) == before


@pytest.mark.parametrize("index", [3, -4, [0, 7]])
def test_layer_index_out_of_range(llama, tokens, index):
    base = llama()
    with refused(base, ValueError, match=r"indices in \[-3, 2\], got \[(3|-4|7)\]"):
        get_peft_model(base, BiasSteerConfig(layers_to_transform=index))


def test_no_layer_index(llama):
    with pytest.raises(ValueError, match=r"indices in \[-3, 2\], got \[\]"):
        get_peft_model(llama(), BiasSteerConfig(layers_to_transform=[]))


def test_target_modules_that_match_nothing(llama, tokens):
    base = llama()
    with refused(base, ValueError, match="Target modules .*no_such_module.* not found in the base model"):
        get_peft_model(base, BiasSteerConfig(target_modules=["no_such_module"]))


def test_target_modules_of_an_unsupported_kind(llama):
    with pytest.raises(TypeError, match="embed_tokens is a Embedding, expected a decoder layer, nn.Linear or Conv1D"):
        get_peft_model(llama(), BiasSteerConfig(target_modules=["embed_tokens"]))


def test_a_bad_target_among_good_ones_leaves_nothing_behind(llama):
    base = llama()
    with refused(base, TypeError, "norm is a LlamaRMSNorm"):
        get_peft_model(base, BiasSteerConfig(target_modules=["o_proj", "norm"]))

    model = get_peft_model(base, BiasSteerConfig(target_modules=["o_proj"]))
    with refused(model, TypeError, "norm is a LlamaRMSNorm"):
        model.add_adapter("other", BiasSteerConfig(target_modules=["o_proj", "q_proj", "norm"]))


def as_first_adapter(base, folder):
    return base, lambda: PeftModel.from_pretrained(base, folder)


def as_first_adapter_on_the_meta_device(base, folder):
    return base, lambda: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)


def as_second_adapter(base, folder):
    model = get_peft_model(base, BiasSteerConfig(layers_to_transform=[0]))
    return model, lambda: model.load_adapter(folder, "other", is_trainable=True)


def key_of(layer: int) -> str:
    return f"base_model.model.model.layers.{layer}.bias_steer.bias_steer_vector.weight"


def of_another_width(file):
    save_file({key: torch.zeros(16) for key in load_file(file)}, file)


def with_one_vector_of_another_width(file):
    save_file({**load_file(file), key_of(2): torch.zeros(31)}, file)


def of_a_deeper_base(file):
    save_file({**load_file(file), key_of(3): torch.zeros(32)}, file)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-10])


def emptied(file):
    file.write_bytes(b"")


def pickled(file):
    torch.save({key_of(0): torch.zeros(32)}, file)


@pytest.mark.parametrize("load", [as_first_adapter, as_first_adapter_on_the_meta_device, as_second_adapter])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            of_another_width,
            r"expected a vector of shape \(32,\) for model.layers.0, got \(16,\): load it into the base",
        ),
        (with_one_vector_of_another_width, r"\(32,\) for model.layers.2, got \(31,\): load it"),
        (of_a_deeper_base, "a vector for model.layers.3, but this model has no such module: load it"),
        (cut_short, r"should be a complete safetensors file, got \d+ bytes that do not parse"),
        (emptied, "should be a complete safetensors file, got 0 bytes"),
        (pickled, "should be a complete safetensors file"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_the_model_is_touched(llama, saved, load, damage, message):
    damage(saved / "adapter_model.safetensors")
    model, attempt = load(llama(), saved)
    with refused(model, ValueError, message):
        attempt()


def test_a_damaged_adapter_on_the_hub_is_refused_before_the_model_is_touched(hub, llama, saved):
    with_one_vector_of_another_width(saved / "adapter_model.safetensors")
    HfApi().create_repo("user/broken-adapter")
    HfApi().upload_folder(repo_id="user/broken-adapter", folder_path=saved)
    base = llama()
    with refused(base, ValueError, r"\(32,\) for model.layers.2, got \(31,\)"):
        PeftModel.from_pretrained(base, "user/broken-adapter")


def test_settings_of_a_saved_adapter_can_start_a_new_one(llama, saved):
    config = BiasSteerConfig.from_pretrained(saved)
    model = get_peft_model(llama(), config)

    assert not any(layer.vector("default").any() for layer in model.base_model.steering_layers.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({key_of(1): torch.ones(31)}, r"expected a vector of shape \(32,\) for model.layers.1, got \(31,\): load it"),
        ({key_of(3): torch.ones(32)}, "the state dict holds .*layers.3.*, but no such module is steered"),
    ],
)
def test_a_state_dict_that_does_not_fit_overwrites_nothing(llama, saved, change, message):
    model = PeftModel.from_pretrained(llama(), saved)
    with refused(model, ValueError, message):
        set_peft_model_state_dict(model, {key_of(0): torch.ones(32), **change})


def test_unknown_adapter_names(llama, tokens):
    model = get_peft_model(llama(), BiasSteerConfig()).eval()

    with pytest.raises(ValueError, match=r"Adapter\(s\) \['other'\] do not exist, expected some of \['default'\]"):
        model.set_scale("other", 2.0)
    with pytest.raises(ValueError, match=r"\['other'\] do not exist"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    with pytest.raises(ValueError, match="non-existing adapter.*other"):
        model(tokens, adapter_names=["default", "other", "default"])


def test_adapter_names_that_do_not_fit_the_batch(llama, tokens):
    model = get_peft_model(llama(), BiasSteerConfig()).eval()

    with pytest.raises(ValueError, match="one adapter per row, got 2 for 3"):
        model(tokens, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(tokens, adapter_names=["default"] * 3)


def test_weights_that_do_not_fit_the_adapters(llama):
    model = get_peft_model(llama(), BiasSteerConfig())

    with pytest.raises(ValueError, match="one weight per adapter, got 2 weights for 1 adapters"):
        model.add_weighted_adapter(["default"], [1.0, 2.0], "sum")
