"""Environments of ours, registered with gymnasium when the trainer is imported: for what gymnasium's own do not ask for."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv


class Part(gym.ObservationWrapper):
    """Shows some entries of a flat Box observation and hides the others."""

    def __init__(self, env: gym.Env, entries: tuple[int, ...]) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, spaces.Box)
        self.entries = list(entries)
        self.observation_space = spaces.Box(space.low[self.entries], space.high[self.entries], dtype=np.float32)

    def observation(self, observation: Any) -> np.ndarray:
        return observation[self.entries]


def cart_pole_no_velocity(**options: Any) -> gym.Env:
    """CartPole that shows position and angle: how fast they change must be remembered."""
    return Part(CartPoleEnv(**options), (0, 2))


gym.register(
    "ppo_fast/CartPoleNoVelocity-v1", cart_pole_no_velocity, max_episode_steps=500, reward_threshold=475.0
)  # fmt: skip
