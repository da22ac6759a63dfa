"""The three kinds of actions: how many parameters, how to sample, log-probabilities and the loss, on the public ops.

Sampling draws the noise of a whole rollout at once: `argmax(logits + Gumbel noise)` is a sample of softmax(logits), and
`mean + std · normal noise` one of the Gaussian, so a step of the rollout costs two small operations.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

import ppo_fast as pf

from .errors import UserError


class Batch:
    """A rollout as flat rows; `index` of a minibatch points into it."""

    __slots__ = ("action_mask", "actions", "advantages", "log_prob", "obs", "returns", "rollout_log_prob", "values")

    def __init__(
        self, obs: Tensor, actions: Tensor, action_mask: Tensor | None, log_prob: Tensor, values: Tensor,
        advantages: Tensor, returns: Tensor, rollout_log_prob: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.rollout_log_prob = rollout_log_prob  # of what sampled, where that is not the learner's policy
        self.obs, self.actions, self.action_mask, self.log_prob = obs, actions, action_mask, log_prob
        self.values, self.advantages, self.returns = values, advantages, returns

    def take(self, other: Batch) -> None:
        """The rows of `other` into the memory of this one, which a CUDA graph reads; shared buffers hold them already."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None and mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)


class Policy(Protocol):
    num_params: int  # outputs of the policy network
    num_log_std: int
    mask_width: int  # entries of an action mask; 0: the actions cannot be masked
    action_shape: tuple[int, ...]  # of one stored action
    action_dtype: torch.dtype

    def noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Fills `out` [T, N, num_params] for one rollout."""

    def sample(self, params: Tensor, log_std: Tensor, noise: Tensor, mask: Tensor | None, out: Tensor) -> None:
        """One step: actions into `out` [N, *action_shape]."""

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Stored actions [N, ...] as the environment takes them."""

    def log_prob(self, params: Tensor, log_std: Tensor, actions: Tensor, mask: Tensor | None) -> Tensor: ...

    def loss(
        self, params: Tensor, log_std: Tensor, values: Tensor, batch: Batch, index: Tensor, config: pf.LossConfig
    ) -> pf.PPOLoss: ...


def _gumbel(out: Tensor, generator: torch.Generator) -> None:
    # exponential noise can round to 0, whose logarithm would beat, or turn to NaN, a masked logit
    out.exponential_(generator=generator).clamp_(min=1e-20).log_().neg_()


def _perturb(params: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
    noisy = params + noise
    return noisy if mask is None else noisy.masked_fill_(~mask, -torch.inf)


class CategoricalPolicy:
    """Discrete actions."""

    num_log_std = 0
    action_shape: tuple[int, ...] = ()
    action_dtype = torch.int64

    def __init__(self, space: spaces.Discrete) -> None:
        self.num_params = self.mask_width = int(space.n)
        self.start = int(space.start)

    def noise(self, out: Tensor, generator: torch.Generator) -> None:
        _gumbel(out, generator)

    def sample(self, params: Tensor, log_std: Tensor, noise: Tensor, mask: Tensor | None, out: Tensor) -> None:
        torch.argmax(_perturb(params, noise, mask), -1, out=out)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        return actions + self.start if self.start else actions

    def log_prob(self, params: Tensor, log_std: Tensor, actions: Tensor, mask: Tensor | None) -> Tensor:
        return pf.categorical_log_prob(params, actions, action_mask=mask, entropy=False)[0]

    def loss(
        self, params: Tensor, log_std: Tensor, values: Tensor, batch: Batch, index: Tensor, config: pf.LossConfig
    ) -> pf.PPOLoss:
        return pf.categorical_ppo_loss(
            params, batch.actions, batch.log_prob, batch.advantages, config, values=values, old_values=batch.values,
            returns=batch.returns, rollout_log_prob=batch.rollout_log_prob, action_mask=batch.action_mask, index=index,
        )  # fmt: skip


class MultiCategoricalPolicy:
    """MultiDiscrete actions: independent categoricals side by side."""

    num_log_std = 0
    action_dtype = torch.int64

    def __init__(self, space: spaces.MultiDiscrete) -> None:
        if space.nvec.ndim != 1:
            raise UserError(f"--env-id: expected MultiDiscrete actions with one axis, got shape {space.nvec.shape}")
        self.nvec = [int(n) for n in space.nvec]
        self.num_params = self.mask_width = sum(self.nvec)
        self.action_shape: tuple[int, ...] = (len(self.nvec),)
        self.start = np.asarray(space.start)

    def noise(self, out: Tensor, generator: torch.Generator) -> None:
        _gumbel(out, generator)

    def sample(self, params: Tensor, log_std: Tensor, noise: Tensor, mask: Tensor | None, out: Tensor) -> None:
        for head, logits in enumerate(_perturb(params, noise, mask).split(self.nvec, -1)):
            out[:, head] = logits.argmax(-1)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        return actions + self.start

    def log_prob(self, params: Tensor, log_std: Tensor, actions: Tensor, mask: Tensor | None) -> Tensor:
        return pf.multi_categorical_log_prob(params, actions, self.nvec, action_mask=mask, entropy=False)[0]

    def loss(
        self, params: Tensor, log_std: Tensor, values: Tensor, batch: Batch, index: Tensor, config: pf.LossConfig
    ) -> pf.PPOLoss:
        mask = None if batch.action_mask is None else batch.action_mask[index]
        log_prob, entropy = pf.multi_categorical_log_prob(params, batch.actions[index], self.nvec, action_mask=mask)
        rollout_log_prob = None if batch.rollout_log_prob is None else batch.rollout_log_prob[index]
        return pf.ppo_loss(
            log_prob, batch.log_prob[index], batch.advantages[index], config, values=values,
            old_values=batch.values[index], returns=batch.returns[index], entropy=entropy,
            rollout_log_prob=rollout_log_prob,
        )  # fmt: skip


class NormalPolicy:
    """Box actions: a diagonal Gaussian, clipped to the box on its way to the environment only."""

    mask_width = 0
    action_dtype = torch.float32

    def __init__(self, space: spaces.Box) -> None:
        self.num_params = self.num_log_std = int(np.prod(space.shape))
        self.action_shape: tuple[int, ...] = (self.num_params,)
        self.space = space
        self.low, self.high = space.low.reshape(-1), space.high.reshape(-1)

    def noise(self, out: Tensor, generator: torch.Generator) -> None:
        out.normal_(generator=generator)

    def sample(self, params: Tensor, log_std: Tensor, noise: Tensor, mask: Tensor | None, out: Tensor) -> None:
        torch.addcmul(params, log_std.exp(), noise, out=out)

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        return np.clip(actions, self.low, self.high).reshape(-1, *self.space.shape).astype(self.space.dtype)

    def log_prob(self, params: Tensor, log_std: Tensor, actions: Tensor, mask: Tensor | None) -> Tensor:
        return pf.normal_log_prob(params, log_std, actions, entropy=False)[0]

    def loss(
        self, params: Tensor, log_std: Tensor, values: Tensor, batch: Batch, index: Tensor, config: pf.LossConfig
    ) -> pf.PPOLoss:
        return pf.normal_ppo_loss(
            params, log_std, batch.actions, batch.log_prob, batch.advantages, config, values=values,
            old_values=batch.values, returns=batch.returns, rollout_log_prob=batch.rollout_log_prob, index=index,
        )  # fmt: skip


def make_policy(space: spaces.Space) -> Policy:
    if isinstance(space, spaces.Discrete):
        return CategoricalPolicy(space)
    if isinstance(space, spaces.MultiDiscrete):
        return MultiCategoricalPolicy(space)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return NormalPolicy(space)
    raise UserError(f"--env-id: expected actions of Discrete, MultiDiscrete or (floating) Box, got {space}")
