"""Log-probability of tokens from the hidden states, without the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _checks, _linear

_OP = "linear_log_prob"
_KEPT = 6  # chunks of which `logits_memory` is made: all but one stay until the backward


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

    Cost: forward 2·M·H·V FLOPs, backward 4·M·H·V (without dW half) and 2·M·H·V times the share of logits that did not fit;
    tokens whose gradient is 0 are left out on a CPU. Memory: logits_memory, and dW in float32.
    """
    _linear.check(_OP, hidden, weight, targets, bias, temperature, softcap, group, logits_memory)
    _checks.constants(
        _OP, ("targets", "temperature"), (targets, temperature if isinstance(temperature, Tensor) else None)
    )
    options = (temperature, softcap, ignore_index, entropy)
    if torch.compiler.is_compiling():
        return _compiled(hidden, weight, targets, bias, options, group, logits_memory)
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
    """(log_prob, entropy or None, chunks): as many of them with logits as the memory holds."""
    dtype = torch.float64 if head.dtype is torch.float64 else torch.float32
    log_prob = torch.zeros(head.n, dtype=dtype, device=head.hidden.device)
    h = torch.zeros_like(log_prob) if entropy else None
    chunks: list[_linear.Chunk] = []
    size = head.chunk_rows(1 / _KEPT if keep else 0.5)
    blocks = list(head.blocks(size))
    buffer = None
    for i, rows in enumerate(blocks):
        live = head.live(rows)
        if buffer is None or (keep and i < _KEPT):
            buffer = torch.empty((size, head.vocabulary), dtype=head.dtype, device=head.hidden.device)
        chunk = head.forward(backend, live, buffer, entropy)
        log_prob[live] = chunk.log_prob
        if h is not None:
            h[live] = chunk.entropy
        if keep:
            written_over = _KEPT - 1 <= i < len(blocks) - 1
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
        head, grads = ctx.head, _linear.Gradients(ctx.head, ctx.needs_input_grad[4:])
        zeros = torch.zeros(head.n, dtype=torch.float32, device=hidden.device) if d_log_prob is None else None
        g = zeros if d_log_prob is None else d_log_prob.reshape(-1)
        e = None if d_entropy is None else d_entropy.reshape(-1)
        for i, chunk in enumerate(ctx.chunks):
            of_entropy = None if e is None else e[chunk.rows].contiguous()
            head.backward(ctx.backend, chunk, g[chunk.rows], of_entropy, grads)
            ctx.chunks[i] = chunk._replace(logits=None)  # overwritten: a second backward computes them again
        return None, None, None, None, *grads.results(head, hidden.shape)
