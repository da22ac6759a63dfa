"""Collecting a rollout: buffers, the loop over steps, and the bookkeeping of where episodes end.

Per step only what the next action needs is computed: the policy network and one sample. Values, log-probabilities and
episode statistics follow once for the whole rollout.

Environments live on the host, and so do the running statistics of what comes from them: they are finished with an
observation before a GPU could start. The networks, what they see, and actions are on the device. A step on a GPU copies
observations there and waits once, for the actions. Random numbers are drawn on the host: the same on every device.

Conventions, for both autoreset modes: `terminated[t]` and `truncated[t]` belong to the transition that starts at
`obs[t]`. `valid[t]` is False for the filler steps of next-step autoreset, where the environment ignores the action and
resets. The final observation of a truncated episode is `obs[t + 1]` in next-step mode, and in `finals` in same-step
mode, where `obs[t + 1]` already belongs to the next episode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from .compress import rollout_actor
from .config import ControlConfig
from .device import Twin, upload
from .distributed import ALONE, Ranks
from .errors import UserError, one_line
from .networks import ActorCritic
from .normalize import ObservationNormalizer
from .policies import Policy
from .spaces import MASK, MaskReader, ObservationCodec


class Episode(NamedTuple):
    step: int  # environment steps of the run when it ended
    env: int
    ret: float  # undiscounted sum of the environment's own rewards
    length: int


class Collector:
    """Steps the environments with the policy. `collect` fills the buffers; everything else reads them."""

    def __init__(
        self,
        config: ControlConfig,
        envs: VectorEnv,
        codec: ObservationCodec,
        policy: Policy,
        net: ActorCritic,
        normalizer: ObservationNormalizer | None,
        generator: torch.Generator,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.envs, self.codec, self.policy, self.net = config, envs, codec, policy, net
        self.normalizer, self.generator, self.ranks = normalizer, generator, ranks
        t, n, self.device = config.num_steps, config.num_envs, net.log_std.device
        self.seen = Twin((t + 1, n, codec.dim), self.device)
        self.obs = self.seen.device  # what the networks see
        self.raw_obs = self.seen.host if normalizer is None else torch.zeros_like(self.seen.host)
        self.params = torch.zeros(t, n, policy.num_params, device=self.device)
        self.noise = Twin((t, n, policy.num_params), self.device)
        self.acted = Twin((t, n, *policy.action_shape), self.device, policy.action_dtype)
        self.actions = self.acted.device
        self.rewards = np.zeros((t, n))
        self.terminated = np.zeros((t, n), bool)
        self.truncated = np.zeros((t, n), bool)
        self.valid = np.ones((t, n), bool)
        self.allowed: Twin | None = None
        self.final_index: list[int] = []  # same-step mode: t * N + n of each truncation, and the last observation
        self.final_obs: list[np.ndarray] = []
        self.resetting = np.zeros(n, bool)  # next-step mode: the coming step is a filler
        self.episode_return = np.zeros(n)
        self.episode_length = np.zeros(n, np.int64)

    def begin(self, obs: Any, info: dict[str, Any]) -> None:
        """The observations to act on next; the first call decides whether actions are masked."""
        rows = self.raw_obs[-1].numpy()
        self.codec.write(obs, rows)
        self.mask_reader = MaskReader(self.codec, self.policy.mask_width, obs, info)
        if self.mask_reader.active:
            shape = (self.config.num_steps + 1, self.config.num_envs, self.policy.mask_width)
            self.allowed = Twin(shape, self.device, torch.bool)
            self.allowed.host.fill_(True)
            self.mask_reader.write(obs, info, self.allowed.host[-1].numpy())
        self._rows = self._views()

    @property
    def masks(self) -> Tensor | None:
        return None if self.allowed is None else self.allowed.device

    def _views(self) -> tuple[Any, ...]:
        """The rows of all buffers, once: slicing them in every rollout takes as long as an update step."""
        tensors = self.obs, self.params, self.noise.device, self.actions, self.acted.host
        masks = [None] * len(self.obs) if self.masks is None else self.masks.unbind()
        return *(x.unbind() for x in tensors), masks, list(self.raw_obs.numpy()), list(self.acted.host.numpy())

    def collect(self) -> None:
        """Fills the buffers with `num_steps` steps, starting where the last rollout ended."""
        self.raw_obs[0].copy_(self.raw_obs[-1].clone())
        if self.allowed is not None:
            self.allowed.host[0].copy_(self.allowed.host[-1].clone())
        self.final_index, self.final_obs = [], []
        self.valid[:] = True
        self.ranks.noise(self.policy, self.noise.host, self.generator)
        self.noise.upload()
        with torch.inference_mode():
            self._loop()
        self._show(len(self.rewards))
        self._check()

    def _loop(self) -> None:
        actor, policy, log_std, step = self._actor(), self.policy, self.net.log_std, self.envs.step
        obs, params, noise, actions, host_actions, masks, raw_rows, action_rows = self._rows
        same_step, apart = self.config.autoreset == "same_step", self.seen.apart
        for t in range(len(self.rewards)):
            if not same_step:
                np.logical_not(self.resetting, out=self.valid[t])
            if self.normalizer is not None:
                self.normalizer.moments.update(raw_rows[t][self.valid[t]])
            self._show(t)
            logits = params[t].copy_(actor(t, obs[t]))
            policy.sample(logits, log_std, noise[t], masks[t], actions[t])
            if apart:
                host_actions[t].copy_(actions[t])  # waits
            try:
                next_obs, self.rewards[t], self.terminated[t], self.truncated[t], info = step(
                    policy.to_env(action_rows[t])
                )
            except Exception as error:  # an environment may raise anything; it stays attached as the cause
                raise UserError(f"environment {self.config.env_id} failed in a step: {one_line(error)}") from error
            self.codec.write(next_obs, raw_rows[t + 1])
            if info:
                self._read_info(t, info)
            if self.allowed is not None:
                self.mask_reader.write(next_obs, info, self.allowed.host[t + 1].numpy())
            if not same_step:
                np.logical_or(self.terminated[t], self.truncated[t], out=self.resetting)

    def _read_info(self, t: int, info: dict[str, Any]) -> None:
        if "final_obs" in info and self.config.autoreset == "same_step":
            for n in np.flatnonzero(self.truncated[t] & ~self.terminated[t]):
                self.final_index.append(t * self.config.num_envs + int(n))
                self.final_obs.append(self.codec.one(info["final_obs"][n]))
        if self.allowed is None and MASK in info:
            raise UserError(
                f'environment {self.config.env_id}: info["{MASK}"] came with a step but not with the first reset; '
                "expected it with both"
            )

    def _show(self, t: int) -> None:
        """Row t of observations and masks as the networks see it."""
        if self.normalizer is not None:
            np.copyto(self.seen.host[t].numpy(), self.normalizer(self.raw_obs[t].numpy()), casting="same_kind")
        if self.seen.apart:
            for twin in filter(None, (self.seen, self.allowed)):
                twin.device[t].copy_(twin.host[t], non_blocking=True)

    def _check(self) -> None:
        """Broken environments are found before anything is learned from them."""
        name = f"environment {self.config.env_id}"
        for what, finite in (
            ("observation", np.isfinite(self.raw_obs.numpy()).all(-1)),
            ("reward", np.isfinite(self.rewards)),
        ):
            if not finite.all():
                t, n = np.argwhere(~finite)[0]
                raise UserError(f"{name} returned a non-finite {what} (step {t} of the rollout, environment {n})")
        if not all(np.isfinite(obs).all() for obs in self.final_obs):
            raise UserError(f"{name} returned a non-finite final observation")
        if self.allowed is not None:
            possible = self.allowed.host[:-1].any(-1).numpy() | ~self.valid
            if not possible.all():
                t, n = np.argwhere(~possible)[0]
                raise UserError(f"{name} allowed no action at all (step {t} of the rollout, environment {n})")

    def _actor(self) -> Callable[[int, Tensor], Tensor]:
        """From a step t of the rollout and what it sees, [N, obs], to parameters of the actions."""
        actor = rollout_actor(self.net.actor, self.config)
        return lambda t, obs: actor(obs)

    def values(self) -> Tensor:
        """V of all observations, [T + 1, N]."""
        return self.net.critic(self.obs).squeeze(-1)

    def _final(self, obs: Tensor, index: Tensor) -> Tensor:
        """V of the observations that ended the steps `index` = t·N + n."""
        return self.net.critic(obs).view(-1)

    def final_values(self, values: Tensor) -> Tensor | tuple[Tensor, Tensor] | None:
        """V of the true final observations, as `pf.gae` takes them; `values` [T + 1, N] are those of `obs`."""
        if self.config.autoreset == "next_step":
            return values[1:]
        if not self.final_index:
            return None
        rows = np.stack(self.final_obs)
        if self.normalizer is not None:
            rows = self.normalizer(rows).astype(np.float32)
        index, seen = (upload(x, self.device) for x in (torch.tensor(self.final_index), torch.from_numpy(rows)))
        return index, self._final(seen, index)

    def episodes(self, first_step: int) -> list[Episode]:
        """Episodes that ended in this rollout, in order; `first_step` is the run's step count before it."""
        found = []
        done = self.terminated | self.truncated
        start = np.zeros(self.config.num_envs, np.int64)
        for t, n in np.argwhere(done):
            self._advance(n, start[n], t + 1)
            step = first_step + (int(t) + 1) * self.config.num_envs
            found.append(Episode(step, int(n), float(self.episode_return[n]), int(self.episode_length[n])))
            self.episode_return[n], self.episode_length[n] = 0.0, 0
            start[n] = t + 1
        for n in range(self.config.num_envs):
            self._advance(n, start[n], len(done))
        return found

    def _advance(self, n: int, start: int, stop: int) -> None:
        """Adds the steps [start, stop) to the running episode of environment n; fillers count for nothing."""
        self.episode_return[n] += self.rewards[start:stop, n].sum()
        self.episode_length[n] += self.valid[start:stop, n].sum()

    def state_dict(self) -> dict[str, Any]:
        return {
            "obs": self.raw_obs[-1].clone(),
            "resetting": torch.tensor(self.resetting),
            "episode_return": torch.tensor(self.episode_return),
            "episode_length": torch.tensor(self.episode_length),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.raw_obs[-1].copy_(state["obs"])
        self.resetting = state["resetting"].numpy().copy()
        self.episode_return = state["episode_return"].numpy().copy()
        self.episode_length = state["episode_length"].numpy().copy()
