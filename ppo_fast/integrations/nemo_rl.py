"""NeMo-RL: GAE, whitening, the value loss and log-probs of its PPO on our kernels.

    from ppo_fast.integrations import nemo_rl
    nemo_rl.enable()        # in the driver for the advantages, in every worker for the rest

`GeneralizedAdvantageEstimator` (`algorithms/advantage_estimator.py`) loops over tokens on a CPU: its recursion and its whitening
are ours, a λ per response too. `MseValueLossFn` (`algorithms/loss/loss_functions.py`) is ours with its metrics read in one copy
from the device (theirs: nine). `get_next_token_logprobs_from_logits` (`distributed/model_utils.py`) is ours where nothing is
sharded or filtered: no float32 copy of the logits and none of their log-softmax.

What differs: returns are 0 at masked tokens (theirs: what the recursion carried there), a single valid token is not whitened
(theirs: NaN), the value loss is float32 also of bf16 values.

Theirs still: `ClippedPGLossFn`, whose seventeen metrics, floats each, are definitions of its own; so `SequencePackingLossWrapper`
too, which calls it once a sequence. GRPO's baselines; DTensor, vocabulary and context parallelism, top-k and top-p.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import LossConfig, categorical_log_prob, gae, ppo_loss, whiten
from . import _seam

_seam.require("nemo-rl", "0.6", "0.8", "install NeMo-RL from its repository")
from nemo_rl.algorithms.advantage_estimator import GeneralizedAdvantageEstimator  # noqa: E402
from nemo_rl.algorithms.loss.loss_functions import MseValueLossFn  # noqa: E402
from nemo_rl.distributed import model_utils  # noqa: E402

#: What NeMo-RL had when this was imported: for calls that ours cannot answer.
theirs = SimpleNamespace(
    compute_gae=GeneralizedAdvantageEstimator._compute_gae,
    reward_whiten=GeneralizedAdvantageEstimator._reward_whiten,
    value_loss=MseValueLossFn.__call__,
    log_probs=model_utils.get_next_token_logprobs_from_logits,
)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _plain(*tensors: Any, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> bool:
    return all(type(x) is Tensor and x.dtype in dtypes for x in tensors)


def _estimates(mask: Any, *tensors: Any) -> bool:
    """[B, T], plain, of a dtype that results have too, without a gradient."""
    known = _plain(*tensors, dtypes=(torch.float32, torch.float64)) and type(mask) is Tensor and mask.ndim == 2
    shapes = known and all(x.shape == mask.shape and x.device == mask.device for x in tensors)
    return shapes and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def compute_gae(
    self: Any, token_level_rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    lam = self.gae_lambda if gae_lambda is None else gae_lambda
    rates = [x for x in (self.gae_gamma, lam) if not isinstance(x, Tensor)]
    known = all(isinstance(x, (int, float)) and 0.0 <= x <= 1.0 for x in rates)
    if not known or not _estimates(mask, token_level_rewards, values):
        return theirs.compute_gae(self, token_level_rewards, values, mask, gae_lambda)
    advantages, returns = gae(token_level_rewards, values, mask=mask.bool(), gamma=self.gae_gamma, lam=lam, time_dim=1)
    return advantages, returns


def reward_whiten(self: Any, rewards: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    if not _estimates(mask, rewards):
        return theirs.reward_whiten(self, rewards, mask, shift_mean)
    return whiten(rewards, mask=mask.bool(), eps_in_variance=True, shift_mean=shift_mean)


@functools.lru_cache(maxsize=16)
def _value_config(clip: float | None) -> LossConfig:
    return LossConfig.preset("nemo_rl", policy="reinforce", kl=None, value_clip=clip)


def value_loss(
    self: Any, logits: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    values = logits.squeeze(-1) if logits.ndim > 2 and logits.shape[-1] == 1 else logits
    clip = self.cliprange if self.cliprange and self.cliprange > 0 else None
    returns, old_values = data["returns"], None if clip is None else data["values"]
    mask = data["token_mask"] * data["sample_mask"].unsqueeze(-1)
    streams = [returns] if old_values is None else [returns, old_values]
    known = _plain(values, *streams) and type(mask) is Tensor and mask.shape == values.shape
    if not known or any(x.shape != values.shape or x.requires_grad for x in streams):
        return theirs.value_loss(self, logits, data, global_valid_seqs, global_valid_toks)
    tokens = torch.as_tensor(global_valid_toks, dtype=torch.float32, device=values.device) + 1e-8
    no_policy = values.new_zeros(()).expand(values.shape)
    loss, stats = ppo_loss(
        no_policy, no_policy, no_policy, _value_config(clip), values=values, old_values=old_values, returns=returns,
        mask=mask, denominator=tokens,
    )  # fmt: skip
    loss = self.scale * loss
    with torch.no_grad():
        valid = mask != 0
        count = valid.sum()
        v, r = (torch.where(valid, x.float(), 0.0) for x in (values, returns))
        lowest, highest = (torch.where(valid, v, bound) for bound in (math.inf, -math.inf))
        sums = torch.stack(
            [stats.value_clip_fraction * count, r.sum(), v.sum(), r.square().sum(), (r - v).square().sum()]
        )
        numbers = torch.cat([torch.stack([loss, lowest.min(), highest.max()]).float(), sums.float() / tokens]).tolist()
    total, low, high, clipped, r_mean, v_mean, r_squared, residual = numbers  # the one copy
    empty = low > high
    return loss, {
        "loss": total, "vf_clipfrac": clipped, "returns_mean": r_mean, "values_mean": v_mean,
        "values_min": 0.0 if empty else low, "values_max": 0.0 if empty else high, "returns_sq_mean": r_squared,
        "residual_sq_mean": residual, "num_valid_samples": int(values.shape[0]),
    }  # fmt: skip


def get_next_token_logprobs_from_logits(
    input_ids: Tensor, next_token_logits: Tensor, seq_index: Tensor | None = None, vocab_parallel_rank: int | None = None,
    vocab_parallel_group: Any = None, context_parallel_group: Any = None, sampling_params: Any = None,
    chunk_size: int | None = None,
) -> Tensor:  # fmt: skip
    filtered = model_utils.need_top_k_or_top_p_filtering(sampling_params)
    if vocab_parallel_group is not None or filtered or not _plain(next_token_logits):
        return theirs.log_probs(
            input_ids, next_token_logits, seq_index, vocab_parallel_rank, vocab_parallel_group, context_parallel_group,
            sampling_params, chunk_size,
        )  # fmt: skip
    tokens = input_ids[:, 1:].to(next_token_logits.device)
    return categorical_log_prob(next_token_logits[:, :-1], tokens, entropy=False)[0].float()


_ALGORITHMS, _UTILS = "nemo_rl.algorithms", "nemo_rl.distributed.model_utils"
_integration = _seam.Integration(
    "nemo_rl",
    "nemo-rl",
    "0.6",
    "0.8",
    [
        _seam.Seam(
            f"{_ALGORITHMS}.advantage_estimator:GeneralizedAdvantageEstimator._compute_gae",
            compute_gae,
            _seam.parameters_of(compute_gae),
        ),
        _seam.Seam(
            f"{_ALGORITHMS}.advantage_estimator:GeneralizedAdvantageEstimator._reward_whiten",
            reward_whiten,
            _seam.parameters_of(reward_whiten),
        ),
        _seam.Seam(
            f"{_ALGORITHMS}.loss.loss_functions:MseValueLossFn.__call__", value_loss, _seam.parameters_of(value_loss)
        ),
        _seam.Seam(
            f"{_UTILS}:get_next_token_logprobs_from_logits",
            get_next_token_logprobs_from_logits,
            _seam.parameters_of(get_next_token_logprobs_from_logits),
            (f"{_ALGORITHMS}.loss.utils",),
        ),
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
