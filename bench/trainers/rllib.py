"""RLlib's PPO on CartPole-v1, in one process: no remote environment runners and no remote learners."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from typing import Any

PACKAGE, TASK = "ray", "PPO, CartPole-v1, 4000 steps an iteration"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import ray
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.connectors.learner import general_advantage_estimation as connector

    from ppo_fast.integrations import rllib

    from . import timed

    ray.init(local_mode=False, num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    configuration = (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
        .learners(num_learners=0)
        .training(train_batch_size=4000, minibatch_size=128, num_epochs=4, lr=3e-4)
        .debugging(seed=seed)
    )
    seconds: dict[str, float] = {}
    curve: list[tuple[int, float]] = []
    with rllib.enabled() if enabled else nullcontext(), ExitStack() as stack:
        algorithm = configuration.build_algo()
        stack.enter_context(timed(connector, "compute_value_targets", seconds, "advantages"))
        stack.enter_context(timed(algorithm.learner_group, "update", seconds, "update"))
        start = time.perf_counter()
        for i in range(1 if quick else 8):
            result = algorithm.train()
            curve.append(((i + 1) * 4000, float(result["env_runners"]["episode_return_mean"])))
        total = time.perf_counter() - start
        algorithm.stop()
    ray.shutdown()
    seconds["update"] -= seconds["advantages"]
    seconds["rollout"] = total - seconds["update"] - seconds["advantages"]
    return {"seconds": total, "parts": seconds, "curve": curve}
