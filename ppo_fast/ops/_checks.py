"""What the log-prob ops share in Python: checks, options and the way through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from .._autograd import differentiable
from ._loss import compute_dtype, constants

__all__ = [
    "compute_dtype", "constants", "detached_gradients", "floating", "gradients_by_reference", "needs_grad", "pick",
    "same_device", "same_shape",
]  # fmt: skip


def pick(op: str, first: Tensor, *others: Tensor | None) -> _backend.Backend | None:
    """Whose kernels run the call: nobody's if any of its tensors is one that only torch understands."""
    backend = _backend.pick(op, first)
    for x in others:
        if x is not None and not _backend.is_plain(op, x):
            return None
    return backend


def needs_grad(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def same_shape(op: str, shape: torch.Size, like: str, **tensors: Tensor | None) -> None:
    """This and the next two, for the reference and for Triton: what the C++ bindings check for their kernels."""
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if x.shape != shape:
            raise ValueError(f"{op}: {name} must be {like} = {list(shape)}, got {list(x.shape)}")


def floating(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            wanted = "float32, float64, bfloat16 or float16"
            raise TypeError(f"{op}: {name} must be {wanted}, got {str(x.dtype).removeprefix('torch.')}")


def same_device(op: str, first: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and x.device != first.device:
            raise TypeError(f"{op}: {name} must be on {first.device} as the rest, got {x.device}")


def gradients_by_reference(function, inputs, grad_outputs) -> list[Tensor | None]:
    """Gradients of `inputs` that can be differentiated again; function(*inputs) -> outputs, as many as grad_outputs."""
    used = [i for i, g in enumerate(grad_outputs) if g is not None]

    def outputs(*inputs):
        found = function(*inputs)
        return [found[i] for i in used]

    return differentiable(outputs, inputs, [grad_outputs[i] for i in used])


def detached_gradients(function, inputs, grad_outputs) -> list[Tensor]:
    """The same as numbers, zeros where a gradient does not reach: the registered backward where no kernel runs."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        grads = gradients_by_reference(function, leaves, grad_outputs)
    return [torch.zeros_like(x) if g is None else g.detach() for x, g in zip(inputs, grads, strict=True)]
