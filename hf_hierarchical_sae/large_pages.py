"""Memory that the operating system hands out in large pages."""

import numpy
import torch


def empty_in_large_pages(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """
    `torch.empty`, on CPU in memory of numpy's: it asks Linux for huge pages, torch does not, and a training step that
    gets small ones spends more of its time on page faults.
    """
    kind = {torch.float32: numpy.float32, torch.float64: numpy.float64}.get(dtype)
    if kind is None or device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(numpy.empty(shape, kind))
