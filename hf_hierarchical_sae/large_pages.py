"""Memory in large pages that a training step finds again in the next one."""

import math
import weakref
from collections import defaultdict, deque
from contextlib import suppress
from typing import Any

import numpy
import torch


# Smaller ones are left to the allocator, which neither maps them afresh nor asks for huge pages.
LEAST_BYTES = 2**22

# Just below the most that glibc goes by, 32 MiB.
FREED_BYTES = 2**25 - 2**16

# What is lent to nobody, by its size in bytes.
_idle: defaultdict[int, deque] = defaultdict(deque)
# For whom it is kept.
_users: weakref.WeakSet = weakref.WeakSet()


def keep_pages_for(user: Any) -> None:
    """From now on, memory of [`empty_in_large_pages`] that nothing refers to is used again, until `user` is gone."""
    keep_freed_memory()
    if user not in _users:
        # The latest is called first, so the set has forgotten the user by then.
        weakref.finalize(user, _drop_unless_used).atexit = False
        _users.add(user)


def keep_freed_memory() -> None:
    """
    Have glibc keep what a forward pass frees for the next one, where it would hand large blocks back to the system: once
    one of this size was freed, it keeps blocks of any smaller size (`M_MMAP_THRESHOLD` in mallopt(3)).
    """
    torch.empty(FREED_BYTES, dtype=torch.uint8)


def empty_in_large_pages(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """
    `torch.empty`, on CPU in memory of numpy's: it asks Linux for huge pages, torch does not, and a training step that
    gets small ones spends more of its time on page faults. While a model is there, see [`keep_pages_for`], the memory
    comes back for another tensor once nothing holds this one's storage, be it a view, a gradient or an array.
    """
    kind = {torch.float32: numpy.float32, torch.float64: numpy.float64}.get(dtype)
    if kind is None or device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES or not _users:
        return torch.from_numpy(numpy.empty(shape, kind))
    # Batches of other lengths find it as well, and evaluation what training used; what is not touched takes no memory.
    capacity = 1 << (size - 1).bit_length()
    memory = _idle_memory(capacity)
    if memory is None:
        memory = numpy.empty(capacity, numpy.uint8)
    lent = memory[:size].view(kind).reshape(shape)
    # The tensor's storage is all that refers to this array: views of it, in torch and numpy, refer to the storage.
    weakref.finalize(lent, _take_back, memory).atexit = False
    return torch.from_numpy(lent)


def _idle_memory(capacity: int) -> numpy.ndarray | None:
    for size in (capacity, 2 * capacity):
        # One call, so that of two threads only one gets it.
        with suppress(IndexError):
            return _idle[size].pop()
    return None


def _take_back(memory: numpy.ndarray) -> None:
    if _users:
        _idle[memory.size].append(memory)


def _drop_unless_used() -> None:
    if not _users:
        _idle.clear()
