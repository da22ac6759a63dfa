"""OpenRLHF: advantages, log-probs, entropies and both PPO losses on our kernels.

    # in the script that starts the training, and in Ray's workers, which are processes of their own
    from ppo_fast.integrations import openrlhf
    openrlhf.enable()

Ours: `RemoteExperienceMaker.get_advantages_and_returns` (`trainer/ppo_utils/experience_maker.py`; theirs loops over tokens) is
`pf.gae`; `log_probs_from_logits` and `compute_entropy` (`models/utils.py`; as `models/actor.py` calls them) are
`pf.categorical_log_prob`; `PolicyLoss` and `ValueLoss` (`models/loss.py`) are `pf.ppo_loss`, with PPO and GSPO, dual clip, and
the correction of the rollout's log-probs by ratios, by token or by sequence.

What differs: rounding; logits are not overwritten where a temperature is given; an action of logit -inf adds 0 to the entropy
(theirs: NaN); a batch without any token has loss 0 and statistics 0 (theirs: 0/0), and NaN in masked places reaches nothing.
Masks are 0 or 1.

Theirs still: half precision (their actor makes float32 of all logits), gates by a divergence (tv, binary_kl), inputs that are
broadcast, and `compute_approx_kl`, `aggregate_loss` and `masked_normalize`, a few operations on tokens each.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import LossConfig, categorical_log_prob, gae, ppo_loss
from . import _seam

_seam.require("openrlhf", "0.11.2", "0.12")
from openrlhf.models import loss as losses  # noqa: E402
from openrlhf.models import utils  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

_log_probs_from_logits, _compute_entropy = utils.log_probs_from_logits, utils.compute_entropy
_policy_loss, _value_loss = losses.PolicyLoss.forward, losses.ValueLoss.forward
_get_advantages_and_returns = RemoteExperienceMaker.get_advantages_and_returns


def _wide(*tensors: Any) -> bool:
    """Plain tensors of one shape, float32 or float64; None may stand for any."""
    given = [x for x in tensors if x is not None]
    return all(
        type(x) is Tensor and x.dtype in (torch.float32, torch.float64) and x.shape == given[0].shape for x in given
    )


def _masks(mask: Any, like: Tensor) -> bool:
    return mask is None or (type(mask) is Tensor and mask.shape == like.shape)


def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """`RemoteExperienceMaker.get_advantages_and_returns`; where the mask is 0, value and reward are."""
    known = 0 <= gamma <= 1 and 0 <= lambd <= 1
    if not (known and _wide(values, rewards) and values.ndim == 2 and values.shape[1] and _masks(action_mask, values)):
        return _get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd)
    if action_mask is not None:  # not gae's own mask: theirs fills masked places with what the recursion has there
        values, rewards = (x.masked_fill(action_mask == 0, 0.0) for x in (values, rewards))
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lambd, time_dim=1)
    return advantages, returns


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """`openrlhf.models.utils.log_probs_from_logits`."""
    if not (_wide(logits) and labels.shape == logits.shape[:-1] and logits.shape[-1] and temperature > 0):
        return _log_probs_from_logits(logits, labels, temperature)
    return categorical_log_prob(logits, labels, temperature=temperature, entropy=False)[0]


def compute_entropy(logits: Tensor) -> Tensor:
    """`openrlhf.models.utils.compute_entropy`."""
    if not _wide(logits) or not logits.shape[-1]:
        return _compute_entropy(logits)
    any_token = torch.zeros((), dtype=torch.long, device=logits.device).expand(logits.shape[:-1])
    return categorical_log_prob(logits, any_token)[1]  # type: ignore[return-value]


# --- losses -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _config(**fields: Any) -> LossConfig:
    return LossConfig.preset("openrlhf", **fields)


def _reduction(by_token: bool, dp_size: int, tokens: Any, sequences: Any) -> tuple[str, Any]:
    """What `aggregate_loss` does, as our reduction and denominator: this batch's count, or a share of that of all ranks."""
    total = tokens if by_token else sequences
    return "token-mean" if by_token else "seq-mean-token-mean", None if total is None else total / dp_size


def _countable(*totals: Any) -> bool:
    return all(x is None or isinstance(x, Tensor) or x > 0 for x in totals)


def policy_loss(
    self: Any, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None, dp_size: int = 1, batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`PolicyLoss.forward`: (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio)."""
    corrected, by_sequence = self.is_correction_level != "off", self.policy_loss_type == "gspo"
    known = _wide(log_probs, old_log_probs, advantages, rollout_log_probs) and _masks(action_mask, log_probs)
    known = (
        known and self.policy_loss_type in ("ppo", "gspo") and not (action_mask is None and not self.token_level_loss)
    )
    if corrected:
        known = known and rollout_log_probs is not None and action_mask is not None
        known = known and (by_sequence or self.is_correction_gating == "ratio")
    known = known and log_probs.ndim == 2 and _countable(batch_num_tokens, global_batch_size)
    if not known or min(self.clip_eps_low, self.clip_eps_high) < 0:
        return _policy_loss(
            self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size, batch_num_tokens,
            global_batch_size,
        )  # fmt: skip
    valid = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask != 0
    x, old, scaled = log_probs, old_log_probs.detach(), advantages.detach()
    log_ratio = torch.where(valid, (x if by_sequence else x.detach()) - old, 0.0)
    vllm_kl = filtered = lengths = None
    with torch.no_grad():
        tokens = valid.sum().clamp_(min=1)
        if by_sequence or self.is_correction_level == "seq":
            lengths = valid.sum(-1, keepdim=True).clamp_(min=1)
        ppo_kl = log_ratio.sum().neg_() / tokens
        if corrected and not by_sequence:
            log_rho = torch.where(valid, old - rollout_log_probs, 0.0)  # type: ignore[operator]
            weights, filtered = _correction(self, log_rho, valid, tokens, lengths)
            scaled, vllm_kl = scaled * weights, log_rho.sum().neg_() / tokens
    if by_sequence:  # PPO of the mean log-ratio, which the statistics need too; corrected: to the rollout's log-probs
        if corrected:
            log_ratio = torch.where(valid, x - rollout_log_probs.detach(), 0.0)  # type: ignore[union-attr]
        log_ratio = log_ratio.sum(-1, keepdim=True) / lengths  # type: ignore[operator]
        x, old = log_ratio.expand(x.shape), x.new_zeros(()).expand(x.shape)
    with torch.no_grad():
        ratio = log_ratio.exp()
        beyond = ratio - ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high)  # the smaller of both surrogates is
        clipped = (beyond * advantages > 0).logical_and_(valid).sum() / tokens  # the clipped one where the signs agree
    reduction, denominator = _reduction(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    config = _config(
        clip_low=self.clip_eps_low, clip_high=self.clip_eps_high, dual_clip=self.dual_clip, reduction=reduction,
        log_ratio_clamp=None if by_sequence else 20.0,
    )  # fmt: skip
    mask = None if action_mask is None else valid
    return ppo_loss(x, old, scaled, config, mask=mask, denominator=denominator).loss, clipped, ppo_kl, vllm_kl, filtered


def _correction(module: Any, log_rho: Tensor, valid: Tensor, tokens: Tensor, lengths: Any) -> tuple[Tensor, Tensor]:
    """(factor of each token's loss, share of tokens or sequences that are filtered), by the ratio of a token or the
    geometric mean of a sequence's, whose tokens keep their own."""
    low, high = module.is_correction_threshold
    by_token = module.is_correction_level == "token"
    rho = log_rho.exp()
    gate = rho if by_token else (log_rho.sum(-1, keepdim=True) / lengths).exp_()
    keep = (gate >= low) & (gate <= high)
    if not by_token:
        keep &= valid.any(-1, keepdim=True)
    filtered = (~keep & valid).sum() / tokens if by_token else 1 - keep.float().mean()
    return (gate.clamp(low, high) if module.is_correction_mode == "clip" else torch.where(keep, rho, 0.0)), filtered


def value_loss(
    self: Any, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None, dp_size: int = 1,
    batch_num_tokens: float | None = None, global_batch_size: float | None = None,
) -> Tensor:  # fmt: skip
    """`ValueLoss.forward`."""
    known = _wide(values, old_values, returns) and _masks(action_mask, values)
    known = known and _countable(batch_num_tokens, global_batch_size)
    if not known or (action_mask is None and not self.token_level_loss) or (self.clip_eps or 0) < 0:
        return _value_loss(self, values, old_values, returns, action_mask, dp_size, batch_num_tokens, global_batch_size)
    nothing = values.new_zeros(()).expand(values.shape)
    reduction, denominator = _reduction(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    return ppo_loss(
        nothing, nothing, nothing, _config(policy="reinforce", value_clip=self.clip_eps, reduction=reduction),
        values=values, old_values=old_values.detach(), returns=returns.detach(), mask=action_mask, denominator=denominator,
    ).loss  # fmt: skip


_integration = _seam.Integration(
    "openrlhf",
    "openrlhf",
    "0.11.2",
    "0.12",
    [
        _seam.Seam(
            "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.get_advantages_and_returns",
            get_advantages_and_returns,
            "self, values, rewards, action_mask, gamma, lambd",
        ),
        _seam.Seam(
            "openrlhf.models.utils:log_probs_from_logits",
            log_probs_from_logits,
            "logits, labels, temperature",
            ("openrlhf.models.actor",),
        ),
        _seam.Seam("openrlhf.models.utils:compute_entropy", compute_entropy, "logits", ("openrlhf.models.actor",)),
        _seam.Seam("openrlhf.models.loss:PolicyLoss.forward", policy_loss, _seam.parameters_of(policy_loss)),
        _seam.Seam("openrlhf.models.loss:ValueLoss.forward", value_loss, _seam.parameters_of(value_loss)),
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
