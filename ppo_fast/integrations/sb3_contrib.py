"""sb3-contrib: the updates of MaskablePPO and RecurrentPPO on our kernels.

    from ppo_fast.integrations.sb3_contrib import MaskablePPO, RecurrentPPO      # subclasses

`enable()` puts both updates into sb3-contrib's own classes. The buffers of both take their advantages from Stable-Baselines3's
`RolloutBuffer`: `ppo_fast.integrations.sb3.enable()` beside it replaces that. Theirs: `ppo_mask/ppo_mask.py`,
`ppo_recurrent/ppo_recurrent.py` (`train`).

An action that the mask forbids has probability 0 and no gradient (theirs: a logit of -1e8, the same numbers in float32);
where it forbids all of them, theirs is uniform and ours gives the row no gradient. Padding of recurrent minibatches is out
of every mean, also of the mean that normalises advantages.
"""

from __future__ import annotations

from typing import Any

from .. import LossConfig
from ..outputs import PPOLoss
from . import _seam, sb3

_seam.require("sb3-contrib", "2.3", "3")
import sb3_contrib  # noqa: E402
from gymnasium import spaces  # noqa: E402
from sb3_contrib.common.maskable import distributions  # noqa: E402
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy  # noqa: E402
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy  # noqa: E402

sb3.PLAIN.update({MaskableActorCriticPolicy.evaluate_actions, RecurrentActorCriticPolicy.evaluate_actions})
sb3.STAND_INS.update({
    distributions.MaskableCategoricalDistribution: lambda theirs: sb3.Categorical(theirs.action_dim),
    distributions.MaskableMultiCategoricalDistribution: lambda theirs: sb3.MultiCategorical(list(theirs.action_dims)),
})  # fmt: skip


def train_maskable(self: Any) -> None:
    """`sb3_contrib.MaskablePPO.train`."""
    discrete = isinstance(self.action_space, spaces.Discrete)

    def loss_of_minibatch(data: Any, config: LossConfig) -> PPOLoss:
        actions = data.actions.long().flatten() if discrete else data.actions
        arguments = data.observations, actions
        return sb3.loss_of(self.policy, arguments, data, config, action_masks=data.action_masks)

    sb3.update(self, loss_of_minibatch)


def train_recurrent(self: Any) -> None:
    """`sb3_contrib.RecurrentPPO.train`."""
    discrete = isinstance(self.action_space, spaces.Discrete)

    def loss_of_minibatch(data: Any, config: LossConfig) -> PPOLoss:
        actions = data.actions.long().flatten() if discrete else data.actions
        arguments = data.observations, actions, data.lstm_states, data.episode_starts
        return sb3.loss_of(self.policy, arguments, data, config, data.mask > 1e-8)

    sb3.update(self, loss_of_minibatch)


class MaskablePPO(sb3_contrib.MaskablePPO):
    """`sb3_contrib.MaskablePPO` with our loss."""

    train = train_maskable


class RecurrentPPO(sb3_contrib.RecurrentPPO):
    """`sb3_contrib.RecurrentPPO` with our loss."""

    train = train_recurrent


_integration = _seam.Integration(
    "sb3_contrib",
    "sb3-contrib",
    "2.3",
    "3",
    [
        _seam.Seam("sb3_contrib.ppo_mask.ppo_mask:MaskablePPO.train", train_maskable, "self"),
        _seam.Seam("sb3_contrib.ppo_recurrent.ppo_recurrent:RecurrentPPO.train", train_recurrent, "self"),
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
