"""Stable-Baselines3's PPO with its defaults on CartPole-v1."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from typing import Any

PACKAGE, TASK = "stable-baselines3", "PPO, its defaults, CartPole-v1"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback

    from ppo_fast.integrations import sb3

    from . import timed

    curve: list[tuple[int, float]] = []

    class Returns(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            if episodes := self.model.ep_info_buffer:
                curve.append((self.num_timesteps, sum(x["r"] for x in episodes) / len(episodes)))

    steps = 4_096 if quick else 51_200
    seconds: dict[str, float] = {}
    with sb3.enabled() if enabled else nullcontext(), ExitStack() as stack:
        model = stable_baselines3.PPO("MlpPolicy", "CartPole-v1", seed=seed, device="cpu")
        stack.enter_context(timed(model, "train", seconds, "update"))
        stack.enter_context(timed(model, "collect_rollouts", seconds, "rollout"))
        stack.enter_context(timed(model.rollout_buffer, "compute_returns_and_advantage", seconds, "advantages"))
        start = time.perf_counter()
        model.learn(steps, callback=Returns())
        total = time.perf_counter() - start
    seconds["rollout"] -= seconds["advantages"]  # theirs computes them inside collect_rollouts
    return {"seconds": total, "parts": seconds, "curve": curve}
