"""Log-probability and entropy of a categorical distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _backend, _library, _memory, reference
from . import _checks

_OP = "categorical_log_prob"
IGNORED = -100  # among K labels a row, those that are left out


def categorical_log_prob(
    logits: Tensor,
    actions: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    action_mask: Tensor | None = None,
    ignore_index: int | None = None,
    entropy: bool = True,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of the action taken and entropy of softmax(logits / temperature), in one pass over the logits.

    Formula, with z = logits / temperature, p = softmax(z)::

        log_prob = z[action] - log Σ exp(z)        entropy = -Σ p·log p,  0·log 0 = 0

    Args:
        logits: [..., A], float32, float64, bfloat16 or float16, any strides (`logits[:, :-1]` is not copied). Gradient.
        actions: [...], any integer dtype, or floating with integral values; 0 <= action < A. Or [..., K], integer, K > 1:
            K labels a row (teacher's top tokens, candidates), whose log-probs come back as [..., K]; they are looked up after
            the one pass, and ignore_index leaves out single ones. (On a GPU one out of range gives 0, and nobody says so.)
        temperature: > 0, a number or a floating tensor [...] (one per row) or []; no gradient. Divides in the compute
            dtype, once, and shapes the entropy too.
        action_mask: [..., A], bool, integer or floating; where 0 the action has probability 0 and gets no gradient, and
            its logit is not used.
        ignore_index: rows with this action are not read and give log_prob 0, entropy 0 and gradient 0.
        entropy: False returns None in its place.
        inplace_backward: the backward writes the gradient over the logits, which saves memory of their size. They must
            be the result of an operation (not a leaf), and their elements must not share memory. Whoever else saved the
            logits for a backward that comes later gets torch's own error. Without effect under torch.compile.

    Returns:
        (log_prob, entropy): [...] ([..., K] and [...] for K labels), nats, float32 (float64 for float64 logits).

    Special rows: a logit of -inf is an action of probability 0; a row without any possible action gives 0, 0 and
    gradient 0; NaN or +inf in a logit that is not masked makes the row NaN.

    Gradient: d logits = (g_log_prob·(1[action] - p) - g_entropy·p·(log p + entropy))/temperature, in the dtype of the
    logits. Double backward goes through the reference.

    Errors: TypeError for a dtype; ValueError for a shape, a temperature <= 0, an action out of range, a constant that
    requires a gradient, or inplace_backward where it is not safe.

    Cost: forward reads the logits once; backward reads them once and writes the gradient once; 4 numbers a row are kept.
    A row's result has the same bits whatever else is in the batch, on any number of threads.
    """
    # [..., 1] is more often a mistake than one label: it is refused below, as everywhere
    many = isinstance(logits, Tensor) and isinstance(actions, Tensor) and logits.ndim == actions.ndim > 0
    many = many and actions.shape[-1] > 1
    temperature, rows = _temperature(temperature, logits, actions[..., 0] if many else actions)
    _checks.constants(_OP, ("actions", "temperature", "action_mask"), (actions, rows, action_mask))
    options = (action_mask, rows, temperature, ignore_index)
    if many:
        return _of_many(logits, actions, *options, entropy, inplace_backward)
    if torch.compiler.is_compiling():
        if not _backend.compiles_kernel(logits):
            return _reference(logits, actions, *options, entropy)
        log_prob, h, _ = _op(logits, actions, *options, entropy)
        return log_prob, h if entropy else None
    backend = _checks.pick(_OP, logits, actions, action_mask, rows)
    if backend is None or not backend.checks:
        _check(logits, actions, action_mask, rows)
    if backend is None:
        return _reference(logits, actions, *options, entropy)
    if not _checks.needs_grad(logits):
        return _forward(backend, logits, actions, *options, entropy)[:2]
    if inplace_backward:
        _check_inplace(backend, logits)
    return _Function.apply(backend, logits, actions, *options, entropy, inplace_backward)


def _of_many(logits, labels, action_mask, rows, temperature, ignore_index, entropy, inplace):
    """Of K labels a row. While compiling, the reference."""
    if labels.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"{_OP}: actions must be [...] or [..., K] with {list(logits.shape)}, got {list(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{_OP}: actions must be an integer type for K labels a row, got {str(labels.dtype)[6:]}")
    labels = labels.long()
    compiling = torch.compiler.is_compiling()
    backend = None if compiling else _checks.pick(_OP, logits, labels, action_mask, rows)
    if not compiling:
        _check(logits, labels[..., 0], action_mask, rows)
    wrong = (labels < 0) | (labels >= logits.shape[-1])
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if not compiling and labels.is_cpu and bool(wrong.any()):
        at = int(wrong.flatten().nonzero()[0])
        got = int(labels.flatten()[at])
        raise ValueError(f"{_OP}: actions must be in [0, {logits.shape[-1]}), got {got} at {at}")
    left_out = wrong if ignore_index is None else wrong | (labels == ignore_index)
    labels = labels.masked_fill(left_out, IGNORED)
    if backend is None:
        return _reference(logits, labels, action_mask, rows, temperature, IGNORED, entropy)
    if inplace:
        _check_inplace(backend, logits)
    from ._many_labels import look_up  # which builds on this module

    return look_up(backend, logits, labels, action_mask, rows, temperature, entropy, inplace)


def _temperature(temperature: float | Tensor, logits: Tensor, actions: Tensor) -> tuple[float, Tensor | None]:
    """As a number, or one per row."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature if temperature.ndim else temperature.expand(actions.shape)
    if not (isinstance(temperature, (int, float)) and temperature > 0 and temperature < math.inf):
        raise ValueError(f"{_OP}: temperature must be a finite number > 0 or a tensor, got {temperature!r}")
    return float(temperature), None


def _check(logits: Tensor, actions: Tensor, action_mask: Tensor | None, rows: Tensor | None) -> None:
    _checks.floating(_OP, logits=logits, temperature=rows)
    _checks.same_device(_OP, logits, actions=actions, action_mask=action_mask, temperature=rows)
    _checks.same_shape(_OP, logits.shape[:-1], "the shape of the rows", actions=actions, temperature=rows)
    _checks.same_shape(_OP, logits.shape, "the shape of logits", action_mask=action_mask)


def _check_inplace(backend: _backend.Backend, logits: Tensor) -> None:
    base = logits if logits._base is None else logits._base
    if logits.is_leaf or (base.is_leaf and base.requires_grad):
        raise ValueError(
            f"{_OP}: inplace_backward must not be used on a leaf that requires a gradient, or a view of one"
        )
    if backend.ops.has_overlap(logits.detach()):
        raise ValueError(f"{_OP}: inplace_backward must not be used on logits whose elements share memory")


def _reference(logits, actions, action_mask, rows, temperature, ignore_index, entropy):
    return reference.categorical_log_prob(
        logits, actions, temperature=temperature if rows is None else rows, action_mask=action_mask,
        ignore_index=ignore_index, entropy=entropy,
    )  # fmt: skip


def _forward(backend, logits, actions, action_mask, rows, temperature, ignore_index, entropy):
    """(log_prob, entropy or None, what the backward needs)."""
    dtype, lead = _checks.compute_dtype(logits), logits.shape[:-1]
    log_prob = _memory.empty(lead, dtype, logits.device)
    h = _memory.empty(lead, dtype, logits.device) if entropy else None
    saved = _memory.empty(torch.Size((2, log_prob.numel())), dtype, logits.device)
    backend.ops.categorical_log_prob(
        logits, actions, action_mask, rows, temperature, ignore_index, log_prob, h, saved, backend.resources()
    )
    return log_prob, h, saved


def _backward(
    backend, logits, actions, action_mask, rows, temperature, entropy, saved, d_log_prob, d_entropy, d_logits
):
    backend.ops.categorical_log_prob_backward(
        logits, actions, action_mask, rows, temperature, entropy, saved, d_log_prob, d_entropy, d_logits,
        backend.resources(),
    )  # fmt: skip
    return d_logits


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, actions, action_mask, rows, temperature, ignore_index, entropy, inplace):
        ctx.backend = backend
        log_prob, h, saved = _forward(backend, logits, actions, action_mask, rows, temperature, ignore_index, entropy)
        ctx.save_for_backward(logits, actions, action_mask, rows, h, saved)
        ctx.options = (temperature, ignore_index, entropy, inplace)
        ctx.set_materialize_grads(False)
        return log_prob, h

    @staticmethod
    def backward(ctx, d_log_prob, d_entropy):
        logits, actions, action_mask, rows, h, saved = ctx.saved_tensors
        temperature, ignore_index, entropy, inplace = ctx.options
        rest = (None,) * 7
        if d_log_prob is None and d_entropy is None:
            return None, None, *rest
        if torch.is_grad_enabled():  # create_graph: only the reference can be differentiated once more

            def specification(logits):
                return _reference(logits, actions, action_mask, rows, temperature, ignore_index, entropy)

            return None, *_checks.gradients_by_reference(specification, (logits,), (d_log_prob, d_entropy)), *rest
        if inplace:
            d_logits = logits.detach()
            torch.autograd.graph.increment_version(logits)
        else:
            d_logits = _memory.empty_like(logits)
        _backward(
            ctx.backend, logits, actions, action_mask, rows, temperature, h, saved, d_log_prob, d_entropy, d_logits
        )
        return None, d_logits, *rest


# --- under torch.compile ----------------------------------------------------------------------------------------------


def _kernel(logits, actions, action_mask, rows, temperature, ignore_index, entropy):
    backend = _checks.pick(_OP, logits, actions, action_mask, rows)
    if backend is not None:
        if not backend.checks:
            _check(logits, actions, action_mask, rows)
        log_prob, h, saved = _forward(backend, logits, actions, action_mask, rows, temperature, ignore_index, entropy)
    else:
        log_prob, h = _reference(logits, actions, action_mask, rows, temperature, ignore_index, entropy)
        saved = log_prob.new_empty((2, log_prob.numel()))
    return log_prob, _library.placeholder(log_prob) if h is None else h, saved


def _fake(logits, actions, action_mask, rows, temperature, ignore_index, entropy):
    dtype, lead = _checks.compute_dtype(logits), logits.shape[:-1]
    log_prob = logits.new_empty(lead, dtype=dtype)
    h = logits.new_empty(lead if entropy else 0, dtype=dtype)
    return log_prob, h, logits.new_empty((2, log_prob.numel()), dtype=dtype)


def _backward_kernel(
    logits, actions, action_mask, rows, temperature, ignore_index, entropy, h, saved, d_log_prob, d_entropy
):
    backend = _checks.pick(_OP, logits, actions, action_mask, rows)
    if backend is not None:
        d_logits = _memory.empty_like(logits)
        h, d_entropy = (h, d_entropy) if entropy else (None, None)
        return _backward(
            backend, logits, actions, action_mask, rows, temperature, h, saved, d_log_prob, d_entropy, d_logits
        )

    def specification(logits):
        return _reference(logits, actions, action_mask, rows, temperature, ignore_index, entropy)

    return _checks.detached_gradients(specification, (logits,), (d_log_prob, d_entropy if entropy else None))[0]


def _backward_fake(logits, *_):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, actions, action_mask, rows, *ctx.options = inputs
    ctx.save_for_backward(logits, actions, action_mask, rows, *output[1:])
    ctx.mark_non_differentiable(output[2])


def _autograd(ctx, d_log_prob, d_entropy, _):
    logits, actions, action_mask, rows, h, saved = ctx.saved_tensors
    d_logits = _backward_op(logits, actions, action_mask, rows, *ctx.options, h, saved, d_log_prob, d_entropy)
    return d_logits, *([None] * 6)


_INPUTS = (
    "Tensor logits, Tensor actions, Tensor? action_mask, Tensor? temperature_rows, float temperature, "
    "int? ignore_index, bool entropy"
)
_backward_op = _library.define(
    f"{_OP}_backward",
    f"({_INPUTS}, Tensor h, Tensor saved, Tensor? d_log_prob, Tensor? d_entropy) -> Tensor",
    _backward_kernel,
    _backward_fake,
)
_op = _library.define(_OP, f"({_INPUTS}) -> (Tensor, Tensor, Tensor)", _kernel, _fake, _setup_context, _autograd)
