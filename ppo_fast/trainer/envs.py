"""Environments whose state can be put back: every episode has its own seed, and the actions since then are kept.

Environments cannot be serialised in general, and unpickling one would run whatever a checkpoint says. But a seeded
episode is a function of its seed and its actions, so those two are the state: plain data, for any deterministic
environment. Restoring replays the unfinished episodes, in the vector environment's own processes.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from . import worlds  # noqa: F401  # registers them
from .config import ControlConfig
from .errors import UserError, one_line

MakeEnv = Callable[[], gym.Env]
EnvState = tuple[int, np.ndarray]  # number of the episode, and its actions so far
AUTORESET = {"same_step": AutoresetMode.SAME_STEP, "next_step": AutoresetMode.NEXT_STEP}


def episode_seed(seed: int, index: int, episode: int) -> int:
    """Independent seeds for all episodes of all environments (numpy's SeedSequence hashes the three)."""
    return int(np.random.SeedSequence(seed, spawn_key=(index, episode)).generate_state(1)[0])


class ReplayEnv(gym.Wrapper):
    """Seeds every reset and keeps the actions of the unfinished episode: (episode, actions) is the whole state.

    Memory grows with the length of the unfinished episode, one action a step.
    """

    def __init__(self, env: gym.Env, seed: int, index: int) -> None:
        super().__init__(env)
        self._seed, self._index, self._episode = seed, index, -1
        self._actions: list[Any] = []
        self._restore: tuple[int, np.ndarray] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts the next episode. `seed` is not used: the wrapper derives one from (seed, environment, episode)."""
        self._episode += 1
        self._actions = []
        return self.env.reset(seed=episode_seed(self._seed, self._index, self._episode), options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self._restore is not None:
            (episode, actions), self._restore = self._restore, None
            return self._replay(episode, actions)
        # an array may be the caller's buffer, and some environments scale it in place
        self._actions.append(action.copy() if isinstance(action, np.ndarray) else action)
        return self.env.step(action)

    def replay_state(self) -> tuple[int, np.ndarray]:
        """Number of the episode and its actions so far, [steps, ...]."""
        return self._episode, np.array(self._actions)

    def arm_restore(self, states: list[tuple[int, np.ndarray]]) -> None:
        """Makes the next `step` restore this environment's entry of `states`, whatever its action.

        It happens inside a step so that the vector environment around this one, in whatever process, sees the last
        transition again and is left with the right autoreset flag and observation itself.
        """
        self._restore = states[self._index]

    def _replay(self, episode: int, actions: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._episode = episode - 1
        obs, info = self.reset()
        transition = obs, 0.0, False, False, info
        for action in actions:
            transition = self.step(action)
        return transition


def reset(envs: VectorEnv, config: ControlConfig) -> tuple[Any, dict[str, Any]]:
    try:
        return envs.reset()
    except Exception as error:  # an environment may raise anything; it stays attached as the cause
        raise UserError(f"environment {config.env_id} failed to reset: {one_line(error)}") from error


def restore(envs: VectorEnv, states: list[EnvState]) -> tuple[Any, dict[str, Any]]:
    """Brings environments back to `states`; observations and infos as after the last step then."""
    envs.reset()  # else an environment whose episode has just ended would spend the coming step on its autoreset
    envs.call("arm_restore", states)  # type: ignore[attr-defined]
    try:
        obs, _, _, _, info = envs.step(envs.action_space.sample())
    except Exception as error:  # an environment may raise anything; it stays attached as the cause
        raise UserError(f"the environment failed while its episode was replayed: {one_line(error)}") from error
    return obs, info


def replay_states(envs: VectorEnv) -> list[EnvState]:
    return list(envs.call("replay_state"))  # type: ignore[attr-defined]


def _make(env_id: str) -> gym.Env:
    """gym.make with messages for people. The checker of every step is off: it costs as much as CartPole itself."""
    try:
        return gym.make(env_id, disable_env_checker=True)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        known = gym.registry.get(env_id.rpartition(":")[2])
        if known is None:
            raise _unknown(env_id, error) from error
        needs_mujoco = "mujoco" in f"{known.entry_point} {error}".lower()
        install = 'install it with: pip install "ppo_fast[mujoco]"' if needs_mujoco else "install it"
        raise UserError(
            f"--env-id: {env_id} needs a package that is not installed ({one_line(error)}); {install}"
        ) from error
    except gym.error.UnregisteredEnv as error:
        raise _unknown(env_id, error) from error
    except Exception as error:  # an environment may raise anything; it stays attached as the cause
        raise UserError(f"--env-id: {env_id} could not be made ({one_line(error)})") from error


def _unknown(env_id: str, error: Exception) -> UserError:
    return UserError(
        f"--env-id: expected the id of an environment that gymnasium knows, got {env_id!r} ({one_line(error)})"
    )


class SerialVectorEnv(SyncVectorEnv):
    """gymnasium's SyncVectorEnv with a `step` for array observations that leaves out what the trainer does not use.

    Same results: the generic conversions of actions and observations cost a third of a step of CartPole.
    """

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        same_step = self.autoreset_mode == AutoresetMode.SAME_STEP
        infos: dict[str, Any] = {}
        for i, env in enumerate(self.envs):
            if self._autoreset_envs[i] and not same_step:
                obs, info = env.reset()
                self._rewards[i], self._terminations[i], self._truncations[i] = 0.0, False, False
            else:
                obs, self._rewards[i], terminated, truncated, info = env.step(actions[i])
                self._terminations[i], self._truncations[i] = terminated, truncated
                if same_step and (terminated or truncated):
                    infos = self._add_info(infos, {"final_obs": obs, "final_info": info}, i)
                    obs, info = env.reset()
            self._observations[i] = obs
            if info:
                infos = self._add_info(infos, info, i)
        self._autoreset_envs = self._terminations | self._truncations
        return self._observations, self._rewards, self._terminations, self._truncations, infos


def make_envs(config: ControlConfig, make_env: MakeEnv | None = None, first: int = 0) -> VectorEnv:
    """The vector environment of a run; `make_env` overrides `config.env_id`. `first`: number of the first environment."""

    def factory(index: int) -> MakeEnv:
        def make() -> gym.Env:
            if multiprocessing.parent_process() is not None:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes us
            env = _make(config.env_id) if make_env is None else make_env()
            return ReplayEnv(env, config.seed, index)

        return make

    probe = factory(first)()  # errors of making one come from here, with their message, not out of a worker
    plain = isinstance(probe.observation_space, (spaces.Box, spaces.Discrete))
    probe.close()
    factories = [factory(first + i) for i in range(config.num_envs)]
    mode = AUTORESET[config.autoreset]
    if config.vectorization == "async":
        return AsyncVectorEnv(factories, copy=False, autoreset_mode=mode)
    return (SerialVectorEnv if plain else SyncVectorEnv)(factories, copy=False, autoreset_mode=mode)
