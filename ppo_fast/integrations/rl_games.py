"""rl_games: generalised advantage estimation on our kernels.

    from ppo_fast.integrations import rl_games
    rl_games.enable()

replaces `A2CBase.discount_values`, which discrete, continuous, recurrent and asymmetric agents all call. Theirs: a loop over
time in `common/a2c_common.py`. `discount_values_masks`, which nothing in rl_games calls, and the update are theirs. What lies
behind the end of an episode does not reach the steps ahead of it, also where it is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import gae
from . import _seam

_seam.require("rl-games", "1.6", "1.7")
from rl_games.common import a2c_common  # noqa: E402

_theirs = a2c_common.A2CBase.discount_values


def discount_values(
    self: Any,
    fdones: Tensor,
    last_extrinsic_values: Tensor,
    mb_fdones: Tensor,
    mb_extrinsic_values: Tensor,
    mb_rewards: Tensor,
) -> Tensor:
    """`A2CBase.discount_values`: rewards and values [T, N, V]; `mb_fdones[t]`: step t began a new episode, [T, N]."""
    rewards, values = mb_rewards, mb_extrinsic_values
    usual = rewards.dtype == values.dtype == torch.float32 and rewards.shape == values.shape
    if not usual or rewards.ndim != 3 or len(rewards) != self.horizon_length:
        return _theirs(self, fdones, last_extrinsic_values, mb_fdones, mb_extrinsic_values, mb_rewards)
    ends = torch.cat([mb_fdones[1:], fdones[None]]).unsqueeze(2).expand_as(rewards)
    advantages, _ = gae(rewards, values, last_extrinsic_values, terminated=ends, gamma=self.gamma, lam=self.tau)
    return advantages


_integration = _seam.Integration(
    "rl_games",
    "rl-games",
    "1.6",
    "1.7",
    [
        _seam.Seam(
            "rl_games.common.a2c_common:A2CBase.discount_values",
            discount_values,
            "self, fdones, last_extrinsic_values, mb_fdones, mb_extrinsic_values, mb_rewards",
        )
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
