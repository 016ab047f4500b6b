"""The compiled CPU form: its threads, what it checks, rows that are added up, and what runs without numba."""

import importlib.util

import pytest
import torch

from hf_hierarchical_sae import hierarchical_topk_numba
from hf_hierarchical_sae.hierarchical_topk import (
    choose_form,
    hierarchical_topk_loss,
    hierarchical_topk_loss_reference,
)


def make_inputs(batch, k, d_sae, d_in, *, dtype=torch.float64):
    indices = torch.rand(batch, d_sae).topk(k, dim=1).indices
    values = torch.rand(batch, k).sort(dim=1, descending=True).values
    tensors = (values, torch.randn(d_sae, d_in), torch.randn(d_in), torch.randn(batch, d_in))
    return indices, *[tensor.to(dtype).requires_grad_() for tensor in tensors]


def assert_equal_to_reference(inputs):
    # float32 sums of some dozen terms
    expected = hierarchical_topk_loss_reference(*inputs)
    loss = hierarchical_topk_loss(*inputs, backend="numba")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for gradient, other in zip(torch.autograd.grad(loss, inputs[1:]), torch.autograd.grad(expected, inputs[1:])):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_numba_form_is_the_same_with_more_threads(threads):
    inputs = make_inputs(9, 5, 20, 50, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal_to_reference(inputs)
    finally:
        torch.set_num_threads(before)


def test_numba_form_runs_where_no_folder_takes_its_cache(monkeypatch):
    def njit(cache=False, **options):
        def without_a_folder(function):
            if cache:
                raise RuntimeError(f"cannot cache function {function.__name__!r}: no locator available")
            return importlib.import_module("numba").njit(**options)(function)

        return without_a_folder

    monkeypatch.setattr(hierarchical_topk_numba, "njit", njit)
    assert hierarchical_topk_numba.compiled(lambda x: x + 1)(2) == 3


def test_numba_reconstruction_is_differentiable_like_that_of_torch():
    indices, *tensors = make_inputs(9, 5, 20, 50, dtype=torch.float32)
    gradients = {}
    for backend in ("torch", "numba"):
        errors, reconstruction = choose_form(backend)(indices, *tensors, (2, 5))
        gradients[backend] = torch.autograd.grad(errors.sum() + reconstruction.sin().sum(), tensors)

    for gradient, expected in zip(gradients["numba"], gradients["torch"]):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_dictionary_has_no_gradient_and_the_others_are_the_same(monkeypatch):
    indices, values, W_dec, b_dec, target = make_inputs(9, 5, 20, 50, dtype=torch.float32)
    wanted, rows = (values, b_dec, target), []
    expected = torch.autograd.grad(hierarchical_topk_loss_reference(indices, values, W_dec, b_dec, target), wanted)
    allocate = hierarchical_topk_numba.empty_in_large_pages
    monkeypatch.setattr(
        hierarchical_topk_numba,
        "empty_in_large_pages",
        lambda *shape, **options: rows.append(shape[0]) or allocate(*shape, **options),
    )

    loss = hierarchical_topk_loss(indices, values, W_dec.detach(), b_dec, target, backend="numba")
    gradients = torch.autograd.grad(loss, wanted)

    assert rows == [1]
    # float32 sums of some dozen terms
    for gradient, other in zip(gradients, expected):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)


def test_numba_takes_float32_only_and_checks_what_it_addresses():
    with pytest.raises(ValueError, match="backend='numba' needs float32 on cpu, got torch.float64"):
        hierarchical_topk_loss(*make_inputs(3, 4, 6, 2), backend="numba")
    indices, *tensors = make_inputs(3, 4, 6, 2, dtype=torch.float32)
    with pytest.raises(IndexError, match=r"\[0, d_sae=6\), got -1 to"):
        hierarchical_topk_loss(indices.index_fill(0, torch.tensor([0]), -1), *tensors, backend="numba")


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_added_up_where_indices_repeat(threads):
    indices, values, rows, total = torch.randint(4, (9, 5)), torch.randn(9, 5), torch.randn(9, 50), torch.randn(4, 50)
    expected = total.double()
    for token in range(9):
        for latent, value in zip(indices[token], values[token].double()):
            expected[latent] += value * rows[token].double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hierarchical_topk_numba.add_rows_numba(indices, values, rows, total)
    finally:
        torch.set_num_threads(before)

    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-5)


def test_without_numba_the_torch_form_runs_and_an_explicit_request_is_refused(monkeypatch):
    inputs = make_inputs(3, 4, 6, 2, dtype=torch.float32)
    expected = hierarchical_topk_loss(*inputs, backend="torch")
    monkeypatch.setattr(hierarchical_topk_numba, "njit", None)
    with pytest.raises(ImportError, match="pip install numba"):
        hierarchical_topk_loss(*inputs, backend="numba")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)

    assert torch.equal(hierarchical_topk_loss(*inputs), expected)
