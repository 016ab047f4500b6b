"""Memory in large pages: a tensor like any other."""

import subprocess
import sys
import weakref
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, large_pages, modeling_hierarchical_sae
from hf_hierarchical_sae.large_pages import empty_in_large_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_it_has_the_shape_and_dtype_asked_for_and_can_be_written(dtype):
    tensor = empty_in_large_pages(3, 5, dtype=dtype, device=torch.device("cpu")).zero_()

    assert tensor.shape == (3, 5) and tensor.dtype == dtype and tensor.is_contiguous()
    assert torch.equal(tensor, torch.zeros(3, 5, dtype=dtype))


def test_another_device_gets_memory_of_its_own():
    assert empty_in_large_pages(3, 5, dtype=torch.float32, device=torch.device("meta")).is_meta


@pytest.fixture(autouse=True)
def models_of_other_tests_do_not_count(monkeypatch):
    """Those in reference cycles, as a `Trainer` leaves them, live on for a while."""
    monkeypatch.setattr(large_pages, "_users", weakref.WeakSet())
    monkeypatch.setattr(large_pages, "_idle", defaultdict(deque))


class Model:
    """Any object: what memory is kept for."""


@pytest.fixture
def model():
    user = Model()
    large_pages.keep_pages_for(user)
    return user


def lend(rows=2000):
    return empty_in_large_pages(rows, 1024, dtype=torch.float32, device=torch.device("cpu"))


def test_memory_that_nothing_holds_is_used_again_by_another_shape_too(model):
    tensor = lend()
    where = tensor.data_ptr()
    del tensor
    again = lend(rows=1500)

    assert again.data_ptr() == where and again.shape == (1500, 1024)


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor[3:],
        lambda tensor: tensor.detach().T,
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: tensor.numpy()[::2],
        lambda tensor: numpy.asarray(tensor).view(numpy.int32),
        lambda tensor: memoryview(tensor.numpy()),
    ],
    ids=["view", "transpose", "storage", "array", "array of another type", "buffer"],
)
def test_memory_that_something_holds_is_never_lent_again(model, hold):
    tensor = lend().fill_(7)
    where = tensor.data_ptr()
    held = hold(tensor)
    del tensor
    others = [lend().zero_() for _ in range(3)]

    assert where not in [other.data_ptr() for other in others]
    del held
    assert lend().data_ptr() == where


def test_gradients_that_a_user_keeps_stay_as_they_are(model):
    weight = torch.zeros(2000, 1024, requires_grad=True)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return lend().copy_(grad) * 1

    Doubled.apply(weight).sum().backward()
    kept, weight.grad = weight.grad, None
    Doubled.apply(weight).sum().mul(3).backward()

    assert (kept == 1).all() and (weight.grad == 3).all()


def test_threads_never_share_memory(model):
    def work(number):
        for _ in range(20):
            tensor = lend().fill_(number)
            assert (tensor == number).all()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_the_last_model_takes_what_is_kept_with_it():
    models = [Model(), Model()]
    for user in models:
        large_pages.keep_pages_for(user)
    del user
    lend()
    del models[0]
    assert any(large_pages._idle.values())
    tensor = lend()
    del models[0]
    assert not any(large_pages._idle.values())
    del tensor
    assert not any(large_pages._idle.values())


def make_sae(**options):
    torch.manual_seed(0)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(**{"d_in": 32, "d_sae": 256, "k": 4, **options}))
    x = torch.randn(64, 32)
    sae.initialize_from_activations(x)
    return sae.train(), x


def train(sae, x, steps, accumulated=1):
    """The parameters after some steps, and the gradients of all of them, kept."""
    optimizer, gradients = torch.optim.SGD(sae.parameters(), lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        for part in x.chunk(accumulated):
            sae(part).loss.backward()
        gradients += [parameter.grad for parameter in sae.parameters()]
        optimizer.step()
    return [parameter.detach() for parameter in sae.parameters()], gradients


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder_chunk_size": 64},
        {"selection": "batch_topk", "budgets": [4]},
        {"matryoshka_prefixes": [64, 256]},
        {"aux_loss_coefficient": 0.1, "dead_after_tokens": 1},
    ],
    ids=["topk", "chunks", "batch_topk", "matryoshka", "auxiliary"],
)
@pytest.mark.parametrize("numba", [True, False], ids=["compiled", "torch"])
def test_training_in_memory_used_before_gives_the_same_bits(options, accumulated, numba, monkeypatch):
    if not numba:
        monkeypatch.setattr("hf_hierarchical_sae.hierarchical_topk.suits_numba", lambda *tensors: False)
        monkeypatch.setattr("hf_hierarchical_sae.sparse_latents.suits_numba", lambda *tensors: False)
    expected = train(*make_sae(**options), 4, accumulated)
    monkeypatch.setattr(large_pages, "LEAST_BYTES", 1)
    sae, x = make_sae(**options)
    train(*make_sae(**options), 2, accumulated)
    used = [memory for idle in large_pages._idle.values() for memory in idle]
    # NaN in every type.
    assert used and all(memory.fill(255) is None for memory in used)
    found = train(sae, x, 4, accumulated)

    for tensors, expected_tensors in zip(found, expected):
        assert all(map(torch.equal, tensors, expected_tensors))


def test_a_settled_step_takes_no_new_memory(monkeypatch):
    monkeypatch.setattr(large_pages, "LEAST_BYTES", 1)
    sae, x = make_sae()
    taken = []
    for _ in range(4):
        train(sae, x, 1)
        sae.zero_grad()
        taken.append({id(memory) for idle in large_pages._idle.values() for memory in idle})

    assert taken[0] and all(each == taken[0] for each in taken)


def test_a_batch_is_encoded_in_parts_with_the_gradients_of_the_whole(monkeypatch):
    (sae, x), (other, _) = make_sae(), make_sae()
    monkeypatch.setattr(modeling_hierarchical_sae, "PRE_ACTIVATIONS", 1)
    monkeypatch.setattr(modeling_hierarchical_sae, "TRAINING_TOKENS", 24)
    assert sae._tokens_at_a_time(x) == 24
    found = train(sae, x, 1)
    monkeypatch.undo()
    expected = train(other, x, 1)

    for tensors, expected_tensors in zip(found, expected):
        torch.testing.assert_close(tensors, expected_tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's")
def test_what_a_pass_frees_is_there_for_the_next():
    program = """
import resource, torch
from hf_hierarchical_sae.large_pages import keep_freed_memory

keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.ones(3 * 2**20) for _ in range(4)]
    del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(8)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, *_, before_last, last = map(int, done.stdout.split())

    # 48 MiB are 12,288 small pages; the heap takes a few rounds to grow.
    assert first > 1000 and max(before_last, last) < 100
