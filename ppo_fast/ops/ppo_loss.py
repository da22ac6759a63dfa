"""PPO loss from log-probs."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..config import LossConfig
from ..outputs import PPOLoss
from ..sequences import sequence_loss
from . import _loss


def ppo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    config: LossConfig | None = None,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    rollout_log_prob: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> PPOLoss:
    """Clipped PPO loss with value, entropy and KL terms, its gradients and all statistics in one pass.

    Formula (Schulman et al. 2017, arXiv 1707.06347; every switch: `LossConfig`)::

        loss = Σ_t w_t·(policy_t + value_coef·value_t - entropy_coef·entropy_t + kl_coef·kl_t)
        policy_t = max(-A·r, -A·clip(r, 1 - clip_low, 1 + clip_high)),  r = exp(log_prob - old_log_prob),
                   or another of `LossConfig.policy`

    Args:
        log_prob: log-probabilities of the taken actions or tokens, nats; any shape [...], any strides. Gradient.
        old_log_prob, advantages: same shape; constants.
        config: what the loss is made of; `LossConfig.preset(...)` for another trainer's definition.
        values, old_values, returns: the value term; `values` gets a gradient. `old_values` is needed by a value clip.
        entropy: per-token entropy, for the bonus; gradient.
        ref_log_prob: of the reference policy, for `config.kl`.
        rollout_log_prob: of the engine that sampled, for `config.rollout_correction`.
        mask: bool, integer or floating, [...]; elements that are 0 are not read and reach nothing.
        cu_seqlens: [S + 1], borders of the sequences in packed 1-D inputs, for the "seq-mean-..." reductions and the
            policies of sequences; without it sequences are the rows of [B, T].
        weights: [...], per-token weights w_t instead of a reduction.
        denominator: number or 0-dim tensor that replaces the count a reduction divides by (micro-batches, ranks).

    Returns:
        `PPOLoss(loss, stats)`: 0-dim loss and detached `Stats`, float32 (float64 if log_prob, values or entropy is).

    Gradient: that of the formula; at ties `max` splits ½/½ and `clamp` passes on its edge, as torch's own. Gradients
    are written in the forward pass and have the dtype of their input. Double backward goes through the reference.

    Errors: TypeError for a dtype or a missing tensor, ValueError for a shape, or for a constant that requires a gradient.

    Cost: reads each input once and writes each gradient once; advantages or mask once more where the loss needs their
    mean or count first. float32 with values, entropy and all gradients: 7 reads + 3 writes = 40 bytes an element.
    """
    if isinstance(config, LossConfig) and config.forms:
        return sequence_loss(
            "ppo_loss", ppo_loss, log_prob, old_log_prob, advantages, config, values=values, old_values=old_values,
            returns=returns, entropy=entropy, ref_log_prob=ref_log_prob, rollout_log_prob=rollout_log_prob, mask=mask,
            cu_seqlens=cu_seqlens, weights=weights, denominator=denominator,
        )  # fmt: skip
    stored = (old_log_prob, advantages, old_values, returns, ref_log_prob, rollout_log_prob, mask, weights)
    shape = getattr(log_prob, "shape", None)  # not a tensor: the checks say so
    return _op((log_prob, values, entropy), (), config, shape, stored, cu_seqlens, denominator)


def _fill(backend, params, inputs, needed, extra, rollout):
    old_log_prob, advantages, old_values, returns, *rest = rollout
    log_prob, values, entropy = inputs
    loss, stats = _loss.outputs(*inputs)
    grads = _loss.gradients(inputs, needed)
    backend.ops.ppo_loss(
        params, log_prob, old_log_prob, advantages, values, old_values, returns, entropy, *rest, loss, stats, *grads,
        backend.resources(),
    )  # fmt: skip
    return loss, stats, grads


def _specify(config, inputs, extra, stored, cu_seqlens, denominator):
    log_prob, values, entropy = inputs
    return reference.ppo_loss(
        log_prob, *stored[:2], config, values=values, entropy=entropy, cu_seqlens=cu_seqlens, denominator=denominator,
        **dict(zip(_loss.ROLLOUT[2:], stored[2:], strict=True)),
    )  # fmt: skip


_op = _loss.Loss(
    "ppo_loss", "the shape of log_prob", "Tensor log_prob, Tensor? values, Tensor? entropy", "", _fill, _specify
)
