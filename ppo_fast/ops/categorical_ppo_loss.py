"""PPO loss from the logits of a categorical policy."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..config import LossConfig
from ..outputs import PPOLoss
from . import _loss
from .categorical_log_prob import categorical_log_prob
from .ppo_loss import ppo_loss


def categorical_ppo_loss(
    logits: Tensor,
    actions: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    config: LossConfig | None = None,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    rollout_log_prob: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    action_mask: Tensor | None = None,
    index: Tensor | None = None,
) -> PPOLoss:
    """`categorical_log_prob` and `ppo_loss` in one call: distribution, ratio, clip, value, entropy, statistics, gradients.

    Formula::

        log_prob, H = log softmax(logits)[actions], -Σ_a p_a·log p_a;  then `ppo_loss` with entropy=H

    Args:
        logits: [..., A], float32/float64/bfloat16/float16, any strides. Gradient.
        actions: [...], integers in [0, A), or floats that hold integers.
        old_log_prob, advantages, config, values, old_values, returns, ref_log_prob, rollout_log_prob, mask, cu_seqlens,
            weights, denominator: as in `ppo_loss`; [...].
        action_mask: [..., A]; an action whose mask is 0 has probability 0, no entropy and no gradient.
        index: [...], integers. The minibatch: element i of actions, old_log_prob, advantages, old_values, returns,
            ref_log_prob, rollout_log_prob, mask, action_mask and weights is their element index[i], flattened, so the
            rollout's buffers are passed whole and nothing is copied. `logits` and `values` are the minibatch's own.

    Returns: `PPOLoss(loss, stats)` as `ppo_loss`; float32, or float64 if logits or values are.

    Gradient: of logits and values; written in the forward pass, in their dtype. Rows that `mask` excludes are not read.

    Errors: as `ppo_loss`; ValueError for an action or an index out of range.

    Cost: reads the logits from memory once and writes their gradient once: 8·A bytes a row in float32, and what
    `ppo_loss` reads.
    """
    if isinstance(config, LossConfig) and config.forms:
        if index is not None:
            _loss.taken("categorical_ppo_loss", old_log_prob, index)  # its checks
        return reference.categorical_ppo_loss(
            logits, actions, old_log_prob, advantages, config, values=values, old_values=old_values, returns=returns,
            ref_log_prob=ref_log_prob, rollout_log_prob=rollout_log_prob, mask=mask, cu_seqlens=cu_seqlens,
            weights=weights, denominator=denominator, index=index, action_mask=action_mask,
            parts=(categorical_log_prob, ppo_loss),
        )  # fmt: skip
    shape = logits.shape[:-1] if isinstance(logits, Tensor) else None  # not a tensor: the checks say so
    stored = (old_log_prob, advantages, old_values, returns, ref_log_prob, rollout_log_prob, mask, weights)
    extra = (actions, action_mask, index)
    return _op((logits, values), extra, config, shape, stored, cu_seqlens, denominator, index)


def _fill(backend, params, inputs, needed, extra, rollout):
    old_log_prob, advantages, old_values, returns, *rest = rollout
    logits, values = inputs
    loss, stats = _loss.outputs(*inputs)
    grads = _loss.gradients(inputs, needed)
    backend.ops.categorical_ppo_loss(
        params, logits, *extra, old_log_prob, advantages, values, old_values, returns, *rest, loss, stats, *grads,
        backend.resources(),
    )  # fmt: skip
    return loss, stats, grads


def _specify(config, inputs, extra, stored, cu_seqlens, denominator):
    (logits, values), (actions, action_mask, index) = inputs, extra
    return reference.categorical_ppo_loss(
        logits, actions, *stored[:2], config, values=values, cu_seqlens=cu_seqlens, denominator=denominator,
        action_mask=action_mask, index=index, **dict(zip(_loss.ROLLOUT[2:], stored[2:], strict=True)),
    )  # fmt: skip


_op = _loss.Loss(
    "categorical_ppo_loss",
    "the shape of the rows",
    "Tensor logits, Tensor? values",
    "Tensor actions, Tensor? action_mask, Tensor? index",
    _fill,
    _specify,
)
