"""What a user gets wrong is answered with what was expected, what came and what to do, and harms nothing."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
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


def without_a_vector(layer):
    def damage(file):
        save_file({key: value for key, value in load_file(file).items() if key != key_of(layer)}, file)

    return damage


def without_any_vector(file):
    save_file({}, file)


def with_more_than_its_config_says(file):
    config = file.parent / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "target_modules": r"model\.layers\.(0|2)"}))


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
        (without_a_vector(0), "the adapter's file holds no vector for model.layers.0: copy or save it again"),
        (without_a_vector(2), "the adapter's file holds no vector for model.layers.2: copy"),
        (without_any_vector, "no vector for model.layers.0, model.layers.1, model.layers.2: copy"),
        (with_more_than_its_config_says, "a vector for model.layers.1, which its config does not steer"),
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
        ({key_of(1): torch.ones(32)}, "the adapter's file holds no vector for model.layers.2"),
    ],
)
def test_a_state_dict_that_does_not_fit_overwrites_nothing(llama, saved, change, message):
    model = PeftModel.from_pretrained(llama(), saved)
    with refused(model, ValueError, message):
        set_peft_model_state_dict(model, {key_of(0): torch.ones(32), **change})


def test_a_missing_vector_of_a_pickled_adapter_is_named(llama, saved):
    weights = load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    torch.save({key: weights[key] for key in (key_of(0), key_of(2))}, saved / "adapter_model.bin")

    with pytest.raises(ValueError, match="no vector for model.layers.1"):
        PeftModel.from_pretrained(llama(), saved)


NAMES = [
    "v1.0",
    "__base__",
    "",
    " ",
    "items",
    "keys",
    "training",
    "forward",
    "_modules",
    "a/b",
    "..",
    "/absolute",
    "a\\b",
]
NAMES += ["a\nb", "a\0"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_mean_something_else_are_refused(llama, saved, name):
    base = llama()
    with refused(base, ValueError, "the name of an adapter must be printable, without dots and slashes"):
        get_peft_model(base, BiasSteerConfig(), adapter_name=name)
    with refused(base, ValueError, "the name of an adapter must be"):
        PeftModel.from_pretrained(base, saved, adapter_name=name)

    model = get_peft_model(base, BiasSteerConfig(layers_to_transform=[2]), adapter_name="v1")
    assert list(model.base_model.steering_layers) == ["model.layers.2"]
    for attempt in (
        lambda: model.add_adapter(name, BiasSteerConfig()),
        lambda: model.load_adapter(saved, name),
        lambda: model.add_weighted_adapter(["v1"], [1.0], name),
    ):
        with refused(model, ValueError, "the name of an adapter must be"):
            attempt()


@pytest.mark.parametrize("name", [1, None, b"a", ("a",)])
def test_names_that_are_no_strings_are_refused(llama, name):
    base = llama()
    with refused(base, TypeError, "the name of an adapter must be a string, got"):
        inject_adapter_in_model(BiasSteerConfig(), base, name)
    with refused(base, TypeError, "string"):
        get_peft_model(base, BiasSteerConfig(), adapter_name=name)


@pytest.mark.parametrize(
    "name", ["weight", "bias_steer", "bias_steer_vector", "steer", "model", "layers", "0", "a b", "ä"]
)
def test_other_names_survive_saving_and_loading(llama, tokens, set_vectors, tmp_path, name):
    model = get_peft_model(llama(), BiasSteerConfig(), adapter_name=name).eval()
    vectors = set_vectors(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / name, adapter_name=name)

    layers = loaded.base_model.steering_layers.values()
    assert all(torch.equal(layer.vector(name), vector) for layer, vector in zip(layers, vectors))


def test_a_bad_module_to_save_among_good_ones_leaves_nothing_behind(llama):
    base = llama()
    config = BiasSteerConfig(modules_to_save=["lm_head", "self_attn"], exclude_modules=["norm"])
    base.model.layers[2].self_attn.forward = None
    del base.model.layers[2].self_attn
    base.model.layers[2].self_attn = torch.nn.ModuleDict()
    with refused(base, TypeError, "modules_to_save cannot be applied to modules of type"):
        get_peft_model(base, config)

    model = get_peft_model(base, BiasSteerConfig(modules_to_save=["lm_head"]))
    with refused(model, TypeError, "modules_to_save cannot be applied"):
        model.add_adapter("other", config)


@pytest.mark.parametrize(
    "scale", [float("nan"), float("inf"), -float("inf"), 3.5e38, np.float32("nan"), torch.tensor(torch.inf)]
)
def test_scales_and_weights_that_are_not_finite(llama, scale):
    model = get_peft_model(llama(), BiasSteerConfig())
    with refused(model, ValueError, "must be a finite number, got"):
        model.set_scale("default", scale)
    with refused(model, ValueError, "the weight of 'default' must be a finite number, got"):
        model.add_weighted_adapter(["default"], [scale], "sum")


@pytest.mark.parametrize("scale", [True, "1", None, np.True_, torch.tensor(True), 1j, [1.0], torch.ones(2)])
def test_scales_and_weights_that_are_no_numbers(llama, scale):
    model = get_peft_model(llama(), BiasSteerConfig())
    with refused(model, TypeError, "must be a number, got"):
        model.set_scale("default", scale)
    with refused(model, TypeError, "the weight of 'default' must be a number, got"):
        model.add_weighted_adapter(["default"], [scale], "sum")


def test_scales_of_any_library_are_numbers(llama):
    model = get_peft_model(llama(), BiasSteerConfig())
    for scale in (np.float32(0.5), torch.tensor(0.5), 0.5):
        model.set_scale("default", scale)
        assert all(type(x.scale("default")) is float for x in model.base_model.steering_layers.values())


def test_adapters_that_do_not_exist_are_neither_active_nor_merged(llama):
    model = get_peft_model(llama(), BiasSteerConfig())
    for attempt in (
        lambda: model.base_model.set_adapter(["default", "typo"]),
        lambda: model.merge_adapter(["typo"]),
        lambda: model.merge_and_unload(adapter_names=["typo"]),
    ):
        with refused(model, ValueError, r"\['typo'\] do not exist"):
            attempt()
    with refused(model, ValueError, "one weight per adapter, got 0 weights for 0 adapters"):
        model.add_weighted_adapter([], [], "none")


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
    with pytest.raises(
        ValueError, match="Length of `adapter_names` should be the same as the number of inputs, but got"
    ):
        model(tokens, adapter_names=["default"])
    with pytest.raises(TypeError, match="adapter_names must be a list with one name for each row, got 'default'"):
        model(tokens, adapter_names="default")
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(tokens, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters, please call"):
        model(tokens, adapter_names=["default"] * 3)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_names_for_half_of_a_batch_are_not_repeated(llama, task_type):
    model = get_peft_model(llama(), BiasSteerConfig(task_type=task_type)).eval()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="expected one adapter per row, got 2 for 4"):
            call(input_ids=torch.ones(4, 3, dtype=torch.long), adapter_names=["default", "__base__"])


def test_weights_that_do_not_fit_the_adapters(llama):
    model = get_peft_model(llama(), BiasSteerConfig())

    with pytest.raises(ValueError, match="one weight per adapter, got 2 weights for 1 adapters"):
        model.add_weighted_adapter(["default"], [1.0, 2.0], "sum")
