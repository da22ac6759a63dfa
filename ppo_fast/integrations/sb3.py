"""Stable-Baselines3: advantages of rollout buffers, and the update of PPO, on our kernels.

    from ppo_fast.integrations.sb3 import PPO          # a subclass: nothing else changes
    model = PPO("MlpPolicy", "CartPole-v1").learn(100_000)

`RolloutBuffer` and `DictRolloutBuffer` are for `rollout_buffer_class=` of any on-policy algorithm. `enable()` puts the same
methods into Stable-Baselines3's own classes: every PPO, and the advantages of every A2C.

Theirs: `common/buffers.py` (`compute_returns_and_advantage`), `ppo/ppo.py` (`train`). The same permutation of the rollout is
drawn, so minibatches are theirs; results differ in rounding. Policies that override `evaluate_actions` are asked for
log-probabilities; of others only the networks are run, and the loss is made of the parameters of their distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import LossConfig, categorical_ppo_loss, gae, multi_categorical_log_prob, normal_ppo_loss, ppo_loss
from ..outputs import PPOLoss, Stats
from . import _seam

_seam.require("stable-baselines3", "2.3", "3")
import stable_baselines3  # noqa: E402
from gymnasium import spaces  # noqa: E402
from stable_baselines3.common import buffers, distributions, policies, utils  # noqa: E402

#: Rollouts up to this size are permuted whole, once an epoch, and minibatches are slices of that; larger ones are gathered
#: minibatch by minibatch, as Stable-Baselines3 does, so that no second copy of the observations is held.
WHOLE_ROLLOUT_BYTES = 64 << 20


def compute_returns_and_advantage(self: Any, last_values: Tensor, dones: np.ndarray) -> None:
    """`pf.gae` into the buffer's own NumPy arrays; `episode_starts[t + 1]` says whether step t ended its episode."""
    ends = np.empty(self.episode_starts.shape, np.bool_)  # [T, N]
    np.not_equal(self.episode_starts[1:], 0, out=ends[:-1])
    ends[-1] = dones
    rewards, values, terminated = (torch.from_numpy(x) for x in (self.rewards, self.values, ends))
    last = last_values.detach().to("cpu", values.dtype).flatten()
    advantages, returns = gae(rewards, values, last, terminated=terminated, gamma=self.gamma, lam=self.gae_lambda)
    self.advantages, self.returns = advantages.numpy(), returns.numpy()


class RolloutBuffer(buffers.RolloutBuffer):
    """`stable_baselines3.common.buffers.RolloutBuffer` with our advantages."""

    compute_returns_and_advantage = compute_returns_and_advantage


class DictRolloutBuffer(buffers.DictRolloutBuffer):
    """`stable_baselines3.common.buffers.DictRolloutBuffer` with our advantages."""

    compute_returns_and_advantage = compute_returns_and_advantage


# --- the loss of a minibatch ------------------------------------------------------------------------------------------
# A policy's `evaluate_actions` runs its networks, hands their output to `action_dist` and asks that for log-probabilities
# and entropy. During an update one of these stands there: it takes the parameters and answers later, in the fused loss.


class Fused:
    """A distribution that answers nothing itself."""

    parameters: Any  # a tuple of tensors
    action_mask: Tensor | None = None

    def proba_distribution(self, *parameters: Tensor, action_logits: Tensor | None = None) -> Any:
        self.parameters = parameters if action_logits is None else (action_logits,)
        self.action_mask = None
        return self

    def apply_masking(self, masks: Any) -> None:  # sb3-contrib's policies call it
        logits = self.parameters[0]
        self.action_mask = torch.as_tensor(masks, dtype=torch.bool, device=logits.device).reshape(logits.shape)

    def log_prob(self, actions: Tensor) -> Any:
        return None

    def entropy(self) -> Any:
        return None


class Categorical(Fused, distributions.CategoricalDistribution):
    def loss(self, actions: Tensor, *rollout: Any, **streams: Any) -> PPOLoss:
        (logits,) = self.parameters
        return categorical_ppo_loss(logits, actions, *rollout, action_mask=self.action_mask, **streams)


class DiagGaussian(Fused, distributions.DiagGaussianDistribution):
    def loss(self, actions: Tensor, *rollout: Any, **streams: Any) -> PPOLoss:
        mean, log_std = self.parameters
        return normal_ppo_loss(mean, log_std, actions, *rollout, **streams)


class MultiCategorical(Fused, distributions.MultiCategoricalDistribution):
    """Of several heads there is no fused loss: this one answers, from our kernel."""

    def log_prob(self, actions: Tensor) -> Tensor:
        (logits,) = self.parameters
        mask = self.action_mask
        log_prob, self._entropy = multi_categorical_log_prob(logits, actions, self.action_dims, action_mask=mask)
        return log_prob

    def entropy(self) -> Any:
        return self._entropy


#: What stands for which distribution; sb3_contrib.py adds its own.
STAND_INS: dict[type, Callable[[Any], Any]] = {
    distributions.CategoricalDistribution: lambda theirs: Categorical(theirs.action_dim),
    distributions.DiagGaussianDistribution: lambda theirs: DiagGaussian(theirs.action_dim),
    distributions.MultiCategoricalDistribution: lambda theirs: MultiCategorical(list(theirs.action_dims)),
}
#: The `evaluate_actions` that do no more with a distribution than the paragraph above says.
PLAIN: set[Any] = {policies.ActorCriticPolicy.evaluate_actions}


def loss_of(
    policy: Any, arguments: tuple[Any, ...], data: Any, config: LossConfig, mask: Tensor | None = None, **keywords: Any
) -> PPOLoss:
    """The loss of one minibatch; arguments and keywords are those of the policy's `evaluate_actions`."""
    values, log_prob, entropy = policy.evaluate_actions(*arguments, **keywords)
    critic = {"values": values.flatten(), "old_values": data.old_values, "returns": data.returns, "mask": mask}
    rollout = data.old_log_prob, data.advantages, config
    if log_prob is None:
        return policy.action_dist.loss(arguments[1], *rollout, **critic)
    if entropy is None:
        entropy = -log_prob  # their estimate, where a distribution has no closed form
    return ppo_loss(log_prob, *rollout, entropy=entropy, **critic)


def minibatches(buffer: Any, batch_size: int | None) -> Iterator[Any]:
    """The minibatches of an epoch, in `buffer.get(batch_size)`'s order."""
    plain = type(buffer).get is buffers.RolloutBuffer.get or type(buffer).get is buffers.DictRolloutBuffer.get
    observations = buffer.observations
    arrays = observations.values() if isinstance(observations, dict) else (observations,)
    if batch_size is None or not plain or sum(x.nbytes for x in arrays) > WHOLE_ROLLOUT_BYTES:
        yield from buffer.get(batch_size)
        return
    (whole,) = buffer.get(None)
    pieces = [_split(x, batch_size) for x in whole]
    for fields in zip(*pieces, strict=True):
        yield type(whole)(*fields)


def _split(x: Any, size: int) -> Any:
    if isinstance(x, dict):
        return [dict(zip(x, pieces, strict=True)) for pieces in zip(*(y.split(size) for y in x.values()), strict=True)]
    return x.split(size)


def update(self: Any, loss_of_minibatch: Callable[[Any, LossConfig], PPOLoss]) -> None:
    """`PPO.train`: every epoch over the rollout, the early stop, and the log. Statistics are read once, at the end."""
    policy = self.policy
    policy.set_training_mode(True)
    self._update_learning_rate(policy.optimizer)
    clip_range = self.clip_range(self._current_progress_remaining)
    clip_range_vf = None if self.clip_range_vf is None else self.clip_range_vf(self._current_progress_remaining)
    config = LossConfig.preset(
        "sb3", clip_low=clip_range, clip_high=clip_range, value_clip=clip_range_vf, value_coef=self.vf_coef,
        entropy_coef=self.ent_coef, normalize_advantages=self.normalize_advantage,
    )  # fmt: skip
    parameters = list(policy.parameters())
    stats: list[Tensor] = []  # of every minibatch
    loss, stop, last_epoch = torch.tensor(math.nan), False, 0
    theirs = policy.action_dist
    stand_in = STAND_INS.get(type(theirs)) if type(policy).evaluate_actions in PLAIN else None
    if stand_in is not None:
        policy.action_dist = stand_in(theirs)
    try:
        for epoch in range(self.n_epochs):
            last_epoch = len(stats)
            for data in minibatches(self.rollout_buffer, self.batch_size):
                loss, of_batch = loss_of_minibatch(data, config)
                stats.append(of_batch.vector)
                if self.target_kl is not None and of_batch.approx_kl > 1.5 * self.target_kl:
                    stop = True
                    if self.verbose >= 1:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {of_batch.approx_kl.item():.2f}")
                    break
                for x in parameters:  # `zero_grad()`, without what hooks and profilers take in every minibatch
                    x.grad = None
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                policy.optimizer.step()
            self._n_updates += 1
            if stop:
                break
    finally:
        policy.action_dist = theirs

    buffer = self.rollout_buffer
    read = Stats(torch.stack(stats).cpu())
    record = self.logger.record
    record("train/entropy_loss", -read.entropy.mean().item())
    record("train/policy_gradient_loss", read.policy_loss.mean().item())
    record("train/value_loss", read.value_loss.mean().item())
    record("train/approx_kl", read.approx_kl[last_epoch:].mean().item())
    record("train/clip_fraction", read.clip_fraction.mean().item())
    record("train/loss", loss.item())
    record("train/explained_variance", utils.explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
    if hasattr(policy, "log_std"):
        record("train/std", policy.log_std.exp().mean().item())
    record("train/n_updates", self._n_updates, exclude="tensorboard")
    record("train/clip_range", clip_range)
    if clip_range_vf is not None:
        record("train/clip_range_vf", clip_range_vf)


def train(self: Any) -> None:
    """`stable_baselines3.PPO.train`."""
    discrete = isinstance(self.action_space, spaces.Discrete)

    def loss_of_minibatch(data: Any, config: LossConfig) -> PPOLoss:
        actions = data.actions.long().flatten() if discrete else data.actions
        return loss_of(self.policy, (data.observations, actions), data, config)

    update(self, loss_of_minibatch)


class PPO(stable_baselines3.PPO):
    """`stable_baselines3.PPO` with our advantages and our loss."""

    train = train

    def _setup_model(self) -> None:
        if self.rollout_buffer_class is None:
            self.rollout_buffer_class = (
                DictRolloutBuffer if isinstance(self.observation_space, spaces.Dict) else RolloutBuffer
            )
        super()._setup_model()


_BUFFERS = "stable_baselines3.common.buffers"
_integration = _seam.Integration(
    "sb3",
    "stable-baselines3",
    "2.3",
    "3",
    [
        _seam.Seam(
            f"{_BUFFERS}:RolloutBuffer.compute_returns_and_advantage",
            compute_returns_and_advantage,
            "self, last_values, dones",
        ),
        _seam.Seam("stable_baselines3.ppo.ppo:PPO.train", train, "self"),
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
