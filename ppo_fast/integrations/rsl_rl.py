"""RSL-RL: returns, advantages and the update of its PPO on our kernels.

    "algorithm": {"class_name": "ppo_fast.integrations.rsl_rl:PPO", ...}        # in the runner's configuration

`enable()` puts the same two methods into `rsl_rl.algorithms.PPO`. Theirs: `algorithms/ppo.py` (`compute_returns`, `update`).
Networks, minibatches, samples and optimizer are theirs and in their order, so results differ in rounding only. Gaussians go
into the fused loss; of any other distribution, and of models with a `get_output_log_prob` of their own, the loss takes
log-probabilities and entropy as they answer. Losses are read from the device once an update, and the KL divergence that sets
the learning rate while the backward pass runs. With RND or symmetry `update` is theirs. A rollout of one step of one
environment is left unnormalised where theirs is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import LossConfig, gae, normal_ppo_loss, ppo_loss, whiten
from ..outputs import PPOLoss, Stats
from . import _seam

_seam.require("rsl-rl-lib", "5.5", "5.6")
import rsl_rl.algorithms  # noqa: E402
from rsl_rl.models import MLPModel  # noqa: E402
from rsl_rl.modules import distribution  # noqa: E402
from rsl_rl.storage import RolloutStorage  # noqa: E402

#: Minibatches of rollouts up to this size are gathered once; larger ones in every epoch, so that no second copy of the
#: observations is held.
WHOLE_ROLLOUT_BYTES = 64 << 20

_theirs = rsl_rl.algorithms.PPO.update


def compute_returns(self: Any, obs: Any) -> None:
    """`PPO.compute_returns`, in one pass over the storage."""
    storage = self.storage
    hidden_state = self.critic.get_hidden_state()
    last_values = self.critic(obs).detach()
    self.critic.reset(hidden_state=hidden_state)  # the next rollout goes on from where this one ended
    rewards, values, dones, returns = (
        x.squeeze(-1) for x in (storage.rewards, storage.values, storage.dones, storage.returns)
    )
    advantages, _ = gae(
        rewards, values, last_values.reshape(-1), terminated=dones, gamma=self.gamma, lam=self.lam,
        out=(torch.empty_like(values), returns),
    )  # fmt: skip
    if not self.normalize_advantage_per_mini_batch:
        advantages = whiten(advantages)
    storage.advantages = advantages.unsqueeze(-1)


def loss_of(self: Any, batch: Any, values: Tensor, config: LossConfig) -> PPOLoss:
    """The loss of a minibatch whose observations the actor has just seen."""
    stored = (batch.old_actions_log_prob, batch.advantages, values, batch.values, batch.returns)
    old_log_prob, advantages, values, old_values, returns = (x.squeeze(-1) for x in stored)
    critic: Any = {"values": values, "old_values": old_values, "returns": returns}
    actor = self._raw_actor
    plain = type(actor).get_output_log_prob is MLPModel.get_output_log_prob
    kind = type(actor.distribution) if plain else None
    if kind is distribution.GaussianDistribution:  # one deviation for all rows
        mean, log_std = actor.distribution.mean, _log_std(actor.distribution)
    elif kind is distribution.HeteroscedasticGaussianDistribution:
        mean, log_std = actor.distribution.mean, actor.distribution.std.log()
    else:
        log_prob, entropy = actor.get_output_log_prob(batch.actions), actor.output_entropy
        return ppo_loss(log_prob, old_log_prob, advantages, config, entropy=entropy, **critic)
    return normal_ppo_loss(mean, log_std, batch.actions, old_log_prob, advantages, config, **critic)


def _log_std(gaussian: Any) -> Tensor:
    if gaussian.std_type == "log":
        return gaussian.log_std_param.clamp(*gaussian.log_std_range)
    return gaussian.std_param.clamp(*gaussian.std_range).log()


class _Read:
    """A number of the device on its way to the host, while the device goes on."""

    def __init__(self, x: Tensor) -> None:
        self.copy = x.to("cpu", non_blocking=True)
        self.event = None
        if x.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()

    def item(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return self.copy.item()


@torch.inference_mode()
def divergence(self: Any, batch: Any) -> _Read:
    """Mean KL(old || new) of the minibatch, over all ranks."""
    actor = self.actor
    mean = actor.get_kl_divergence(batch.old_distribution_params, actor.output_distribution_params).mean()
    if self.is_multi_gpu:
        torch.distributed.all_reduce(mean, op=torch.distributed.ReduceOp.SUM)
        mean /= self.gpu_world_size
    return _Read(mean)


def adapt_learning_rate(self: Any, kl: float) -> None:
    """Within [1e-5, 1e-2], down where the policy moved too far and up where it hardly did; rank 0 decides."""
    if self.gpu_global_rank == 0:
        if kl > self.desired_kl * 2.0:
            self.learning_rate = max(1e-5, self.learning_rate / 1.5)
        elif 0.0 < kl < self.desired_kl / 2.0:
            self.learning_rate = min(1e-2, self.learning_rate * 1.5)
    if self.is_multi_gpu:
        rate = torch.tensor(self.learning_rate, device=self.device)
        torch.distributed.broadcast(rate, src=0)
        self.learning_rate = rate.item()
    for group in self.optimizer.param_groups:
        group["lr"] = self.learning_rate


def minibatches(self: Any) -> Iterable[Any]:
    """All minibatches of all epochs. Epochs share one permutation, so theirs gathers the same minibatches in each."""
    storage, epochs = self.storage, self.num_learning_epochs
    if self.actor.is_recurrent or self.critic.is_recurrent:
        return storage.recurrent_mini_batch_generator(self.num_mini_batches, epochs)
    plain = type(storage).mini_batch_generator is RolloutStorage.mini_batch_generator
    if not plain or sum(x.nbytes for x in storage.observations.values()) > WHOLE_ROLLOUT_BYTES:
        return storage.mini_batch_generator(self.num_mini_batches, epochs)
    return list(storage.mini_batch_generator(self.num_mini_batches, 1)) * epochs


def update(self: Any) -> dict[str, float]:
    """`PPO.update`."""
    if self.rnd or self.symmetry:
        return _theirs(self)
    config = LossConfig.preset(
        "rsl_rl", clip_low=self.clip_param, clip_high=self.clip_param, value_coef=self.value_loss_coef,
        value_clip=self.clip_param if self.use_clipped_value_loss else None, entropy_coef=self.entropy_coef,
        normalize_advantages=self.normalize_advantage_per_mini_batch,
    )  # fmt: skip
    actor, critic, storage = self.actor, self.critic, self.storage
    adaptive = self.desired_kl is not None and self.schedule == "adaptive"
    mixed = {"device_type": torch.device(self.device).type, "enabled": self.use_mixed_precision}
    networks = [list(x.parameters()) for x in (actor, critic)]
    stats: list[Tensor] = []  # of every minibatch
    for batch in minibatches(self):
        with torch.amp.autocast(**mixed, dtype=torch.bfloat16):
            of_actor, of_critic = batch.hidden_states
            actor(batch.observations, masks=batch.masks, hidden_state=of_actor, stochastic_output=True)
            values = critic(batch.observations, masks=batch.masks, hidden_state=of_critic)
        kl = divergence(self, batch) if adaptive else None
        loss, of_batch = loss_of(self, batch, values, config)
        stats.append(of_batch.vector)
        self.optimizer.zero_grad()
        loss.backward()
        if self.is_multi_gpu:
            self.reduce_parameters()
        for parameters in networks:
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if kl is not None:
            adapt_learning_rate(self, kl.item())
        self.optimizer.step()
    observations = storage.observations.flatten(0, 1)
    for network in (actor, critic):
        network.update_normalization(observations)
    storage.clear()
    mean = Stats(torch.stack(stats).double().mean(0)).to_dict()
    return {"value": mean["value_loss"], "surrogate": mean["policy_loss"], "entropy": mean["entropy"]}


class PPO(rsl_rl.algorithms.PPO):
    """`rsl_rl.algorithms.PPO` with our returns and our update."""

    compute_returns = compute_returns
    update = update


_PPO = "rsl_rl.algorithms.ppo:PPO"
_integration = _seam.Integration(
    "rsl_rl",
    "rsl-rl-lib",
    "5.5",
    "5.6",
    [
        _seam.Seam(f"{_PPO}.compute_returns", compute_returns, "self, obs"),
        _seam.Seam(f"{_PPO}.update", update, "self"),
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
