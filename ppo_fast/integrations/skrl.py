"""skrl: the advantages of its PyTorch agents, and the update of PPO, on our kernels.

    from ppo_fast.integrations.skrl import PPO          # a subclass: nothing else changes

`enable()` puts `compute_gae` in place of that function in the modules of A2C, AMP, PPO, RPO, TRPO, their recurrent forms, IPPO
and MAPPO, and our update into `skrl.agents.torch.ppo.PPO`. Theirs: `compute_gae` and `PPO.update` in `agents/torch/*/*.py`.
With skrl 2.0 the advantages only: its update samples otherwise. Before 2.0 they are computed by a function inside the update,
where nothing can be put in its place.

Networks, minibatches, samples, scaler and optimizer are theirs and in their order, so results differ in rounding only. Gaussian
and categorical policies go into the fused loss, of others the log-probabilities that they answer. Losses are read from the
device once an update and the divergence for the learning rate once an epoch, with `kl_threshold` once a minibatch. A rollout of
one step of one environment is left unnormalised where theirs is NaN. As theirs, the trace runs on over a truncated step unless
`time_limit_bootstrap` is set; and policies with `reduction="none"` take their update.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import LossConfig, categorical_ppo_loss, gae, normal_ppo_loss, ppo_loss, whiten
from ..config import STATS
from ..outputs import PPOLoss, Stats
from . import _seam

_version = _seam.require("skrl", "2.0", "2.2")
import skrl  # noqa: E402
from skrl.agents.torch.ppo import ppo  # noqa: E402
from skrl.models.torch.categorical import CategoricalMixin  # noqa: E402
from skrl.models.torch.gaussian import GaussianMixin  # noqa: E402
from skrl.resources.schedulers.torch import KLAdaptiveLR  # noqa: E402

_theirs = ppo.PPO.update


def compute_gae(
    *,
    rewards: Tensor,
    terminated: Tensor,
    values: Tensor,
    truncated: Tensor | None = None,
    last_values: Tensor | None = None,
    next_values: Tensor | None = None,
    discount_factor: float = 0.99,
    lambda_coefficient: float = 0.95,
    time_limit_bootstrap: bool = False,
) -> tuple[Tensor, Tensor]:
    """skrl's function of this name, in each of its signatures: (returns, normalised advantages)."""
    last = next_values if last_values is None else last_values
    ends = terminated | truncated if time_limit_bootstrap and truncated is not None else terminated
    advantages, returns = gae(rewards, values, last, terminated=ends, gamma=discount_factor, lam=lambda_coefficient)
    return returns, whiten(advantages)


def in_place_of(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`compute_gae`, and where rewards or values are not what skrl's memory holds, theirs."""

    def compute(*, rewards: Tensor, values: Tensor, **rest: Any) -> Any:
        usual = rewards.dtype == values.dtype == torch.float32 and rewards.shape == values.shape
        return (compute_gae if usual else theirs)(rewards=rewards, values=values, **rest)

    return compute


#: The `act` and `get_entropy` of policies whose parameters the fused losses take.
GAUSSIAN = GaussianMixin.act, GaussianMixin.get_entropy
CATEGORICAL = CategoricalMixin.act, CategoricalMixin.get_entropy


def loss_of(self: Any, inputs: Any, actions: Tensor, stored: list[Tensor], config: LossConfig) -> PPOLoss:
    """The loss of a minibatch; `stored` are its log-probabilities, values, returns and advantages, [B, 1]."""
    policy = self.policy
    _, outputs = policy.act({**inputs, "taken_actions": actions}, role="policy")
    methods = type(policy).act, type(policy).get_entropy
    gaussian = methods == GAUSSIAN and policy._g_reduction is torch.sum
    categorical = methods == CATEGORICAL and policy._c_unnormalized_log_prob
    log_prob = outputs["log_prob"].squeeze(-1)
    entropy = None
    if config.entropy_coef and not (gaussian or categorical):
        entropy = policy.get_entropy(role="policy").mean().expand_as(log_prob)
    predicted, _ = self.value.act(inputs, role="value")
    old_log_prob, old_values, returns, advantages, values = (x.squeeze(-1) for x in (*stored, predicted))
    critic: Any = {"values": values, "old_values": old_values, "returns": returns}
    rollout = old_log_prob, advantages, config
    if gaussian:
        return normal_ppo_loss(outputs["mean_actions"], outputs["log_std"], actions, *rollout, **critic)
    if categorical:
        return categorical_ppo_loss(outputs["net_output"], actions.long().squeeze(-1), *rollout, **critic)
    return ppo_loss(log_prob, *rollout, entropy=entropy, **critic)


def update(self: Any, *, timestep: int, timesteps: int) -> None:
    """`PPO.update`."""
    cfg, memory, policy, value = self.cfg, self.memory, self.policy, self.value
    if None in (getattr(policy, "_g_reduction", True), getattr(policy, "_mc_reduction", True)):
        return _theirs(self, timestep=timestep, timesteps=timesteps)
    autocast = {"device_type": self._device_type, "enabled": cfg.mixed_precision}

    def preprocessed(observations: Tensor, states: Tensor | None, **keywords: Any) -> dict[str, Any]:
        return {
            "observations": self._observation_preprocessor(observations, **keywords),
            "states": self._state_preprocessor(states, **keywords),
        }

    with torch.no_grad(), torch.autocast(**autocast):
        inputs = preprocessed(self._current_next_observations, self._current_next_states)
        value.enable_training_mode(False)
        last_values, _ = value.act(inputs, role="value")
        value.enable_training_mode(True)
        last_values = self._value_preprocessor(last_values, inverse=True)
    rewards, terminated, truncated, values = (
        memory.get_tensor_by_name(name) for name in ("rewards", "terminated", "truncated", "values")
    )
    returns, advantages = compute_gae(
        rewards=rewards, terminated=terminated, truncated=truncated, values=values, last_values=last_values,
        discount_factor=cfg.discount_factor, lambda_coefficient=cfg.gae_lambda,
        time_limit_bootstrap=cfg.time_limit_bootstrap,
    )  # fmt: skip
    memory.set_tensor_by_name("values", self._value_preprocessor(values, train=True))
    memory.set_tensor_by_name("returns", self._value_preprocessor(returns, train=True))
    memory.set_tensor_by_name("advantages", advantages)

    config = LossConfig.preset(
        "skrl", clip_low=cfg.ratio_clip, clip_high=cfg.ratio_clip, value_clip=cfg.value_clip if cfg.value_clip > 0 else None,
        value_coef=cfg.value_loss_scale, entropy_coef=cfg.entropy_loss_scale,
    )  # fmt: skip
    parameters = list(
        policy.parameters() if policy is value else itertools.chain(policy.parameters(), value.parameters())
    )
    applied: list[Tensor] = []  # statistics of every minibatch that was a step
    for epoch in range(cfg.learning_epochs):
        divergences: list[Tensor] = []
        for observations, states, actions, *stored in memory.sample(
            names=self._tensors_names, batch_size=len(memory), mini_batches=cfg.mini_batches
        ):
            with torch.autocast(**autocast):
                inputs = preprocessed(observations, states, train=not epoch)
                loss, stats = loss_of(self, inputs, actions, stored, config)
            divergences.append(stats.approx_kl)
            if cfg.kl_threshold and stats.approx_kl > cfg.kl_threshold:
                break
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            if skrl.config.torch.is_distributed:
                policy.reduce_parameters()
                if policy is not value:
                    value.reduce_parameters()
            if cfg.grad_norm_clip > 0:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_norm_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            applied.append(stats.vector)
        if isinstance(self.scheduler, KLAdaptiveLR):
            divergence = torch.stack(divergences).mean()
            if skrl.config.torch.is_distributed:
                torch.distributed.all_reduce(divergence, op=torch.distributed.ReduceOp.SUM)
                divergence /= skrl.config.torch.world_size
            self.scheduler.step(divergence.item())
        elif self.scheduler:
            self.scheduler.step()

    total = Stats(torch.stack(applied).double().sum(0)).to_dict() if applied else dict.fromkeys(STATS, 0.0)
    steps = cfg.learning_epochs * cfg.mini_batches
    self.track_data("Loss / Policy loss", total["policy_loss"] / steps)
    self.track_data("Loss / Value loss", cfg.value_loss_scale * total["value_loss"] / steps)
    if cfg.entropy_loss_scale:
        self.track_data("Loss / Entropy loss", -cfg.entropy_loss_scale * total["entropy"] / steps)
    self.track_data("Policy / Standard deviation", policy.distribution(role="policy").stddev.mean().item())
    if self.scheduler:
        self.track_data("Learning / Learning rate", self.scheduler.get_last_lr()[0])


class PPO(ppo.PPO):
    """`skrl.agents.torch.ppo.PPO` with our advantages and our update."""

    if _version >= "2.1":
        update = update


_AGENTS = [f"agents.torch.{name}.{name}{rnn}" for name in ("a2c", "ppo", "rpo", "trpo") for rnn in ("", "_rnn")]
_GAE = (
    "*, rewards, terminated, values, next_values, discount_factor, lambda_coefficient",
    "*, rewards, terminated, truncated, values, last_values, discount_factor, lambda_coefficient, time_limit_bootstrap",
)


def _gae_seam(name: str) -> _seam.Seam:
    module = importlib.import_module(f"skrl.{name}")
    return _seam.Seam(f"skrl.{name}:compute_gae", in_place_of(module.compute_gae), _GAE)


_seams = [
    _gae_seam(name)
    for name in (*_AGENTS, "agents.torch.amp.amp", "multi_agents.torch.ippo.ippo", "multi_agents.torch.mappo.mappo")
]
if _version >= "2.1":
    _seams.append(_seam.Seam("skrl.agents.torch.ppo.ppo:PPO.update", update, "self, *, timestep, timesteps"))
_integration = _seam.Integration("skrl", "skrl", "2.0", "2.2", _seams)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
