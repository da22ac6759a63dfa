"""Log-probability and entropy of independent categoricals side by side (gymnasium's MultiDiscrete)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import reference
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

    def check(self, logits, actions, action_mask, nvec):
        _checks.floating(self.name, logits=logits)
        _checks.same_device(self.name, logits, actions=actions, action_mask=action_mask)
        _checks.same_shape(self.name, logits.shape, "the shape of logits", action_mask=action_mask)
        if actions.shape[:-1] != logits.shape[:-1] or actions.ndim != logits.ndim:
            wanted = f"[..., K] with the rows of logits {list(logits.shape)}"
            raise ValueError(f"{self.name}: actions must be {wanted}, got {list(actions.shape)}")
        if min(nvec, default=1) < 1:
            raise ValueError(f"{self.name}: nvec must hold numbers >= 1, got {min(nvec)}")
        if actions.shape[-1] != len(nvec) or logits.shape[-1] != sum(nvec):
            raise ValueError(
                f"{self.name}: nvec must have {actions.shape[-1]} entries, as actions has, that sum to "
                f"{logits.shape[-1]}, as logits has, got {len(nvec)} that sum to {sum(nvec)}"
            )

    def reference(self, logits, actions, action_mask, nvec, entropy):
        return reference.multi_categorical_log_prob(logits, actions, nvec, action_mask=action_mask, entropy=entropy)

    def saved_shape(self, logits, actions, action_mask, nvec):
        return (3, len(nvec), logits.shape[:-1].numel())

    def forward(self, backend, logits, actions, action_mask, nvec, entropy):
        log_prob, h = empty_results(entropy, logits)
        saved = log_prob.new_empty(self.saved_shape(logits, actions, action_mask, nvec))
        backend.ops.multi_categorical_log_prob(
            logits, actions, action_mask, nvec, log_prob, h, saved, backend.resources()
        )
        return log_prob, h, saved

    def backward(self, backend, needs, logits, actions, action_mask, nvec, saved, d_log_prob, d_entropy):
        d_logits = empty_gradient(logits)
        backend.ops.multi_categorical_log_prob_backward(
            logits, actions, action_mask, nvec, saved, d_log_prob, d_entropy, d_logits, backend.resources()
        )
        return (d_logits,)


_op = _MultiCategorical()
