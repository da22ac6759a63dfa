"""From a rollout to new parameters: advantages, then epochs of minibatches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast.config import STATS

from .config import ControlConfig
from .errors import UserError
from .networks import ActorCritic
from .normalize import RewardNormalizer
from .policies import Batch, Policy
from .rollout import Collector

_APPROX_KL = STATS.index("approx_kl")


def loss_config(config: ControlConfig) -> pf.LossConfig:
    return pf.LossConfig(
        clip_low=min(config.clip_coef, 1.0),
        clip_high=config.clip_coef,
        value_clip=config.clip_coef if config.clip_value_loss else None,
        value_coef=config.value_coef,
        entropy_coef=config.entropy_coef,
        normalize_advantages=config.normalize_advantages,
    )


class Learner:
    """Owns the optimiser. Filler steps of next-step autoreset never reach a minibatch, so no mean counts them."""

    def __init__(self, config: ControlConfig, policy: Policy, net: ActorCritic, generator: torch.Generator) -> None:
        self.config, self.policy, self.net, self.generator = config, policy, net, generator
        self.loss_config = loss_config(config)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, eps=config.adam_eps, fused=True)

    @torch.no_grad()
    def batch(self, rollout: Collector, normalizer: RewardNormalizer | None) -> Batch:
        """Values, log-probabilities, advantages and returns of a rollout."""
        t, n = rollout.rewards.shape
        net, policy = self.net, self.policy
        raw = rollout.rewards
        done = rollout.terminated | rollout.truncated
        rewards = raw if normalizer is None else normalizer(raw, done, rollout.valid)
        values = net.critic(rollout.obs.view((t + 1) * n, -1)).view(t + 1, n)
        final_values = rollout.final_values(values)
        filler = self.config.autoreset == "next_step"
        advantages, returns = pf.gae(
            torch.from_numpy(rewards.astype(np.float32)),
            values[:-1],
            values[-1],
            terminated=torch.from_numpy(rollout.terminated),
            truncated=None if final_values is None else torch.from_numpy(rollout.truncated & ~rollout.terminated),
            final_values=final_values,
            mask=torch.from_numpy(rollout.valid) if filler else None,
            gamma=self.config.gamma,
            lam=self.config.gae_lambda,
        )
        actions = rollout.actions.view(t * n, *policy.action_shape)
        mask = None if rollout.masks is None else rollout.masks[:-1].reshape(t * n, -1)
        if mask is not None and filler:
            # a terminal state may allow nothing; its row is never used, but must not look like bad input to an op
            mask = mask | ~torch.from_numpy(rollout.valid).view(-1, 1)
        log_prob = policy.log_prob(rollout.params.view(t * n, -1), net.log_std, actions, mask)
        obs = rollout.obs[:-1].reshape(t * n, -1)
        return Batch(obs, actions, mask, log_prob, values[:-1].reshape(-1), advantages.reshape(-1), returns.reshape(-1))

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """As `optimizer.load_state_dict`, which does not compare shapes."""
        shapes = {i: p.shape for i, p in enumerate(self.net.parameters())}
        for i, moments in state["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != shapes.get(i):
                    raise ValueError(f"{name} of shape {tuple(moments[name].shape)} for parameter {i}")
        self.optimizer.load_state_dict(state)

    def update(self, batch: Batch, rows: Tensor, learning_rate: float) -> tuple[Tensor, int]:
        """Epochs over the `rows` of a batch; mean statistics (and gradient norm, last) and the gradient steps taken."""
        config, net, optimizer = self.config, self.net, self.optimizer
        parameters = list(net.parameters())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        stats, norms = [], []
        for _ in range(config.update_epochs):
            order = rows[torch.randperm(len(rows), generator=self.generator)]
            for index in order.tensor_split(min(config.num_minibatches, len(rows))):
                params, values = net(batch.obs[index])
                out = self.policy.loss(params, net.log_std, values, batch, index, self.loss_config)
                optimizer.zero_grad()
                out.loss.backward()
                norms.append(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
                optimizer.step()
                stats.append(out.stats.vector)
            if config.target_kl is not None and float(stats[-1][_APPROX_KL]) > config.target_kl:
                break
        norm = torch.stack(norms).mean()
        if not torch.isfinite(norm):
            raise UserError(
                "training diverged: the gradient is not finite; expected a lower --learning-rate or --clip-coef "
                f"than {config.learning_rate:g} and {config.clip_coef:g}, or rewards of smaller scale"
            )
        return torch.cat([torch.stack(stats).mean(0), norm[None]]), len(stats)
