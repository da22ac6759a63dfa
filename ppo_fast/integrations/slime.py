"""slime: GAE and discounted returns on our kernels; its log-probs for those who ask.

    from ppo_fast.integrations import slime
    slime.enable()          # in every actor, e.g. in the module that --custom-megatron-init-path names

Theirs: `utils/ppo_utils.py`. `get_advantages_and_returns_batch` pads every response to the longest and scans in matrices of 128
steps; ours reads responses where they end. `chunked_gae`, `vanilla_gae` and `chunked_discounted_returns`, which
`get_reinforce_plus_plus_returns` calls, are ours too; results differ in rounding, by less than theirs from one another.

`calculate_log_probs_and_entropy` here has slime's signature and is not put in by `enable()`: slime holds its own to Megatron's
last bit, and ours rounds elsewhere. It reads logits of any dtype and keeps no float32 copy of them; to have it, set
`slime.backends.megatron_utils.loss.calculate_log_probs_and_entropy`.

Theirs still: policy and value losses, one number a token for reducers that slime's user may choose (ours sum), compiled already
and without a copy to the host; context parallelism; whitening, whose variance is over all ranks.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import categorical_log_prob, discounted_returns, gae
from . import _seam

_seam.require("slime", "0.3.1", "0.4", "install slime from its repository: pip install -e . --no-deps")
from slime.utils import ppo_utils  # noqa: E402

#: What slime had when this was imported: for calls that ours cannot answer.
theirs = SimpleNamespace(**vars(ppo_utils))


def _ours(*tensors: Any) -> bool:
    """Plain tensors whose results have their dtype, without a gradient."""
    known = all(type(x) is Tensor and x.dtype in (torch.float32, torch.float64) for x in tensors)
    return known and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _rates(*rates: Any) -> bool:
    return all(isinstance(x, (int, float)) and 0.0 <= x <= 1.0 for x in rates)


def _same(rewards: Any, values: Any) -> bool:
    return _ours(rewards, values) and rewards.dtype == values.dtype and rewards.shape == values.shape


def vanilla_gae(rewards: Tensor, values: Tensor, gamma: float, lambd: float) -> tuple[Tensor, Tensor]:
    if not (_rates(gamma, lambd) and _same(rewards, values) and rewards.ndim == 2):
        return theirs.vanilla_gae(rewards, values, gamma, lambd)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lambd, time_dim=1)
    return advantages, returns


def chunked_gae(
    rewards: Tensor, values: Tensor, gamma: float, lambd: float, chunk_size: int = 128
) -> tuple[Tensor, Tensor]:
    if not (_rates(gamma, lambd) and _same(rewards, values) and rewards.ndim == 2):
        return theirs.chunked_gae(rewards, values, gamma, lambd, chunk_size)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lambd, time_dim=1)
    return advantages, returns


def chunked_discounted_returns(rewards: Tensor, discount: float, chunk_size: int = 128) -> Tensor:
    if not (_rates(discount) and _ours(rewards) and rewards.ndim == 2):
        return theirs.chunked_discounted_returns(rewards, discount, chunk_size)
    return discounted_returns(rewards, gamma=discount, time_dim=1)


def get_advantages_and_returns_batch(
    total_lengths: list[int], response_lengths: list[int], values_list: list[Tensor], rewards_list: list[Tensor],
    gamma: float, lambd: float, chunked: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    from megatron.core import mpu

    with torch.no_grad():
        lists = len(values_list) == len(rewards_list) == len(response_lengths) > 0
        whole = lists and mpu.get_context_parallel_world_size() == 1 and _rates(gamma, lambd)
        dtypes = {x.dtype for x in (*values_list, *rewards_list)}
        if not whole or len(dtypes) > 1 or not _ours(*values_list, *rewards_list):
            return theirs.get_advantages_and_returns_batch(
                total_lengths, response_lengths, values_list, rewards_list, gamma, lambd, chunked
            )
        rewards = torch.cat([x[:n] for x, n in zip(rewards_list, response_lengths, strict=True)])
        values = torch.cat([x[:n] for x, n in zip(values_list, response_lengths, strict=True)])
        cu_seqlens = torch.tensor([0, *response_lengths], device=rewards.device).cumsum(0)
        advantages, returns = gae(rewards, values, cu_seqlens=cu_seqlens, gamma=gamma, lam=lambd)
        return list(advantages.split(response_lengths)), list(returns.split(response_lengths))


def calculate_log_probs_and_entropy(
    logits: Tensor, tokens: Tensor, tp_group: Any, with_entropy: bool = False, chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None, with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probs [T, 1] and entropy [T]; `log_prob_keep_mask` [T, V] is of the log-probs only and always keeps the token."""
    if type(logits) is not Tensor or len(logits) == 0 or ppo_utils._get_vocab_parallel_rank_size(tp_group)[1] > 1:
        return theirs.calculate_log_probs_and_entropy(
            logits, tokens, tp_group, with_entropy, chunk_size, log_prob_keep_mask, with_entropy_grad
        )
    kept = None if log_prob_keep_mask is None else log_prob_keep_mask.scatter(1, tokens[:, None].long(), True)
    at_once = with_entropy and kept is None
    log_prob, entropy = categorical_log_prob(logits, tokens, action_mask=kept, entropy=at_once)
    if with_entropy and not at_once:
        entropy = categorical_log_prob(logits if with_entropy_grad else logits.detach(), tokens)[1]
    if entropy is not None:
        entropy = entropy.float() if with_entropy_grad else entropy.detach().float()
    return log_prob.float().unsqueeze(-1), entropy


_MODULE, _LOSS = "slime.utils.ppo_utils", ("slime.backends.megatron_utils.loss",)
_integration = _seam.Integration(
    "slime",
    "slime",
    "0.3.1",
    "0.4",
    [
        _seam.Seam(f"{_MODULE}:{ours.__name__}", ours, _seam.parameters_of(ours), _LOSS)
        for ours in (vanilla_gae, chunked_gae, chunked_discounted_returns, get_advantages_and_returns_batch)
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
