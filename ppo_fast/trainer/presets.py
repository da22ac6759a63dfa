"""Hyperparameters that are known to work, by environment."""

from __future__ import annotations

from typing import Any

from .config import ControlConfig

#: CleanRL's settings for MuJoCo: one environment, long rollouts, many small minibatches, running normalisation.
_MUJOCO: dict[str, Any] = {
    "total_timesteps": 1_000_000,
    "num_envs": 1,
    "num_steps": 2048,
    "learning_rate": 3e-4,
    "num_minibatches": 32,
    "update_epochs": 10,
    "entropy_coef": 0.0,
    "normalize_observations": True,
    "normalize_rewards": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {},
    "ppo_fast/CartPoleNoVelocity-v1": {
        "recurrent": "lstm",
        "total_timesteps": 200_000,
        "num_envs": 16,
        "learning_rate": 1e-3,
        "normalize_observations": True,
        "normalize_rewards": True,
    },
    "Acrobot-v1": {},
    "Pendulum-v1": {
        "total_timesteps": 200_000,
        "num_envs": 4,
        "num_steps": 1024,
        "learning_rate": 1e-3,
        "gamma": 0.9,
        "clip_value_loss": False,  # returns of some -100 are many clip ranges away from the first values
        "num_minibatches": 32,
        "update_epochs": 10,
        "entropy_coef": 0.0,
    },
    "HalfCheetah-v5": _MUJOCO,
    "Hopper-v5": _MUJOCO,
}


def preset(env_id: str, **changes: Any) -> ControlConfig:
    """The configuration for an environment: its preset, or the defaults, with your changes."""
    return ControlConfig(**{**PRESETS.get(env_id, {}), "env_id": env_id, **changes})
