"""sb3-contrib's MaskablePPO with its defaults, on the environment with invalid actions that it tests itself on."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

PACKAGE, TASK = "sb3-contrib", "MaskablePPO, its defaults, 80 actions of which 60 are invalid"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import sb3_contrib
    from sb3_contrib.common.envs import InvalidActionEnvDiscrete
    from stable_baselines3.common.callbacks import BaseCallback

    from ppo_fast.integrations import sb3
    from ppo_fast.integrations import sb3_contrib as ours

    from . import timed

    curve: list[tuple[int, float]] = []

    class Returns(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            if episodes := self.model.ep_info_buffer:
                curve.append((self.num_timesteps, sum(x["r"] for x in episodes) / len(episodes)))

    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        for module in (sb3, ours) if enabled else ():  # the buffer, and the update
            stack.enter_context(module.enabled())
        world = InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60)
        model = sb3_contrib.MaskablePPO("MlpPolicy", world, seed=seed, device="cpu")
        stack.enter_context(timed(model, "train", seconds, "update"))
        stack.enter_context(timed(model, "collect_rollouts", seconds, "rollout"))
        stack.enter_context(timed(model.rollout_buffer, "compute_returns_and_advantage", seconds, "advantages"))
        start = time.perf_counter()
        model.learn(4_096 if quick else 40_960, callback=Returns())
        total = time.perf_counter() - start
    seconds["rollout"] -= seconds["advantages"]  # theirs computes them inside collect_rollouts
    return {"seconds": total, "parts": seconds, "curve": curve}
