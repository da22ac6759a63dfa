"""PPO loss from the mean and log standard deviation of a diagonal normal policy."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..config import LossConfig
from ..outputs import PPOLoss
from . import _loss
from .normal_log_prob import normal_log_prob
from .ppo_loss import ppo_loss


def normal_ppo_loss(
    mean: Tensor,
    log_std: Tensor,
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
    index: Tensor | None = None,
    squash: bool = False,
) -> PPOLoss:
    """`normal_log_prob` and `ppo_loss` in one call: distribution, ratio, clip, value, entropy, statistics, gradients.

    Formula::

        log_prob = Σ_d -z²/2 - log_std - ½·log 2π,  z = (actions - mean)·exp(-log_std)
        H = Σ_d log_std + ½ + ½·log 2π;  then `ppo_loss` with entropy=H

    Args:
        mean: [..., D], float32/float64/bfloat16/float16, any strides. Gradient.
        log_std: [D], shared by all rows, or anything that broadcasts to [..., D]. Gradient; that of a shared one is a sum
            over the rows in a fixed order.
        actions: [..., D].
        old_log_prob, advantages, config, values, old_values, returns, ref_log_prob, rollout_log_prob, mask, cu_seqlens,
            weights, denominator: as in `ppo_loss`; [...].
        index: [...], integers. The minibatch: element i of actions, old_log_prob, advantages, old_values, returns,
            ref_log_prob, rollout_log_prob, mask and weights is their element index[i], flattened, so the rollout's buffers
            are passed whole and nothing is copied. `mean`, `log_std` and `values` are the minibatch's own.
        squash: actions are pre-tanh samples; log_prob is that of tanh(actions), entropy its one-sample estimate -log_prob.

    Returns: `PPOLoss(loss, stats)` as `ppo_loss`; float32, or float64 if mean, log_std or values are.

    Gradient: of mean, log_std and values; written in the forward pass, in their dtype.

    Errors: as `ppo_loss`; ValueError for an index out of range.

    Cost: reads mean and actions from memory once, writes the gradient of the mean once: 12·D bytes a row in float32 with a
    shared log_std, and what `ppo_loss` reads.
    """
    if isinstance(config, LossConfig) and config.forms:
        if index is not None:
            _loss.taken("normal_ppo_loss", old_log_prob, index)  # its checks
        return reference.normal_ppo_loss(
            mean, log_std, actions, old_log_prob, advantages, config, values=values, old_values=old_values, returns=returns,
            ref_log_prob=ref_log_prob, rollout_log_prob=rollout_log_prob, mask=mask, cu_seqlens=cu_seqlens,
            weights=weights, denominator=denominator, index=index, squash=squash, parts=(normal_log_prob, ppo_loss),
        )  # fmt: skip
    shape = mean.shape[:-1] if isinstance(mean, Tensor) else None  # not a tensor: the checks say so
    if shape is not None and isinstance(log_std, Tensor) and log_std.shape not in (mean.shape, mean.shape[-1:]):
        try:
            log_std = log_std.expand(mean.shape)
        except RuntimeError:
            wanted = f"broadcast to the shape of mean = {list(mean.shape)}"
            raise ValueError(f"normal_ppo_loss: log_std must {wanted}, got {list(log_std.shape)}") from None
    stored = (old_log_prob, advantages, old_values, returns, ref_log_prob, rollout_log_prob, mask, weights)
    extra = (actions, squash, index)
    return _op((mean, log_std, values), extra, config, shape, stored, cu_seqlens, denominator, index)


def _fill(backend, params, inputs, needed, extra, rollout):
    old_log_prob, advantages, old_values, returns, *rest = rollout
    mean, log_std, values = inputs
    actions, squash, index = extra
    loss, stats = _loss.outputs(*inputs)
    grads = _loss.gradients(inputs, needed)
    backend.ops.normal_ppo_loss(
        params, mean, log_std, actions, squash, index, old_log_prob, advantages, values, old_values, returns, *rest, loss,
        stats, *grads, backend.resources(),
    )  # fmt: skip
    return loss, stats, grads


def _specify(config, inputs, extra, stored, cu_seqlens, denominator):
    (mean, log_std, values), (actions, squash, index) = inputs, extra
    return reference.normal_ppo_loss(
        mean, log_std, actions, *stored[:2], config, values=values, cu_seqlens=cu_seqlens, denominator=denominator,
        index=index, squash=squash, **dict(zip(_loss.ROLLOUT[2:], stored[2:], strict=True)),
    )  # fmt: skip


_op = _loss.Loss(
    "normal_ppo_loss",
    "the shape of the rows",
    "Tensor mean, Tensor log_std, Tensor? values",
    "Tensor actions, bool squash, Tensor? index",
    _fill,
    _specify,
)
