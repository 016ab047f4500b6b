"""The loss: the reference against a hand-written loop, every other form against the reference."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_hierarchical_sae.hierarchical_topk import (
    choose_form,
    hierarchical_topk_loss,
    hierarchical_topk_loss_reference,
)


def make_inputs(batch, k, d_sae, d_in, *, dtype=torch.float64, distinct=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        indices = torch.rand(batch, d_sae, generator=generator).topk(k, dim=1).indices
    else:
        indices = torch.randint(d_sae, (batch, k), generator=generator)
    values = torch.rand(batch, k, generator=generator).sort(dim=1, descending=True).values
    W_dec, b_dec = torch.randn(d_sae, d_in, generator=generator), torch.randn(d_in, generator=generator)
    target = torch.randn(batch, d_in, generator=generator)
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (values, W_dec, b_dec, target)]
    return indices, *tensors


def value_and_gradients(function, inputs, **options):
    indices, *tensors = inputs
    loss = function(indices, *tensors, **options)
    return loss, torch.autograd.grad(loss, tensors)


def assert_equal_to_reference(inputs, *, rtol=1e-9, atol=1e-12, backend="torch", **options):
    expected, expected_gradients = value_and_gradients(hierarchical_topk_loss_reference, inputs, **options)
    loss, gradients = value_and_gradients(hierarchical_topk_loss, inputs, backend=backend, **options)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=atol)
    for gradient, other in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "budgets, weights", [(None, None), ((1, 3), None), ((4,), None), ((1, 2, 4), (3.0, 0.0, 1.0))]
)
def test_reference_matches_a_loop_over_tokens_and_budgets(budgets, weights):
    indices, values, W_dec, b_dec, target = make_inputs(3, 4, 7, 5)
    chosen = budgets or range(1, 5)
    shares = [weight / sum(weights) for weight in weights] if weights else [1 / len(chosen)] * len(chosen)
    expected = 0.0
    for token in range(3):
        for budget, share in zip(chosen, shares):
            reconstruction = b_dec.clone()
            for j in range(budget):
                reconstruction = reconstruction + values[token, j] * W_dec[indices[token, j]]
            expected += share * (reconstruction - target[token]).square().mean().item() / 3

    loss = hierarchical_topk_loss_reference(
        indices, values, W_dec, b_dec, target, budgets=budgets, budget_weights=weights
    )

    assert loss.item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_value_and_every_gradient_equal_the_reference_at_any_size(data):
    batch, d_sae, d_in = (data.draw(st.integers(1, 9)) for _ in range(3))
    k = data.draw(st.integers(1, d_sae))
    budgets = data.draw(st.none() | st.sets(st.integers(1, k), min_size=1).map(sorted))
    weight = st.lists(st.floats(0.1, 10), min_size=len(budgets or range(k)), max_size=len(budgets or range(k)))
    weights = data.draw(st.none() | weight)
    inputs = make_inputs(
        batch, k, d_sae, d_in, distinct=data.draw(st.booleans()), seed=data.draw(st.integers(0, 1000))
    )

    assert_equal_to_reference(inputs, budgets=budgets, budget_weights=weights)


# numba takes float32 only: sums of up to 40 terms in another order.
FORMS = {
    "torch": {"backend": "torch", "rtol": 1e-9, "atol": 1e-12},
    "numba": {"backend": "numba", "rtol": 1e-4, "atol": 1e-5},
}
forms = pytest.mark.parametrize("form", FORMS)


def dtype_of(form):
    return torch.float32 if form == "numba" else torch.float64


@forms
@pytest.mark.parametrize("batch, k, d_sae", [(1, 1, 1), (1, 6, 6), (5, 6, 6), (17, 3, 33), (1100, 3, 9)])
def test_edge_sizes_equal_the_reference(batch, k, d_sae, form):
    assert_equal_to_reference(make_inputs(batch, k, d_sae, 5, dtype=dtype_of(form)), **FORMS[form])


@forms
def test_repeated_indices_add_up(form):
    indices, *tensors = make_inputs(4, 5, 3, 6, dtype=dtype_of(form), distinct=False)
    indices[0] = 2

    assert_equal_to_reference((indices, *tensors), **FORMS[form])


@forms
def test_zero_values_equal_the_reference(form):
    indices, values, *rest = make_inputs(4, 5, 9, 6, dtype=dtype_of(form))
    values = values.detach().clone()
    values[:, 2:] = 0

    assert_equal_to_reference((indices, values.requires_grad_(), *rest), **FORMS[form])


@forms
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_indices_of_any_integer_type_give_the_same_loss(dtype, form):
    indices, *tensors = make_inputs(4, 5, 9, 6, dtype=dtype_of(form))

    loss = hierarchical_topk_loss(indices.to(dtype), *tensors, backend=form)

    assert torch.equal(loss, hierarchical_topk_loss(indices, *tensors, backend=form))


def test_gradients_and_reconstruction_pass_gradcheck():
    indices, *tensors = make_inputs(3, 4, 6, 2, distinct=False)

    assert torch.autograd.gradcheck(lambda *given: choose_form("torch")(indices, *given, (1, 3, 4)), tensors)


def test_backward_twice_gives_the_same_gradient():
    indices, *tensors = make_inputs(3, 4, 6, 2)
    loss = hierarchical_topk_loss(indices, *tensors)

    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)

    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_a_single_budget_is_the_plain_topk_loss():
    indices, values, W_dec, b_dec, target = make_inputs(6, 4, 11, 5)
    reconstruction = (values.unsqueeze(-1) * W_dec[indices]).sum(dim=1) + b_dec

    loss = hierarchical_topk_loss(indices, values, W_dec, b_dec, target, budgets=(4,))

    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(reconstruction, target))


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("kind", [torch.tensor, numpy.array, tuple, iter])
def test_budgets_of_any_integer_kind_give_the_same_loss(kind, backend):
    inputs = make_inputs(5, 4, 9, 6, dtype=torch.float32)

    loss = hierarchical_topk_loss(*inputs, budgets=kind([1, 2, 4]), backend=backend)

    assert loss > 0 and torch.equal(loss, hierarchical_topk_loss(*inputs, budgets=[1, 2, 4], backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_accumulate_in_float32(dtype):
    inputs = make_inputs(6, 8, 40, 24, dtype=dtype)

    # The same float32 sums in another order; gradients are rounded once, to the input's precision.
    assert_equal_to_reference(inputs, rtol=max(2e-5, 2 * torch.finfo(dtype).eps), atol=1e-5)
    assert hierarchical_topk_loss(*inputs).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_numba_form_equals_the_reference_at_any_size(data):
    batch, d_sae, d_in = (data.draw(st.integers(1, 40)) for _ in range(3))
    k = data.draw(st.integers(1, d_sae))
    budgets = data.draw(st.none() | st.sets(st.integers(1, k), min_size=1).map(sorted))
    inputs = make_inputs(batch, k, d_sae, d_in, dtype=torch.float32, distinct=data.draw(st.booleans()))

    assert_equal_to_reference(inputs, budgets=budgets, **FORMS["numba"])


@pytest.mark.parametrize("dtype, form", [(torch.float32, "Numba"), (torch.float64, "HierarchicalTopKBackward")])
def test_auto_takes_numba_for_float32_on_cpu(dtype, form):
    inputs = make_inputs(3, 4, 6, 2, dtype=dtype)

    errors, _ = choose_form("auto", *inputs[1:])(*inputs, (4,))

    assert form in type(errors.grad_fn).__name__


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_saved_for_backward_does_not_grow_with_k(backend):
    def saved_bytes(k):
        total = []
        pack = torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t)
        indices, values, W_dec, b_dec, target = make_inputs(32, k, 64, 48, dtype=torch.float32)
        with pack:
            hierarchical_topk_loss(indices, values, W_dec, b_dec, target, backend=backend)
        return sum(total) - indices.nbytes - values.nbytes

    # Twice as many latents, each with an index and a value: what is left is the residual and the dictionary. The
    # small rest is the vector of budget weights.
    assert abs(saved_bytes(64) - saved_bytes(32)) <= 32 * 16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"budgets": (2, 2)}, r"budgets must be strictly increasing integers in \[1, 4\], got \[2, 2\]"),
        ({"budgets": (5,)}, r"in \[1, 4\], got \[5\]"),
        ({"budgets": (0, 1)}, "strictly increasing"),
        ({"budgets": ()}, "strictly increasing"),
        ({"budgets": (3, 1)}, "strictly increasing"),
        ({"budgets": torch.tensor([2, 2])}, "strictly increasing"),
        ({"budgets": torch.tensor([True, True])}, "budgets must be integers, got"),
        ({"budgets": (True, 2)}, "budgets must be integers, got"),
        ({"budgets": (1.0, 2.5)}, "budgets must be integers, got"),
        ({"budgets": numpy.array([1.0, 2.0])}, "budgets must be integers, got"),
        ({"budgets": 3}, "budgets must be integers, got"),
        ({"budgets": (1, 2), "budget_weights": (1.0,)}, r"one weight per budget \(2\), got 1"),
        ({"budgets": (1, 2), "budget_weights": (0.0, 0.0)}, "not all zero"),
        ({"budgets": (1, 2), "budget_weights": 0.5}, r"one weight per budget \(2\), got shape \(\)"),
        ({"budgets": (1, 2), "budget_weights": torch.ones(2, 1)}, r"one weight per budget \(2\), got shape \(2, 1\)"),
        ({"budgets": (1, 2), "budget_weights": (1.0, float("nan"))}, "finite, not negative"),
        ({"backend": "cuda"}, "backend must be"),
    ],
)
def test_options_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        hierarchical_topk_loss(*make_inputs(3, 4, 6, 2), **change)


@pytest.mark.parametrize("position, shape", [(0, (3, 5)), (1, (2, 4)), (2, (6, 3)), (3, (3,)), (4, (4, 2))])
def test_shapes_that_do_not_fit_are_refused(position, shape):
    inputs = list(make_inputs(3, 4, 6, 2))
    inputs[position] = torch.zeros(shape, dtype=inputs[position].dtype)

    with pytest.raises(ValueError, match="expected t"):
        hierarchical_topk_loss(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_indices_that_are_no_integers_are_refused(dtype, backend):
    indices, *rest = make_inputs(3, 4, 6, 2, dtype=torch.float32)

    with pytest.raises(ValueError, match=f"top_indices must be integers, got {dtype}"):
        hierarchical_topk_loss(indices.to(dtype), *rest, backend=backend)


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array, tuple])
def test_weights_of_any_kind_give_the_same_loss(kind):
    inputs = make_inputs(3, 4, 6, 2)

    loss = hierarchical_topk_loss(*inputs, budgets=[1, 4], budget_weights=kind([1.0, 3.0]))

    assert torch.equal(loss, hierarchical_topk_loss(*inputs, budgets=[1, 4], budget_weights=[1.0, 3.0]))


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        hierarchical_topk_loss(*make_inputs(0, 4, 6, 2))
