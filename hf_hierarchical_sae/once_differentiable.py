"""A backward pass written by hand, of which there is no derivative: asking for one is an error, never a missing term."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


ERROR = (
    "the hand-written gradients of HierarchicalSaeModel have no derivative of their own: a penalty on a gradient, or anything "
    "else of second order, cannot be trained through it"
)


class _Refusing(torch.autograd.Function):
    """The first `count` tensors, with an error in the place of the gradient of any of them all."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # No views: a gradient is changed in place on its way.
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(ERROR)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """
    For the `backward` of a `torch.autograd.Function`. torch's decorator of this name looks at the incoming gradients alone:
    where these are constants, the part of a second derivative that comes through what `forward` has saved is left out without
    a word.

    Raises:
        `RuntimeError`: When gradients are taken of the gradients.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not torch.is_grad_enabled():
            return outputs
        sources = [one for one in (*grads, *ctx.saved_tensors) if one is not None and one.requires_grad]
        found = [one for one in outputs if one is not None]
        refused = iter(_Refusing.apply(len(found), *found, *sources))
        return tuple(None if one is None else next(refused) for one in outputs)

    return once
