"""The three doors of a log-prob op, for those whose gradients are plain: a subclass says how to call its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _library, _memory
from . import _checks


class LogProbOp:
    """(log_prob, entropy or None) of `inputs`, which get gradients, and `constants`, which do not.

    A subclass sets `name` and the schemas of its arguments, and defines
        forward(backend, *inputs, *constants, *options, entropy) -> (log_prob, entropy or None, saved or None)
        backward(backend, needs, *inputs, *constants, *options, saved, d_log_prob, d_entropy) -> one gradient per input
        reference(*inputs, *constants, *options, entropy) -> (log_prob, entropy or None)
        saved_shape(*inputs, *constants, *options) -> shape of `saved`
    """

    name: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    options: str
    forward: Callable
    backward: Callable
    reference: Callable

    def __init__(self) -> None:
        tensors = ", ".join([*(f"Tensor {x}" for x in self.inputs), *(self._constant(x) for x in self.constants)])
        arguments = ", ".join(filter(None, [tensors, self.options, "bool entropy"]))
        self.n_inputs, self.n_tensors = len(self.inputs), len(self.inputs) + len(self.constants)
        self.constant_names = [name.rstrip("?") for name in self.constants]
        self.registered_backward = _library.define(
            f"{self.name}_backward",
            f"({arguments}, Tensor saved, Tensor? d_log_prob, Tensor? d_entropy) -> "
            + ("Tensor" if self.n_inputs == 1 else f"({', '.join(['Tensor'] * self.n_inputs)})"),
            self._backward_kernel,
            self._backward_fake,
        )
        self.registered = _library.define(
            self.name,
            f"({arguments}) -> (Tensor, Tensor, Tensor)",
            self._kernel,
            self._fake,
            self._setup_context,
            self._autograd,
        )

    @staticmethod
    def _constant(name: str) -> str:
        return f"Tensor? {name[:-1]}" if name.endswith("?") else f"Tensor {name}"

    def saved_shape(self, *args):
        return (0,)

    def check(self, *arguments: Any) -> None:
        """For the reference, what the bindings check for the kernels."""

    def __call__(self, tensors: tuple[Any, ...], options: tuple, entropy: bool):
        inputs = tensors[: self.n_inputs]
        _checks.constants(self.name, self.constant_names, tensors[self.n_inputs :])
        if torch.compiler.is_compiling():
            if not _backend.compiles_kernel(inputs[0]):
                return self.reference(*tensors, *options, entropy)
            log_prob, h, _ = self.registered(*tensors, *options, entropy)
            return log_prob, h if entropy else None
        backend = _checks.pick(self.name, *tensors)
        if backend is None or not backend.checks:
            self.check(*tensors, *options)
        if backend is None:
            return self.reference(*tensors, *options, entropy)
        if not _checks.needs_grad(*inputs):
            return self.forward(backend, *tensors, *options, entropy)[:2]
        return _Function.apply(self, backend, options, entropy, *tensors)

    # --- under torch.compile ------------------------------------------------------------------------------------------

    def _kernel(self, *args):
        backend = _checks.pick(self.name, *args[: self.n_tensors])
        if backend is not None:
            if not backend.checks:
                self.check(*args[:-1])
            log_prob, h, saved = self.forward(backend, *args)
        else:
            log_prob, h = self.reference(*args)
            h = h.clone() if h is not None else h  # outputs of an op must not share memory
            saved = log_prob.new_empty(self.saved_shape(*args[:-1]))
        absent = _library.placeholder
        return log_prob, absent(log_prob) if h is None else h, absent(log_prob) if saved is None else saved

    def _fake(self, *args):
        tensors, entropy = args[: self.n_tensors], args[-1]
        dtype, lead = _checks.compute_dtype(*tensors), tensors[0].shape[:-1]
        new = tensors[0].new_empty
        h = new(lead if entropy else 0, dtype=dtype)
        return new(lead, dtype=dtype), h, new(self.saved_shape(*args[:-1]), dtype=dtype)

    def _backward_kernel(self, *args):
        *args, entropy, saved, d_log_prob, d_entropy = args
        grads = (d_log_prob, d_entropy if entropy else None)
        tensors = args[: self.n_tensors]
        backend = _checks.pick(self.name, *tensors)
        if backend is not None:
            found = self.backward(backend, (True,) * self.n_inputs, *args, saved, *grads)
        else:
            rest = args[self.n_inputs :]
            found = _checks.detached_gradients(
                lambda *inputs: self.reference(*inputs, *rest, entropy), args[: self.n_inputs], grads
            )
        return found[0] if self.n_inputs == 1 else tuple(found)

    def _backward_fake(self, *args):
        found = tuple(x.new_empty(x.shape) for x in args[: self.n_inputs])
        return found[0] if self.n_inputs == 1 else found

    def _setup_context(self, ctx, inputs, output):
        ctx.save_for_backward(*inputs[: self.n_tensors], output[2])
        ctx.options = inputs[self.n_tensors :]
        ctx.mark_non_differentiable(output[2])

    def _autograd(self, ctx, d_log_prob, d_entropy, _):
        *tensors, saved = ctx.saved_tensors
        found = self.registered_backward(*tensors, *ctx.options, saved, d_log_prob, d_entropy)
        found = (found,) if self.n_inputs == 1 else found
        return *found, *([None] * (len(self.constants) + len(ctx.options)))


class _Function(torch.autograd.Function):
    """The second door."""

    @staticmethod
    def forward(ctx, op, backend, options, entropy, *tensors):
        log_prob, h, saved = op.forward(backend, *tensors, *options, entropy)
        ctx.save_for_backward(*tensors, saved)
        ctx.op, ctx.backend, ctx.options, ctx.entropy = op, backend, options, entropy
        ctx.set_materialize_grads(False)
        return log_prob, h

    @staticmethod
    def backward(ctx, d_log_prob, d_entropy):
        *tensors, saved = ctx.saved_tensors
        op, options, entropy = ctx.op, ctx.options, ctx.entropy
        n, grads = op.n_inputs, (d_log_prob, d_entropy)
        if d_log_prob is None and d_entropy is None:
            found = [None] * n
        elif torch.is_grad_enabled():  # create_graph: only the reference can be differentiated once more
            rest = tensors[n:]
            found = _checks.gradients_by_reference(
                lambda *inputs: op.reference(*inputs, *rest, *options, entropy), tensors[:n], grads
            )
        else:
            found = op.backward(ctx.backend, ctx.needs_input_grad[4 : 4 + n], *tensors, *options, saved, *grads)
        return None, None, None, None, *found, *([None] * len(op.constants))


def empty_results(entropy: bool, like: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """log_prob and entropy, one number per row of `like`, for a kernel to fill."""
    dtype, lead = _checks.compute_dtype(like, *others), like.shape[:-1]
    log_prob = _memory.empty(lead, dtype, like.device)
    return log_prob, _memory.empty(lead, dtype, like.device) if entropy else None


def empty_gradient(x: Tensor, needed: bool = True) -> Tensor | None:
    return _memory.empty_like(x) if needed else None
