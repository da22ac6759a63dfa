"""Log-probability of tokens from the hidden states, without the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _library, reference
from . import _checks, _linear

_OP = "linear_log_prob"
_PARTS = 3  # of logits_memory: all but one are for the first chunk, which stays until the backward; the rest take turns


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    entropy: bool = True,
    group: Any = None,
    logits_memory: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of the targets and entropy of softmax(logits / temperature), logits = hidden·Wᵀ + bias, a chunk of
    tokens at a time: the logits [M, V] never exist.

    Formula, with z = cap·tanh(logits/cap)/temperature (without softcap: logits/temperature), p = softmax(z)::

        log_prob = z[target] - log Σ exp(z)        entropy = -Σ p·log p

    Args:
        hidden: [..., H], float32, float64, bfloat16 or float16. Gradient.
        weight: [V, H], the head. Gradient; a frozen one costs no product. The product runs in the wider of both dtypes
            (a float32 head stays one), under autocast in its dtype. LoRA'd: pass W + scale·B@A, whose gradient autograd
            carries on to A and B. A padded vocabulary: pass weight[:V].
        targets: [...], any integer dtype, 0 <= target < V.
        bias: [V]. Gradient.
        temperature: > 0, a number or a floating tensor [...] (one a token) or []; no gradient. Divides in float32, after
            the softcap. A logit scale is 1/temperature.
        softcap: c > 0: logits become c·tanh(logits/c).
        ignore_index: tokens with this target give 0, 0 and no gradient, and what their hidden states hold reaches nothing.
            On a CPU they cost nothing.
        entropy: False returns None in its place.
        group: a process group over which the vocabulary is sharded: `weight` (and bias) are this rank's [V/ranks, H] in
            the order of ranks, targets are of the whole vocabulary, results and d_hidden are the same on every rank.
            One collective a chunk, and one for d_hidden.
        logits_memory: bytes of logits alive at a time; default 192 MiB on a CPU, 1 GiB elsewhere. What fits is kept for the
            backward, the rest computed again.

    Returns:
        (log_prob, entropy): [...], nats, float32 (float64 for a float64 product).

    Gradient: as of categorical_log_prob, then d_hidden = d_logits·W, dW = d_logitsᵀ·hidden, summed over chunks in float32
    at least, in a fixed order. Double backward goes through the reference, which has all logits.

    Errors: TypeError for a dtype; ValueError for a shape, a temperature or softcap <= 0, a target outside the vocabulary
    (on a GPU in a later call), logits_memory <= 0.

    Under torch.compile nothing is kept for the backward, and `group` is refused.

    Cost: forward 2·M·H·V FLOPs, backward 4·M·H·V (without dW half) and 2·M·H·V times the share of logits that did not fit;
    tokens whose gradient is 0 are left out on a CPU. Memory: logits_memory, and dW in float32.
    """
    _linear.check(_OP, hidden, weight, targets, bias, temperature, softcap, group, logits_memory)
    _checks.constants(
        _OP, ("targets", "temperature"), (targets, temperature if isinstance(temperature, Tensor) else None)
    )
    options = (temperature, softcap, ignore_index, entropy)
    if torch.compiler.is_compiling():
        if not _backend.compiles_kernel(hidden):
            return _reference(hidden, weight, targets, bias, *options)
        number, rows = _linear.compiled_temperature(_OP, temperature, targets, group)
        log_prob, h = _op(hidden, weight, targets, bias, rows, number, softcap, ignore_index, entropy, logits_memory)
        return log_prob, h if entropy else None
    backend = _linear.pick(_OP, hidden, weight, targets, bias)
    if backend is None:
        return _reference(hidden, weight, targets, bias, *options)
    head = _linear.Head(
        _OP, hidden.detach(), weight.detach(), targets, None if bias is None else bias.detach(), temperature, softcap,
        ignore_index, None, group, logits_memory,
    )  # fmt: skip
    if not _checks.needs_grad(hidden, weight, *([] if bias is None else [bias])):
        return _forward(backend, head, entropy, False)[:2]
    return _Function.apply(backend, head, options, targets, hidden, weight, bias)


def _reference(hidden, weight, targets, bias, temperature, softcap, ignore_index, entropy):
    return reference.linear_log_prob(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        entropy=entropy,
    )  # fmt: skip


def _forward(backend, head: _linear.Head, entropy: bool, keep: bool):
    """(log_prob, entropy or None, chunks): the first and the last with their logits."""
    dtype = torch.float64 if head.dtype is torch.float64 else torch.float32
    log_prob = torch.zeros(head.n, dtype=dtype, device=head.hidden.device)
    h = torch.zeros_like(log_prob) if entropy else None
    chunks: list[_linear.Chunk] = []
    size = head.chunk_rows(1 / _PARTS if keep else 0.5)
    blocks = list(head.blocks(size, first=(_PARTS - 1) * size if keep else size))
    buffer = None
    for i, rows in enumerate(blocks):
        live, length = head.live(rows), rows.stop - rows.start
        if buffer is None or (keep and i == 1):  # the first chunk keeps its own
            buffer = torch.empty((length, head.vocabulary), dtype=head.dtype, device=head.hidden.device)
        chunk = head.forward(backend, live, buffer, entropy)
        log_prob[live] = chunk.log_prob
        if h is not None:
            h[live] = chunk.entropy  # type: ignore[assignment]
        if keep:
            written_over = 0 < i < len(blocks) - 1
            chunks.append(chunk._replace(logits=None) if written_over else chunk)
    return log_prob.view(head.lead), None if h is None else h.view(head.lead), chunks


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, head, options, targets, hidden, weight, bias):
        ctx.backend, ctx.head, ctx.options = backend, head, options
        log_prob, h, ctx.chunks = _forward(backend, head, options[3], True)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.set_materialize_grads(False)
        return log_prob, h

    @staticmethod
    def backward(ctx, d_log_prob, d_entropy):
        hidden, weight, bias, targets = ctx.saved_tensors  # raises where autograd would
        inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
        if torch.is_grad_enabled():  # create_graph: only the reference can be differentiated once more

            def specification(hidden, weight, bias=None):
                return _reference(hidden, weight, targets, bias, *ctx.options)

            found = _checks.gradients_by_reference(specification, inputs, (d_log_prob, d_entropy))
            return None, None, None, None, *found, *([None] * (3 - len(found)))
        needed = ctx.needs_input_grad[4:]
        found = _backward(ctx.backend, ctx.head, ctx.chunks, d_log_prob, d_entropy, needed, hidden.shape)
        return None, None, None, None, *found


def _backward(backend, head, chunks, d_log_prob, d_entropy, needed, shape):
    """Gradients of hidden, weight and bias. The chunks' logits are overwritten and forgotten."""
    grads = _linear.Gradients(head, needed)
    g = chunks[0].log_prob.new_zeros(head.n) if d_log_prob is None else d_log_prob.reshape(-1)
    e = None if d_entropy is None else d_entropy.reshape(-1)
    for i, chunk in enumerate(chunks):
        head.backward(backend, chunk, g[chunk.rows], None if e is None else e[chunk.rows].contiguous(), grads)
        chunks[i] = chunk._replace(logits=None)  # a second backward computes them again
    return grads.results(head, shape)


# --- under torch.compile ----------------------------------------------------------------------------------------------


def _head(hidden, weight, targets, bias, rows, temperature, softcap, ignore_index, logits_memory):
    backend = _linear.pick(_OP, hidden, weight, targets, bias)
    if backend is None:
        raise RuntimeError(f"{_OP}: compiled for kernels that take no tensor on {hidden.device} any more")
    return backend, _linear.Head(
        _OP, hidden, weight, targets, bias, temperature if rows is None else rows, softcap, ignore_index, None, None,
        logits_memory,
    )  # fmt: skip


def _kernel(hidden, weight, targets, bias, rows, temperature, softcap, ignore_index, entropy, logits_memory):
    backend, head = _head(hidden, weight, targets, bias, rows, temperature, softcap, ignore_index, logits_memory)
    log_prob, h, _ = _forward(backend, head, entropy, False)
    return log_prob, _library.placeholder(log_prob) if h is None else h


def _fake(hidden, weight, targets, bias, rows, temperature, softcap, ignore_index, entropy, logits_memory):
    dtype = _checks.compute_dtype(hidden, weight)
    return targets.new_empty(targets.shape, dtype=dtype), targets.new_empty(
        targets.shape if entropy else 0, dtype=dtype
    )


def _backward_kernel(
    hidden, weight, targets, bias, rows, temperature, softcap, ignore_index, logits_memory, d_log_prob, d_entropy
):
    backend, head = _head(hidden, weight, targets, bias, rows, temperature, softcap, ignore_index, logits_memory)
    _, _, chunks = _forward(backend, head, d_entropy is not None, True)
    found = _backward(backend, head, chunks, d_log_prob, d_entropy, (True, True, bias is not None), hidden.shape)
    return *found[:2], _library.placeholder(hidden) if bias is None else found[2]


def _backward_fake(hidden, weight, targets, bias, *_):
    of_bias = hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), of_bias


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.entropy, ctx.logits_memory = inputs[5:]


def _autograd(ctx, d_log_prob, d_entropy):
    options = (ctx.temperature, ctx.softcap, ctx.ignore_index, ctx.logits_memory)
    d_entropy = d_entropy if ctx.entropy else None
    d_hidden, d_weight, d_bias = _backward_op(*ctx.saved_tensors, *options, d_log_prob, d_entropy)
    return d_hidden, d_weight, None, None if ctx.saved_tensors[3] is None else d_bias, *([None] * 6)


_TENSORS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, Tensor? temperatures"
_OPTIONS = "float temperature, float? softcap, int? ignore_index"
_backward_op = _library.define(
    f"{_OP}_backward",
    f"({_TENSORS}, {_OPTIONS}, int? logits_memory, Tensor? d_log_prob, Tensor? d_entropy) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
_op = _library.define(
    _OP, f"({_TENSORS}, {_OPTIONS}, bool entropy, int? logits_memory) -> (Tensor, Tensor)", _kernel, _fake,
    _setup_context, _autograd,
)  # fmt: skip
