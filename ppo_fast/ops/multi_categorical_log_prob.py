"""Log-probability and entropy of independent categoricals side by side (gymnasium's MultiDiscrete)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backend, reference
from . import _checks
from ._log_prob import LogProbOp, empty_gradient, empty_results


def multi_categorical_log_prob(
    logits: Tensor,
    actions: Tensor,
    nvec: Sequence[int],
    *,
    action_mask: Tensor | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Sum over K heads of a categorical's log-probability and entropy; head k owns nvec[k] columns of the logits.

    Formula: `categorical_log_prob` of each head's columns, added in the order of the heads.

    Args:
        logits: [..., Σ nvec], float32, float64, bfloat16 or float16, any strides. Gradient.
        actions: [..., K], any integer dtype or floating with integral values; 0 <= actions[..., k] < nvec[k].
        nvec: K numbers >= 1 that sum to the width of the logits.
        action_mask: [..., Σ nvec]; where 0 the action has probability 0. A head without any possible action adds 0.
        entropy: False returns None in its place.

    Returns:
        (log_prob, entropy): [...], nats, float32 (float64 for float64 logits).

    Gradient: that of `categorical_log_prob`, in the dtype of the logits. Double backward goes through the reference.

    Errors: TypeError for a dtype; ValueError for a shape, for nvec, or for an action out of range.

    Cost: forward reads the logits once; backward reads them once and writes the gradient once; 3 numbers a head and row
    are kept.
    """
    return _op((logits, actions, action_mask), (list(nvec),), entropy)


class _MultiCategorical(LogProbOp):
    name = "multi_categorical_log_prob"
    inputs = ("logits",)
    constants = ("actions", "action_mask?")
    options = "int[] nvec"

    def check(self, logits, actions, action_mask):
        _checks.same_shape(self.name, logits.shape, "the shape of logits", action_mask=action_mask)

    def reference(self, logits, actions, action_mask, nvec, entropy):
        return reference.multi_categorical_log_prob(logits, actions, nvec, action_mask=action_mask, entropy=entropy)

    def saved_shape(self, logits, actions, action_mask, nvec):
        return (3, len(nvec), logits.shape[:-1].numel())

    def forward(self, logits, actions, action_mask, nvec, entropy):
        log_prob, h = empty_results(logits.shape[:-1], entropy, logits)
        saved = torch.empty(self.saved_shape(logits, actions, action_mask, nvec), dtype=log_prob.dtype)
        _backend._C.multi_categorical_log_prob(
            logits, actions, action_mask, nvec, log_prob, h, saved, torch.get_num_threads()
        )
        return log_prob, h, saved

    def backward(self, needs, logits, actions, action_mask, nvec, saved, d_log_prob, d_entropy):
        d_logits = empty_gradient(logits)
        _backend._C.multi_categorical_log_prob_backward(
            logits, actions, action_mask, nvec, saved, d_log_prob, d_entropy, d_logits, torch.get_num_threads()
        )
        return (d_logits,)


_op = _MultiCategorical()
