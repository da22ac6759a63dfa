"""categorical_log_prob of K labels a row: the kernels' pass over the logits once, with one label; the others are looked up.

log p[k] = z[k]/T - log Σ exp(z/T), and the pass leaves log Σ. The gradient of all of them is that of one label with the sum
of their gradients, which gives -p·Σ g, plus g[k] at each label.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _memory
from . import _checks
from . import categorical_log_prob as _one


def look_up(backend: Any, logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor | None]:
    """(log_prob [..., K], entropy [...] or None); labels that are IGNORED give 0."""
    return _Function.apply(backend, logits, labels, *options)


def _taken(logits: Tensor, labels: Tensor, action_mask: Tensor | None, inverse: Any, dtype: torch.dtype) -> Tensor:
    """z[label]/T [..., K], -inf where the label is impossible."""
    taken = logits.gather(-1, labels).to(dtype) * inverse
    if action_mask is not None:
        taken = taken.masked_fill(action_mask.gather(-1, labels) == 0, -math.inf)
    return taken


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, labels, action_mask, rows, temperature, entropy, inplace):
        dtype, ignore_index = _checks.compute_dtype(logits), _one.IGNORED
        ignored = labels == ignore_index
        labels = labels.masked_fill(ignored, 0)
        one = labels.gather(-1, (~ignored).byte().argmax(-1, keepdim=True)).squeeze(-1)  # of those that count
        one = one.masked_fill(ignored.all(-1), ignore_index)
        _, h, saved = _one._forward(backend, logits, one, action_mask, rows, temperature, ignore_index, entropy)
        inverse = 1.0 / temperature if rows is None else (1.0 / rows.to(dtype))[..., None]
        shift, log_sum = (x.view(*one.shape, 1) for x in saved)
        dead = ignored | (log_sum == math.inf)
        log_prob = _taken(logits, labels, action_mask, inverse, dtype) - (shift * inverse + log_sum)
        ctx.backend, ctx.options = backend, (temperature, entropy, inplace)
        ctx.save_for_backward(logits, labels, one, dead, action_mask, rows, h, saved)
        ctx.set_materialize_grads(False)
        return log_prob.masked_fill(dead, 0.0), h

    @staticmethod
    def backward(ctx, d_log_prob, d_entropy):
        logits, labels, one, dead, action_mask, rows, h, saved = ctx.saved_tensors
        temperature, entropy, inplace = ctx.options
        rest = (None,) * 6
        if d_log_prob is None and d_entropy is None:
            return None, None, *rest
        if torch.is_grad_enabled():  # create_graph: only the reference can be differentiated once more
            given = labels.masked_fill(dead, _one.IGNORED)

            def specification(logits):
                return _one._reference(logits, given, action_mask, rows, temperature, _one.IGNORED, entropy)

            found = _checks.gradients_by_reference(specification, (logits,), (d_log_prob, d_entropy))
            return None, *found, *rest
        if inplace:
            d_logits = logits.detach()
            torch.autograd.graph.increment_version(logits)
        else:
            d_logits = _memory.empty_like(logits)
        g = saved.new_zeros(labels.shape) if d_log_prob is None else d_log_prob.masked_fill(dead, 0.0)
        total = g.sum(-1)
        _one._backward(ctx.backend, logits, one, action_mask, rows, temperature, h, saved, total, d_entropy, d_logits)
        inverse = 1.0 / temperature if rows is None else (1.0 / rows.to(g.dtype))[..., None]
        anchor = one.clamp(min=0)[..., None]  # the kernel gave it the sum of all
        for at, x in ((labels, g), (anchor, -total[..., None])):
            if action_mask is not None:  # a label against the mask has no gradient of its own
                x = x.masked_fill(action_mask.gather(-1, at) == 0, 0.0)
            d_logits.scatter_add_(-1, at, (x * inverse).to(d_logits.dtype))
        return None, d_logits, *rest
