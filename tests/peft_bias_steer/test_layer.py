import pytest
import torch
from peft import BeftConfig, get_peft_model
from torch import nn

from peft_bias_steer import BiasSteerConfig, BiasSteerLayer
from peft_bias_steer.layer import Call, calling, in_a_call
from tests.peft_bias_steer.tiny_models import INPUT_IDS, make_base


class Returns(nn.Module):
    """A layer that returns whatever it is given, as decoder layers differ in what they return."""

    def forward(self, output):
        return output


@pytest.fixture
def steered():
    host = Returns()
    layer = BiasSteerLayer(host, size=8)
    for name in ["default", "other"]:
        layer.update_layer(name, BiasSteerConfig(init_weights=False))
    return host, layer


def test_hidden_states_are_steered_in_tensors_tuples_and_lists(steered):
    host, layer = steered
    hidden, cache = torch.randn(2, 3, 8), object()
    expected = hidden + layer.vector("default")

    assert torch.equal(host(hidden), expected)
    for container in (tuple, list):
        output = host(container([hidden, cache]))
        assert type(output) is container and output[1] is cache
        assert torch.equal(output[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_is_taken_in_float32(steered, dtype):
    host, layer = steered
    hidden = torch.randn(64, 3, 8).to(dtype)
    exact = (hidden.double() + layer.vector("default").double()).to(dtype)
    of_rounded = hidden + layer.vector("default").to(dtype)

    assert host(hidden).dtype == dtype
    assert torch.equal(host(hidden), exact)
    assert not torch.equal(of_rounded, exact)


def test_active_adapters_add_up(steered):
    host, layer = steered
    hidden = torch.randn(2, 3, 8)
    layer.set_adapter(["default", "other"])

    torch.testing.assert_close(host(hidden), hidden + layer.vector("default") + layer.vector("other"))


def test_scale_multiplies_the_vector(steered):
    host, layer = steered
    hidden = torch.randn(2, 3, 8)
    layer.set_scale("default", -0.5)

    torch.testing.assert_close(host(hidden), hidden - 0.5 * layer.vector("default"))
    layer.set_scale("default", 0.0)
    assert torch.equal(host(hidden), hidden)


def test_each_row_can_have_its_own_adapter(steered):
    host, layer = steered
    hidden = torch.randn(4, 3, 8)
    output = layer(hidden, adapter_names=["other", "__base__", "default", "absent"])

    torch.testing.assert_close(output[0], hidden[0] + layer.vector("other"))
    torch.testing.assert_close(output[2], hidden[2] + layer.vector("default"))
    assert torch.equal(output[[1, 3]], hidden[[1, 3]])


def test_rows_are_repeated_for_a_caller_that_says_so(steered):
    host, layer = steered
    hidden = torch.randn(6, 3, 8)
    with calling([layer], adapter_names=("other", "__base__"), may_repeat=True):
        output = host(hidden)

    torch.testing.assert_close(output[:3], hidden[:3] + layer.vector("other"))
    assert torch.equal(output[3:], hidden[3:])
    with calling([layer], adapter_names=("other", "__base__")), pytest.raises(ValueError, match="got 2 for 6"):
        host(hidden)
    with calling([layer], adapter_names=("other",) * 4, may_repeat=True), pytest.raises(ValueError, match="4 for 6"):
        host(hidden)


def test_a_call_ends_with_its_block(steered):
    host, layer = steered
    hidden = torch.randn(2, 3, 8)
    with calling([layer], disabled=True):
        with calling([layer], adapter_names=("other", "other")):
            assert host(hidden) is hidden
        assert layer.disable_adapters and not layer.disabled_for_all and in_a_call()

    assert layer.call == layer.latest_call == Call() and not in_a_call()
    assert torch.equal(host(hidden), hidden + layer.vector("default"))


def test_gradient_is_the_sum_over_tokens(steered):
    host, layer = steered
    weights = torch.randn(2, 3, 8)
    (host(torch.randn(2, 3, 8)) * weights).sum().backward()

    torch.testing.assert_close(layer.vector("default").grad, weights.sum((0, 1)))


def test_host_does_not_become_a_child_of_its_own_child(steered):
    host, layer = steered

    assert [name for name, _ in host.named_modules()] == [
        "",
        "bias_steer",
        "bias_steer.bias_steer_vector",
        "bias_steer.bias_steer_vector.default",
        "bias_steer.bias_steer_vector.other",
    ]


def test_detaching_leaves_no_trace(steered):
    host, layer = steered
    hidden = torch.randn(2, 3, 8)
    layer.detach_from_host()

    assert host(hidden) is hidden
    assert not list(host.children()) and not host._forward_hooks


def test_a_training_step_runs_the_operators_of_befts_step():
    def operators(config):
        model = get_peft_model(make_base(), config)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(input_ids=INPUT_IDS, labels=INPUT_IDS, use_cache=False).loss.backward()
        views = ("aten::view", "aten::reshape", "aten::flatten")
        return {row.key: row.count for row in profile.key_averages() if row.key.startswith("aten::")} | dict.fromkeys(
            views
        )

    ours = operators(BiasSteerConfig())

    assert ours["aten::mm"] > 20
    assert ours == operators(BeftConfig(target_modules=["down_proj"]))
