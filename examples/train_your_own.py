"""The trainer on an environment of your own, from Python.

python examples/train_your_own.py
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from ppo_fast.trainer.control import ControlConfig, train


class Thermostat(gym.Env):
    """Keep a room at 20 °C against the weather. Heating beyond 24 °C is forbidden, by an action mask."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(3)  # off, low, high

    def _state(self):
        hot = self.room > 24
        mask = np.array([1, not hot, not hot], np.int8)
        return np.array([self.room - 20, self.outside - 10], np.float32) / 5, {"action_mask": mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # the trainer seeds every episode: the same run every time, and exact resume
        self.room, self.outside, self.hours = self.np_random.uniform(10, 25), self.np_random.uniform(-5, 15), 0
        return self._state()

    def step(self, action):
        self.outside += self.np_random.normal(0, 0.5)
        self.room += 0.1 * (self.outside - self.room) + (0.0, 1.0, 2.5)[int(action)]
        self.hours += 1
        reward = 1.0 - abs(self.room - 20) / 5
        obs, info = self._state()
        return obs, reward, False, self.hours >= 48, info  # time is up: truncated, not terminated


if __name__ == "__main__":
    config = ControlConfig(env_id="Thermostat", run_dir="runs/thermostat", total_timesteps=100_000, num_envs=8)
    result = train(config, make_env=Thermostat)
    print(f"mean return of the last episodes: {result.mean_return:.1f} of at most 48")
