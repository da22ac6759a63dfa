"""The second door: autograd around kernels whose gradients are already there when the forward returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Inputs = Sequence[Tensor | None]


class Call(Protocol):
    """One forward: its loss, and its gradients (None where none is wanted) until they are handed out."""

    loss: Tensor
    grads: list[Tensor | None] | None

    def recompute(self, inputs: Inputs) -> list[Tensor | None]:
        """The gradients once more, for a second backward over a retained graph."""
        ...

    def scale(self, grads: list[Tensor | None], grad_loss: Tensor) -> list[Tensor | None]:
        """`grads` times `grad_loss`, in their own memory."""
        ...

    def specification(self, *inputs: Tensor | None) -> Tensor:
        """The differentiable formula of the loss, for double backward."""
        ...


class _Precomputed(torch.autograd.Function):
    """A scalar loss whose gradients the forward kernel wrote, for a grad_output of 1."""

    @staticmethod
    def forward(ctx, call, *inputs):
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return call.loss

    @staticmethod
    def backward(ctx, grad_loss):
        inputs = ctx.saved_tensors  # raises where autograd would: freed graph, input changed in place
        call = ctx.call
        if torch.is_grad_enabled():  # create_graph: only the reference can be differentiated once more
            return (None, *differentiable(call.specification, inputs, grad_loss))
        # Handed out, not kept: autograd may take them over without a copy. Asked twice, they are computed twice.
        grads, call.grads = call.grads, None
        if grads is None:
            grads = call.recompute(inputs)
        return (None, *call.scale(grads, grad_loss))


# Function.apply without its search for functorch's wrappers, which _backend.pick has ruled out: a tenth of the forward.
_apply = super(torch.autograd.Function, _Precomputed).apply


def attach(call: Call, inputs: Inputs) -> Tensor:
    """`call.loss` with a backward that hands out `call.grads`."""
    return _apply(call, *inputs)


def differentiable(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Inputs, grad_outputs: Tensor | Inputs
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` that can be differentiated again; None for inputs that need none."""
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    grads = iter(torch.autograd.grad(function(*inputs), wanted, grad_outputs, create_graph=True, allow_unused=True))
    return [next(grads) if x is not None and x.requires_grad else None for x in inputs]
