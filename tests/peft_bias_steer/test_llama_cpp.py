"""Steering a llama.cpp model in this process, without llama.cpp; tests/peft_bias_steer/serving drives the real one."""

import ctypes
import sys
import types

import pytest
import torch

from peft_bias_steer.serving.llama_cpp import set_steering_vectors


class Llama:
    """Stands in for `llama_cpp.Llama`: four layers of width 8."""

    model = ctx = object()
    cache = None
    was_reset = False

    def n_embd(self) -> int:
        return 8

    def reset(self) -> None:
        self.was_reset = True


@pytest.fixture
def received(monkeypatch):
    """What the library was given: one list per call."""
    calls = []

    def set_adapter(context, pointer, count, width, first, last):
        calls.append((torch.tensor(pointer[:count]).view(-1, width), first, last))
        return 0

    library = types.SimpleNamespace(llama_model_n_layer=lambda model: 4, llama_set_adapter_cvec=set_adapter)
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    return calls


def test_rows_are_the_scaled_vectors_from_layer_one_on(received):
    llama = Llama()
    set_steering_vectors(llama, {0: torch.zeros(8), 1: torch.ones(8), 3: torch.full((8,), 2.0)}, scale=0.5)

    ((rows, first, last),) = received
    assert (first, last) == (1, 4)
    assert rows.mean(-1).tolist() == [0.5, 0.0, 1.0]
    assert llama.was_reset


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({1: torch.ones(7)}, r"shape \(8,\) for layer 1, got \(7,\)"),
        ({4: torch.ones(8)}, "layers 0 to 3, got one for layer 4"),
        ({0: torch.ones(8)}, "no vector for layer 0, but this one has norm 2.8"),
        ({3: torch.full((8,), torch.inf)}, "finite vectors, got NaN or infinity in that of layer 3"),
    ],
)
def test_vectors_that_llama_cpp_cannot_apply_are_refused(received, vectors, message):
    llama = Llama()

    with pytest.raises(ValueError, match=message):
        set_steering_vectors(llama, vectors)
    assert not received and not llama.was_reset


@pytest.mark.parametrize(
    "scale, error, message",
    [
        (float("nan"), ValueError, "scale must be a finite number, got nan"),
        (1e39, ValueError, "scale must be a finite number, got 1e\\+39"),
        (1e38, ValueError, "finite in float32 at scale 1e\\+38, got larger ones: lower it"),
        (True, TypeError, "scale must be a number, got True"),
        ("2", TypeError, "scale must be a number, got '2'"),
    ],
)
def test_scales_that_leave_nothing_finite_are_refused(received, scale, error, message):
    llama = Llama()

    with pytest.raises(error, match=message):
        set_steering_vectors(llama, {1: torch.full((8,), 10.0)}, scale)
    assert not received and not llama.was_reset


def test_a_cache_of_states_is_refused(received):
    llama = Llama()
    llama.cache = ctypes.c_int()

    with pytest.raises(ValueError, match="set_cache"):
        set_steering_vectors(llama, {1: torch.ones(8)})
