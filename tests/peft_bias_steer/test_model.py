import copy
import os
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from peft_bias_steer import BiasSteerConfig


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model.eval()(tokens, **kwargs).logits


@pytest.fixture
def steered(llama, set_vectors):
    model = get_peft_model(llama(), BiasSteerConfig())
    set_vectors(model)
    return model


def test_a_new_adapter_is_the_base_model(llama, tokens):
    model = get_peft_model(llama(), BiasSteerConfig())

    assert torch.equal(logits(model, tokens), logits(llama(), tokens))
    assert model.get_nb_trainable_parameters()[0] == 3 * 32
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_every_layer_output_is_moved_by_its_vector(llama, tokens, set_vectors, add_by_plain_hooks):
    base = llama()
    base(tokens, output_hidden_states=True)  # transformers hangs its recording hooks on the layers at the first use
    model = get_peft_model(base, BiasSteerConfig())
    oracle = llama()
    add_by_plain_hooks(oracle.model.layers, set_vectors(model))

    output = model(tokens, output_hidden_states=True)
    expected = oracle(tokens, output_hidden_states=True)

    assert torch.equal(output.logits, expected.logits)
    assert len(output.hidden_states) == 4
    for hidden, by_hand in zip(output.hidden_states, expected.hidden_states):
        assert torch.equal(hidden, by_hand)


def test_base_parameters_keep_their_names_and_are_frozen(llama, steered):
    names = {name for name, _ in llama().named_parameters()}
    inside = dict(steered.get_base_model().named_parameters())

    assert names < set(inside)
    assert {name for name, p in inside.items() if p.requires_grad} == set(inside) - names
    assert all(".bias_steer.bias_steer_vector.default.weight" in name for name in set(inside) - names)


def test_disabled_adapter_is_the_base_model(llama, steered, tokens):
    with steered.disable_adapter():
        assert torch.equal(logits(steered, tokens), logits(llama(), tokens))
    assert not torch.equal(logits(steered, tokens), logits(llama(), tokens))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapter_gives_the_same_logits(llama, steered, tokens, tmp_path, low_cpu_mem_usage):
    steered.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    assert torch.equal(logits(loaded, tokens), logits(steered, tokens))
    assert set(os.listdir(tmp_path)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert list(weights) == [
        f"base_model.model.model.layers.{i}.bias_steer.bias_steer_vector.weight" for i in range(3)
    ]


def test_auto_class_loads_base_and_adapter(tiny_language_model, tmp_path, set_vectors, tokens):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    model = get_peft_model(base, BiasSteerConfig(task_type="CAUSAL_LM"))
    set_vectors(model)
    model.save_pretrained(tmp_path)

    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path), tokens), logits(model, tokens))


def test_adapters_are_added_switched_and_deleted(llama, tokens, set_vectors):
    model = get_peft_model(llama(), BiasSteerConfig(), adapter_name="first")
    model.add_adapter("second", BiasSteerConfig(layers_to_transform=[0]))
    set_vectors(model, "first")
    set_vectors(model, "second")
    first = logits(model, tokens)
    model.set_adapter("second")
    second = logits(model, tokens)
    model.base_model.set_adapter(["first", "second"])
    both = logits(model, tokens)

    assert not torch.equal(first, second)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    model.set_adapter("first")
    assert torch.equal(logits(model, tokens), first)
    model.delete_adapter("first")
    assert model.active_adapters == ["second"] and torch.equal(logits(model, tokens), second)


def test_trainable_parameters_follow_the_active_adapter(llama):
    model = get_peft_model(llama(), BiasSteerConfig(), adapter_name="first")
    model.add_adapter("second", BiasSteerConfig())

    def trained():
        return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"first"}
    model.set_adapter("second")
    assert trained() == {"second"}


@pytest.mark.parametrize(
    ("indices", "steered_layers"), [(1, [1]), (-1, [2]), ([0, -1], [0, 2]), (range(2), [0, 1]), ([2, 2], [2])]
)
def test_layers_to_transform_takes_integers_negatives_and_ranges(llama, indices, steered_layers):
    model = get_peft_model(llama(), BiasSteerConfig(layers_to_transform=indices))

    assert list(model.base_model.steering_layers) == [f"model.layers.{i}" for i in steered_layers]


def test_the_same_config_object_can_be_used_twice(llama):
    config = BiasSteerConfig(layers_to_transform=[-1])
    model = get_peft_model(llama(), config)
    model.add_adapter("again", config)

    (layer,) = model.base_model.steering_layers.values()
    assert set(layer.bias_steer_vector) == {"default", "again"}


@pytest.mark.parametrize("target", ["down_proj", "q_proj"])
def test_linear_modules_can_be_steered(llama, tokens, set_vectors, add_by_plain_hooks, target):
    model = get_peft_model(llama(), BiasSteerConfig(target_modules=[target], layers_to_transform=[0, -1]))
    vectors = set_vectors(model)
    oracle = llama()
    modules = [module for name, module in oracle.named_modules() if name.endswith(target)]
    add_by_plain_hooks([modules[0], modules[2]], vectors)

    torch.testing.assert_close(logits(model, tokens), logits(oracle, tokens))


def test_conv1d_modules_can_be_steered(tokens, set_vectors, add_by_plain_hooks):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    oracle = copy.deepcopy(base)
    model = get_peft_model(base, BiasSteerConfig(target_modules=["c_attn"]))
    vectors = set_vectors(model)
    add_by_plain_hooks([block.attn.c_attn for block in oracle.transformer.h], vectors)

    assert [len(vector) for vector in vectors] == [96, 96]
    torch.testing.assert_close(logits(model, tokens), logits(oracle, tokens))


def test_excluded_modules_are_left_alone(llama):
    model = get_peft_model(llama(), BiasSteerConfig(exclude_modules=["layers.1"]))

    assert list(model.base_model.steering_layers) == ["model.layers.0", "model.layers.2"]


def test_copies_and_pickles_work_on_their_own(llama, steered, tokens):
    expected = logits(steered, tokens)
    clone = copy.deepcopy(steered)

    assert torch.equal(logits(clone, tokens), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(steered)), tokens), expected)
    assert torch.equal(logits(clone.unload(), tokens), logits(llama(), tokens))
    assert torch.equal(logits(steered, tokens), expected)


def test_unloading_gives_the_base_model_back(llama, steered, tokens):
    base = steered.unload()

    assert {name for name, _ in base.named_modules()} == {name for name, _ in llama().named_modules()}
    assert torch.equal(logits(base, tokens), logits(llama(), tokens))


def test_training_moves_the_vectors_and_nothing_else(llama, tokens):
    model = get_peft_model(llama(), BiasSteerConfig()).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[2] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".bias_steer_vector." in name}
