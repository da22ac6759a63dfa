"""From a rollout to new parameters: advantages, then epochs of minibatches.

On a GPU nothing here waits for it but `named_statistics`, and after each epoch `target_kl`. What changes from one
iteration to the next, learning rate and clip, is read by the kernels from memory, as a graph holds no other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast.config import STATS

from .compress import NO_MISMATCH, correction, mismatch
from .config import ControlConfig
from .device import upload
from .distributed import ALONE, Ranks
from .errors import UserError
from .networks import ActorCritic
from .normalize import RewardNormalizer
from .policies import Batch, Policy
from .replay import CudaGraphs, Minibatches, Replay
from .rollout import Collector

_APPROX_KL = STATS.index("approx_kl")


def clips(config: ControlConfig, share: float) -> dict[str, Any]:
    """The numbers of a loss that `share` of the clip range gives."""
    clip = config.clip_coef * share
    return {"clip_low": min(clip, 1.0), "clip_high": clip, **({"value_clip": clip} if config.clip_value_loss else {})}


class Learner:
    """Owns the optimiser. Filler steps of next-step autoreset never reach a minibatch, so no mean counts them."""

    def __init__(
        self,
        config: ControlConfig,
        policy: Policy,
        net: ActorCritic,
        generator: torch.Generator,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.policy, self.net, self.generator = config, policy, net, generator
        self.ranks, self.model, self.share = ranks, ranks.parallel(net), 1.0
        self.device = net.log_std.device
        self.parameters = list(net.parameters())
        self.loss_config = pf.LossConfig(
            **clips(config, 1.0), value_coef=config.value_coef, entropy_coef=config.entropy_coef,
            normalize_advantages=config.normalize_advantages and ranks.alone,  # else over all ranks, in `step`
            **correction(config),
        ).on(self.device)  # fmt: skip
        # the types that torch's fused kernels take: the CPU's reads a double, that of a GPU a float
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        self.learning_rate = torch.tensor(config.learning_rate, dtype=dtype, device=self.device)
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=self.learning_rate, eps=config.adam_eps, fused=True, capturable=config.cuda_graph
        )
        self.minibatches = Replay(self.step, CudaGraphs(self.device)) if config.cuda_graph else Minibatches(self.step)

    @torch.no_grad()
    def batch(self, rollout: Collector, normalizer: RewardNormalizer | None) -> Batch:
        """Values, log-probabilities, advantages and returns of a rollout."""
        t, n = rollout.rewards.shape
        net, policy = self.net, self.policy

        def there(x: np.ndarray) -> Tensor:
            return upload(torch.from_numpy(x), self.device)

        raw = rollout.rewards
        done = rollout.terminated | rollout.truncated
        if normalizer is None:
            rewards = raw
        else:  # on every rank for all of them: its statistics are one sequence in time
            columns = [self.ranks.columns(x) for x in (raw, done, rollout.valid)]
            rewards = normalizer(*columns)[:, self.ranks.block(self.config.num_envs)]
        values = rollout.values()
        final_values = rollout.final_values(values)
        filler = self.config.autoreset == "next_step"
        actions = rollout.actions.view(t * n, *policy.action_shape)
        mask = None if rollout.masks is None else rollout.masks[:-1].reshape(t * n, -1)
        if mask is not None and filler:
            # a terminal state may allow nothing; its row is never used, but must not look like bad input to an op
            mask = mask | ~there(rollout.valid).view(-1, 1)
        log_prob = policy.log_prob(rollout.params.view(t * n, -1), net.log_std, actions, mask)
        obs, rollout_log_prob = rollout.obs[:-1].reshape(t * n, -1), None
        if self.config.rollout_policy != "full":  # another one sampled
            rollout_log_prob, log_prob = log_prob, policy.log_prob(net.actor(obs), net.log_std, actions, mask)
        log_prob, advantages, returns = self.estimate(
            rollout, obs, actions, mask, log_prob,
            (there(rewards.astype(np.float32)), values[:-1], values[-1]),
            terminated=there(rollout.terminated),
            truncated=None if final_values is None else there(rollout.truncated & ~rollout.terminated),
            final_values=final_values,
            mask=there(rollout.valid) if filler else None,
            gamma=self.config.gamma, lam=self.config.gae_lambda,
        )  # fmt: skip
        streams = values[:-1].reshape(-1), advantages.reshape(-1), returns.reshape(-1)
        return Batch(obs, actions, mask, log_prob, *streams, rollout_log_prob)

    def estimate(
        self, rollout: Collector, obs: Tensor, actions: Tensor, action_mask: Tensor | None, log_prob: Tensor,
        trajectory: tuple[Tensor, Tensor, Tensor], **borders: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Log-probabilities that ratios are taken to, advantages and returns. `log_prob`: as the actions were drawn."""
        advantages, returns = pf.gae(*trajectory, **borders)
        return log_prob, advantages, returns

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """As `optimizer.load_state_dict`, which does not compare shapes."""
        shapes = {i: p.shape for i, p in enumerate(self.parameters)}
        for i, moments in state["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != shapes.get(i):
                    raise ValueError(f"{name} of shape {tuple(moments[name].shape)} for parameter {i}")
        self.optimizer.load_state_dict(state)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate  # not the copy that was loaded
        self.minibatches.reset()

    def pieces(self, batch: Batch, rows: Tensor) -> Iterable[tuple[Any, float]]:
        """The minibatches of an epoch over the `rows` of a batch, those of all ranks, in random order: this rank's part of each,
        and how much of it that is."""
        order = rows[torch.randperm(len(rows), generator=self.generator)]
        parts, shares = self.ranks.shares(order, min(self.config.num_minibatches, len(rows)), self.config.num_envs)
        indices = upload(torch.cat(parts), self.device).split([len(part) for part in parts])
        return zip(indices, shares, strict=True)

    def forward(self, batch: Batch, index: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Of one minibatch: parameters of the actions, values, and its rows of the batch."""
        return *self.model(batch.obs[index]), index

    def step(self, batch: Batch, index: Any) -> tuple[Tensor, Tensor]:
        """One gradient step: statistics of the loss, and the norm of the gradient."""
        params, values, index = self.forward(batch, index)
        if self.config.normalize_advantages:
            batch = self.ranks.normalized(batch, index)
        out = self.policy.loss(params, self.net.log_std, values, batch, index, self.loss_config)
        self.optimizer.zero_grad()
        self.ranks.weighted(out.loss, self.share).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        return out.stats.vector, norm

    def update(self, batch: Batch, rows: Tensor, learning_rate: float, clip_share: float = 1.0) -> tuple[Tensor, int]:
        """Epochs over the `rows` of a batch, those of all ranks; mean statistics (and gradient norm, last) and the gradient
        steps taken."""
        config = self.config
        self.learning_rate.fill_(learning_rate)
        if config.anneal_clip:
            self.loss_config.set(**clips(config, clip_share))
        self.minibatches.begin(batch)
        stats, norms = [], []
        for _ in range(config.update_epochs):
            for index, share in self.pieces(batch, rows):
                self.share = share
                statistics, norm = self.minibatches(index)
                stats.append(self.ranks.part(statistics, share))
                norms.append(norm)
            if config.target_kl is not None and float(self.ranks.sum(stats[-1])[_APPROX_KL]) > config.target_kl:
                break
        return torch.cat([self.ranks.sum(torch.stack(stats).mean(0)), torch.stack(norms).mean()[None]]), len(stats)

    def named_statistics(self, stats: Tensor, batch: Batch, rows: Tensor) -> dict[str, float]:
        """What `update` returned and how well the values explained the returns, read from the device at once."""
        rows = upload(rows, self.device)
        returns = batch.returns[rows]
        variances = [self.ranks.variance(x) for x in (returns, returns - batch.values[rows])]
        off: dict[str, Tensor] = {}
        if batch.rollout_log_prob is not None:
            off = mismatch(batch.log_prob[rows], batch.rollout_log_prob[rows], self.config)
        read = torch.cat([stats, torch.stack([*variances, *off.values()])]).tolist()
        named = {**NO_MISMATCH, **dict(zip((*STATS, "grad_norm", "variance", "unexplained", *off), read, strict=True))}
        variance, unexplained = named.pop("variance"), named.pop("unexplained")
        if not math.isfinite(named["grad_norm"]):
            config = self.config
            raise UserError(
                "training diverged: the gradient is not finite; expected a lower --learning-rate or --clip-coef "
                f"than {config.learning_rate:g} and {config.clip_coef:g}, or rewards of smaller scale"
            )
        return {**named, "explained_variance": 1.0 - unexplained / variance if variance > 0 else math.nan}
