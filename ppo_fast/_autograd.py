"""The second door: autograd around kernels whose gradients are already there when the forward returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Gradients = Sequence[Tensor | None]


class _Precomputed(torch.autograd.Function):
    """A scalar loss whose gradients the forward kernel wrote, for a grad_output of 1."""

    @staticmethod
    def forward(ctx, loss, holder, *inputs):
        ctx.holder = holder
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad_loss):
        inputs = ctx.saved_tensors  # raises where autograd would: freed graph, input changed in place
        holder = ctx.holder
        if grad_loss is None:
            return (None, None, *(None for _ in inputs))
        if torch.is_grad_enabled():  # create_graph: only the reference can be differentiated once more
            return (None, None, *_differentiable(holder.reference, inputs, grad_loss))
        # Handed out, not kept: autograd may take them over without a copy. Asked twice, they are computed twice.
        grads, holder.grads = holder.grads, None
        if grads is None:
            grads = holder.recompute(*inputs)
        if grad_loss.item() != 1.0:
            grads = [None if g is None else g.mul_(grad_loss) for g in grads]
        return (None, None, *grads)


class _Holder:
    __slots__ = ("grads", "recompute", "reference")

    def __init__(self, grads: Gradients, recompute: Callable[..., Gradients], reference: Callable[..., Tensor]) -> None:
        self.grads: Gradients | None = grads
        self.recompute = recompute
        self.reference = reference


def _differentiable(function: Callable[..., Tensor], inputs: Gradients, grad_output: Tensor) -> list[Tensor | None]:
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    grads = iter(
        torch.autograd.grad(function(*inputs), wanted, grad_output, create_graph=True, allow_unused=True)
    )
    return [next(grads) if x is not None and x.requires_grad else None for x in inputs]


def attach(
    loss: Tensor,
    inputs: Gradients,
    grads: Gradients,
    recompute: Callable[..., Gradients],
    reference: Callable[..., Tensor],
) -> Tensor:
    """`loss` with a backward that hands out `grads` (one per input, None where none is wanted).

    recompute(*inputs) -> grads serves a second backward over a retained graph; reference(*inputs) -> loss is the
    differentiable formula that double backward needs.
    """
    return _Precomputed.apply(loss, _Holder(grads, recompute, reference), *inputs)
