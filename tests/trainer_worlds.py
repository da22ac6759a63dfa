"""Small environments with known answers, for the tests of the trainer."""

from __future__ import annotations

import os

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Walk(gym.Env):
    """A walk on the line: terminal beyond ±3, cut after `limit` steps; the reward tells position and time apart.

    Deterministic given the seed of the reset. Short episodes of both ends, often several in one rollout.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, limit: int = 7) -> None:
        self.limit = limit

    def _obs(self):
        return np.array([self.x, self.t / 10, self.drift], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = float(self.np_random.uniform(-2, 2)), 0
        self.drift = float(self.np_random.uniform(-0.3, 0.3))
        return self._obs(), {}

    def step(self, action):
        self.x += float(action) - 1.0 + self.drift + 0.1 * float(self.np_random.normal())
        self.t += 1
        reward = 1.0 + 0.5 * self.x + 0.05 * self.t
        return self._obs(), reward, abs(self.x) > 3, self.t >= self.limit, {}


class Both(Walk):
    """Terminated and truncated by the same step: the terminal state wins."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated or truncated, terminated or truncated, info


class Push(Walk):
    """Walk with a Box action, so that runs with running normalisation can be followed too."""

    action_space = spaces.Box(-0.5, 0.5, (2,), np.float32)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(1.0 + float(action.sum()))


class Guess(gym.Env):
    """One-step episodes: the observation names the right action; reward 1 for each head that is right.

    `heads` empty: Discrete(4). `masked`: half of the actions are forbidden in each state, never the right one; taking a
    forbidden action raises. `where` says how masks travel.
    """

    def __init__(self, heads: tuple[int, ...] = (), masked: bool = False, where: str = "info") -> None:
        self.nvec = heads or (4,)
        self.masked, self.where = masked, where
        self.action_space = spaces.MultiDiscrete(heads) if heads else spaces.Discrete(4)
        size = sum(self.nvec)
        box = spaces.Box(0, 1, (size,), np.float32)
        if masked and where == "observation":
            self.observation_space = spaces.Dict({"observation": box, "action_mask": spaces.MultiBinary(size)})
        else:
            self.observation_space = box

    def _next(self):
        self.right = [int(self.np_random.integers(n)) for n in self.nvec]
        self.mask = [self.np_random.random(n) < 0.5 for n in self.nvec]
        for allowed, right in zip(self.mask, self.right, strict=True):
            allowed[right] = True
        obs = np.concatenate([np.eye(n)[r] for n, r in zip(self.nvec, self.right, strict=True)]).astype(np.float32)
        flat = np.concatenate(self.mask).astype(np.int8)
        if not self.masked:
            return obs, {}
        if self.where == "observation":
            return {"observation": obs, "action_mask": flat}, {}
        return obs, {"action_mask": flat if self.where == "info" else tuple(m.astype(np.int8) for m in self.mask)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._next()

    def step(self, action):
        chosen = np.atleast_1d(action)
        if self.masked and not all(m[a] for m, a in zip(self.mask, chosen, strict=True)):
            raise RuntimeError("a forbidden action was taken")
        reward = float(np.mean(chosen == self.right))
        obs, info = self._next()
        return obs, reward, True, False, info


class Aim(gym.Env):
    """One-step episodes with a Box action: reward -(action - observation)²."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.goal = self.np_random.uniform(-0.8, 0.8, 2).astype(np.float32)
        return self.goal, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return self.goal, -float(np.square(action - self.goal).sum()), True, False, {}


class Broken(Walk):
    """Works for `good` steps, then does what `how` says."""

    def __init__(self, how: str = "raise", good: int = 200) -> None:
        super().__init__()
        self.how, self.left = how, good

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.left -= 1
        if self.left < 0:
            if self.how == "raise":
                raise RuntimeError("the motor is on fire")
            if self.how == "observation":
                obs[1] = np.nan
            if self.how == "reward":
                reward = float("inf")
        return obs, reward, terminated, truncated, info


class Moody(Walk):
    """Not a function of its seed: a resumed run cannot be exact."""

    moods = np.random.default_rng()

    def step(self, action):
        obs, *rest = super().step(action)
        return obs + np.float32(self.moods.normal()), *rest


class Suicidal(Walk):
    """Takes its process with it."""

    def step(self, action):
        os.kill(os.getpid(), 9)


gym.register("Suicidal-v0", entry_point=Suicidal)
gym.register("Walk-v0", entry_point=Walk)
gym.register("BrokenRaise-v0", entry_point=lambda: Broken("raise"))
gym.register("BrokenObservation-v0", entry_point=lambda: Broken("observation"))
