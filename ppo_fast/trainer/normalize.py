"""Running normalisation of observations and rewards, in float64, with states that fit in a checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class RunningMoments:
    """Mean and (population) variance over everything seen, merged batch by batch (Chan et al. 1979)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0.0
        self.mean = np.zeros(shape)
        self.m2 = np.zeros(shape)  # sum of squared deviations from the mean

    def update(self, batch: np.ndarray) -> None:
        """`batch` is [rows, *shape]."""
        rows = len(batch)
        if rows == 0:
            return
        batch = np.asarray(batch, np.float64)
        mean = batch.mean(0)
        self.merge(rows, mean, np.square(batch - mean).sum(0))

    def merge(self, count: float, mean: np.ndarray, m2: np.ndarray) -> None:
        """Adds the moments of `count` > 0 further rows."""
        delta = mean - self.mean
        total = self.count + count
        self.m2 = self.m2 + m2 + np.square(delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def var(self) -> np.ndarray:
        return self.m2 / self.count if self.count > 0 else np.ones_like(self.m2)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": torch.tensor(self.mean), "m2": torch.tensor(self.m2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mean, m2 = state["mean"].numpy(), state["m2"].numpy()
        if mean.shape != self.mean.shape or m2.shape != self.m2.shape:
            raise ValueError(f"running moments of shape {mean.shape}, expected {self.mean.shape}")
        self.count, self.mean, self.m2 = float(state["count"]), mean.copy(), m2.copy()


class ObservationNormalizer:
    """(obs - mean) / sqrt(var + eps), clipped; learns from every observation that the policy acts on, once.

    Final observations and the filler steps of next-step autoreset are normalised but not learned from, so both
    autoreset modes see the same statistics.
    """

    def __init__(self, dim: int, clip: float = 10.0, eps: float = 1e-8) -> None:
        self.moments, self.clip, self.eps = RunningMoments((dim,)), clip, eps

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        scaled = (obs - self.moments.mean) / np.sqrt(self.moments.var + self.eps)
        return np.clip(scaled, -self.clip, self.clip)


class RewardNormalizer:
    """Rewards over the running standard deviation of the discounted return, clipped; episodes do not leak."""

    def __init__(self, num_envs: int, gamma: float, clip: float = 10.0, eps: float = 1e-8) -> None:
        self.moments = RunningMoments(())
        self.returns = np.zeros(num_envs)
        self.gamma, self.clip, self.eps = gamma, clip, eps

    def __call__(self, rewards: np.ndarray, done: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """A rollout of [T, N] rewards in the order of time; steps that are not valid teach nothing and give 0."""
        out = np.zeros_like(rewards)
        for t in range(len(rewards)):
            keep = valid[t]
            self.returns = np.where(keep, self.returns * self.gamma + rewards[t], self.returns)
            self.moments.update(self.returns[keep])
            scaled = rewards[t] / np.sqrt(self.moments.var + self.eps)
            out[t] = np.where(keep, np.clip(scaled, -self.clip, self.clip), 0.0)
            self.returns = np.where(done[t], 0.0, self.returns)
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments.state_dict(), "returns": torch.tensor(self.returns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments.load_state_dict(state["moments"])
        self.returns = state["returns"].numpy().copy()
