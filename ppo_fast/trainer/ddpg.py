"""DDPG (Lillicrap et al. 2015) on the parts of the PPO trainer: a baseline for Box actions, in plain torch.

With critic Q, actor μ, their slow copies Q' and μ', and a minibatch of (s, a, r, d, s') out of the replay buffer, where
d is 1 for terminal s' and 0 where the episode was only cut:

    critic   minimises mean (Q(s, a) - y)²,  y = r + γ·(1 - d)·Q'(s', μ'(s'))
    actor    minimises -mean Q(s, μ(s))
    targets  θ' ← θ' + τ·(θ - θ')

Actions lie in [-1, 1] everywhere but on their way to the environment, which gets low + (a + 1)/2·(high - low).
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from . import control
from .ddpg_config import PRESETS, DDPGConfig
from .envs import MakeEnv
from .errors import UserError, one_line
from .replay_buffer import ReplayBuffer, Transitions
from .report import Snapshot
from .rollout import Episode
from .spaces import MaskReader, ObservationCodec

__all__ = ["PRESETS", "DDPGConfig", "DDPGTrainer", "train"]


class ActionScale:
    """Actions in [-1, 1] as those of a bounded Box."""

    def __init__(self, space: spaces.Space) -> None:
        if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
            raise UserError(f"--algorithm ddpg: expected an environment with (floating) Box actions, got {space}")
        if not space.is_bounded():
            raise UserError(f"--algorithm ddpg: expected Box actions with finite bounds, got {space}")
        self.space, self.dim = space, int(np.prod(space.shape))
        self.low, self.high = (x.reshape(-1).astype(np.float64) for x in (space.low, space.high))

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """[N, dim] in [-1, 1] -> [N, *shape] inside the box; halves, as high - low may overflow."""
        middle, half = self.low / 2 + self.high / 2, self.high / 2 - self.low / 2
        scaled = np.clip(middle + half * actions, self.low, self.high)
        return scaled.reshape(-1, *self.space.shape).astype(self.space.dtype)


class MLP(nn.Sequential):
    """Linear layers with ReLU between them. Weights and biases are uniform in ±1/√fan_in, those of the last in ±0.003."""

    def __init__(self, sizes: list[int], generator: torch.Generator) -> None:
        layers: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
            bound = 3e-3 if i == len(sizes) - 2 else 1 / math.sqrt(fan_in)
            for x in (layer.weight, layer.bias):
                nn.init.uniform_(x, -bound, bound, generator=generator)
            layers += [layer, nn.ReLU()]
        super().__init__(*layers[:-1])


class Networks(nn.Module):
    """Actor, critic, and their targets, which start as copies."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        sizes = [obs_dim, *hidden, action_dim], [obs_dim + action_dim, *hidden, 1]
        self.actor, self.critic = (MLP(s, generator) for s in sizes)
        self.actor_target, self.critic_target = (MLP(s, generator).requires_grad_(False) for s in sizes)
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())

    def act(self, obs: Tensor, target: bool = False) -> Tensor:
        """μ(s) in [-1, 1], [rows, actions]."""
        return torch.tanh((self.actor_target if target else self.actor)(obs))

    def value(self, obs: Tensor, actions: Tensor, target: bool = False) -> Tensor:
        """Q(s, a), [rows]."""
        return (self.critic_target if target else self.critic)(torch.cat([obs, actions], 1)).squeeze(1)


class Learner:
    """Owns the optimiser."""

    def __init__(self, config: DDPGConfig, net: Networks) -> None:
        self.config, self.net, self.updates = config, net, 0
        self.actor, self.critic = list(net.actor.parameters()), list(net.critic.parameters())
        self.trained: list[Tensor] = [*self.actor, *self.critic]
        self.targets: list[Tensor] = [*net.actor_target.parameters(), *net.critic_target.parameters()]
        groups = [
            {"params": self.actor, "lr": config.actor_learning_rate},
            {"params": self.critic, "lr": config.critic_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)

    def _step(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        """Adam on these parameters alone: the others have no gradient, which it skips."""
        for x, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            x.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update(self, batch: Transitions) -> Tensor:
        """One step of the critic, and when due of actor and targets: [critic loss, mean Q, actor loss or NaN]."""
        net, config = self.net, self.config
        with torch.no_grad():
            after = net.value(batch.next_obs, net.act(batch.next_obs, target=True), target=True)
            target = batch.rewards + config.gamma * (1 - batch.terminated) * after
        q = net.value(batch.obs, batch.actions)
        critic_loss, actor_loss = F.mse_loss(q, target), q.new_full((), math.nan)
        self._step(critic_loss, self.critic)
        self.updates += 1
        if self.updates % config.policy_frequency == 0:
            actor_loss = -net.value(batch.obs, net.act(batch.obs)).mean()
            self._step(actor_loss, self.actor)
            torch._foreach_lerp_(self.targets, self.trained, config.tau)
        return torch.stack([critic_loss, q.mean(), actor_loss]).detach()

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """As `optimizer.load_state_dict`, which does not compare shapes."""
        for i, moments in state["state"].items():
            if (
                moments["exp_avg"].shape != self.trained[i].shape
                or moments["exp_avg_sq"].shape != self.trained[i].shape
            ):
                raise ValueError(f"optimizer state of shape {tuple(moments['exp_avg'].shape)} for parameter {i}")
        self.optimizer.load_state_dict(state)


class Explorer:
    """Steps the environments with noise on the actions, and stores the transitions."""

    def __init__(
        self,
        config: DDPGConfig,
        envs: VectorEnv,
        codec: ObservationCodec,
        scale: ActionScale,
        net: Networks,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.config, self.envs, self.codec, self.scale, self.net = config, envs, codec, scale, net
        self.generator, self.device = generator, device
        n = config.num_envs
        # no more than the run can fill
        self.buffer = ReplayBuffer(min(config.buffer_size, config.planned_steps), codec.dim, scale.dim, device)
        self.raw_obs = torch.zeros(1, n, codec.dim)  # [1, N, obs], what is acted on next
        self.noise = torch.zeros(n, scale.dim)
        self.resetting = np.zeros(n, bool)  # next-step autoreset: the coming step is a filler
        self.episode_return = np.zeros(n)
        self.episode_length = np.zeros(n, np.int64)

    def begin(self, obs: Any, info: dict[str, Any]) -> None:
        MaskReader(self.codec, 0, obs, info)  # there are none of Box actions
        self.codec.write(obs, self.raw_obs[0].numpy())

    def _actions(self, at_random: bool) -> Tensor:
        if at_random:
            return torch.rand(self.noise.shape, generator=self.generator) * 2 - 1
        config = self.config
        decay = 1 - config.ou_theta if config.noise == "ou" else 0.0  # without memory it is Gaussian noise
        drawn = torch.randn(self.noise.shape, generator=self.generator)
        self.noise = decay * self.noise + config.noise_std * drawn
        with torch.no_grad():
            actions = self.net.act(self.raw_obs[0].to(self.device)).cpu()
        return (actions + self.noise).clamp_(-1, 1)

    def step(self, global_step: int, at_random: bool) -> list[Episode]:
        """One step of each environment; the episodes that ended with it, where the run has then `global_step` steps."""
        config, obs = self.config, self.raw_obs[0].clone()
        actions = self._actions(at_random)
        try:
            after, rewards, terminated, truncated, info = self.envs.step(self.scale.to_env(actions.numpy()))
        except Exception as error:  # an environment may raise anything; it stays attached as the cause
            raise UserError(f"environment {config.env_id} failed in a step: {one_line(error)}") from error
        self.codec.write(after, self.raw_obs[0].numpy())
        next_obs, done, valid = self.raw_obs[0].clone(), terminated | truncated, ~self.resetting
        if config.autoreset == "same_step":  # what came is the next episode's where one has ended
            for i in np.flatnonzero(done):
                next_obs[i] = torch.from_numpy(self.codec.one(info["final_obs"][i]))
        else:
            self.resetting = done.copy()
        for what, values in (("observation", next_obs.numpy()), ("reward", rewards)):
            if not np.isfinite(values).all():
                raise UserError(f"environment {config.env_id} returned a non-finite {what}")
        new = (torch.as_tensor(x, dtype=torch.float32) for x in (obs, actions, rewards, terminated, next_obs))
        self.buffer.add(Transitions(*(x[torch.from_numpy(valid)] for x in new)))
        self.noise[torch.from_numpy(done)] = 0.0
        return self._episodes(rewards, done, valid, global_step)

    def _episodes(self, rewards: np.ndarray, done: np.ndarray, valid: np.ndarray, step: int) -> list[Episode]:
        self.episode_return += np.where(valid, rewards, 0.0)
        self.episode_length += valid
        ended = [
            Episode(step, int(i), float(self.episode_return[i]), int(self.episode_length[i]))
            for i in np.flatnonzero(done)
        ]
        self.episode_return[done], self.episode_length[done] = 0.0, 0
        return ended

    def state_dict(self) -> dict[str, Any]:
        return {
            "obs": self.raw_obs[0].clone(), "noise": self.noise.clone(), "buffer": self.buffer.state_dict(),
            "resetting": torch.tensor(self.resetting), "episode_return": torch.tensor(self.episode_return),
            "episode_length": torch.tensor(self.episode_length),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.raw_obs[0].copy_(state["obs"])
        self.noise.copy_(state["noise"])
        self.buffer.load_state_dict(state["buffer"])
        self.resetting = state["resetting"].numpy().copy()
        self.episode_return = state["episode_return"].numpy().copy()
        self.episode_length = state["episode_length"].numpy().copy()


class DDPGTrainer(control.Trainer):
    """The state of a run and one iteration of it, `log_every` environment steps; no files, no output."""

    COLUMNS = (
        "global_step", "iteration", "episodes", "mean_return", "critic_loss", "actor_loss", "q_mean", "buffer",
        "steps_per_second",
    )  # fmt: skip
    config: DDPGConfig  # type: ignore[assignment]
    learner: Learner  # type: ignore[assignment]
    collector: Explorer  # type: ignore[assignment]

    def _build(self) -> None:
        config, envs = self.config, self.envs
        codec, scale = ObservationCodec(envs.single_observation_space), ActionScale(envs.single_action_space)
        self.net = Networks(codec.dim, scale.dim, config.hidden_sizes, self.generator).to(self.device)  # type: ignore[assignment]
        self.obs_normalizer = self.reward_normalizer = None
        self.collector = Explorer(config, envs, codec, scale, self.net, self.generator, self.device)  # type: ignore[arg-type]
        self.learner = Learner(config, self.net)  # type: ignore[arg-type]
        self.now = Snapshot()
        self._reset()

    def iterate(self) -> tuple[list[Episode], dict[str, Any]]:
        """Steps, each followed by its updates; the episodes that ended and a row of `COLUMNS`."""
        config, now, timing = self.config, self.now, self.now.timing
        until = min((now.iteration + 1) * config.iteration_steps, config.planned_steps)
        first, start, before = now.global_step, self._clock(), timing.total
        episodes: list[Episode] = []
        statistics: list[Tensor] = []
        while now.global_step < until:
            begun = time.perf_counter()
            at_random = now.global_step < config.learning_starts
            now.global_step += config.num_envs
            episodes += self.collector.step(now.global_step, at_random)
            stepped = time.perf_counter()
            if now.global_step > config.learning_starts and len(self.collector.buffer):
                for _ in range(config.gradient_steps):
                    batch = self.collector.buffer.sample(config.batch_size, self.generator)
                    statistics.append(self.learner.update(batch))
            timing.rollout += stepped - begun
            timing.update += time.perf_counter() - stepped
        x = torch.stack(statistics) if statistics else torch.full((1, 3), math.nan)
        critic_loss, q_mean, actor_loss = torch.stack([*x[:, :2].mean(0), x[:, 2].nanmean()]).tolist()
        if statistics and not math.isfinite(critic_loss):
            raise UserError(
                "training diverged: the critic's loss is not finite; expected a lower --critic-learning-rate than "
                f"{config.critic_learning_rate:g}, or rewards of smaller scale"
            )
        seconds = self._clock() - start
        timing.update += seconds - (timing.total - before)  # what a GPU was waited for
        now.iteration += 1
        now.episodes += len(episodes)
        now.recent.extend(episode.ret for episode in episodes)
        row = (
            now.global_step, now.iteration, now.episodes, now.mean_return, critic_loss, actor_loss, q_mean,
            len(self.collector.buffer), (now.global_step - first) / seconds,
        )  # fmt: skip
        return episodes, dict(zip(self.COLUMNS, row, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "updates": self.learner.updates}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        self.learner.updates = int(state["updates"])
        return super().load_state_dict(state)


def train(
    config: DDPGConfig, *, make_env: MakeEnv | None = None, console: Console | None = None
) -> control.TrainResult:
    """As `ppo_fast.trainer.control.train`, by DDPG."""
    return control.train(config, make_env=make_env, console=console, trainer=DDPGTrainer)
