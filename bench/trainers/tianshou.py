"""Tianshou's PPO on CartPole-v1."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

PACKAGE, TASK = "tianshou", "PPO, 16 CartPole-v1 at once"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import gymnasium
    from tianshou.algorithm import PPO
    from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
    from tianshou.utils.torch_utils import policy_within_training_step, torch_train_mode

    from ppo_fast.integrations import tianshou

    from . import timed

    np.random.seed(seed)
    torch.manual_seed(seed)
    worlds = DummyVectorEnv([lambda: gymnasium.make("CartPole-v1") for _ in range(16)])
    worlds.seed(seed)
    space = gymnasium.make("CartPole-v1").action_space
    net = Net(state_shape=(4,), hidden_sizes=[64, 64])
    policy = DiscreteActorPolicy(
        actor=DiscreteActor(preprocess_net=net, action_shape=2),
        dist_fn=torch.distributions.Categorical,
        action_space=space,
    )
    algorithm = PPO(policy=policy, critic=DiscreteCritic(preprocess_net=net), optim=AdamOptimizerFactory(lr=1e-3))
    buffer = VectorReplayBuffer(16 * 256, 16)
    collector = Collector(algorithm, worlds, buffer)
    collector.reset()
    seconds: dict[str, float] = {"rollout": 0.0, "update": 0.0}
    curve: list[tuple[int, float]] = []
    with tianshou.enabled() if enabled else nullcontext():
        from tianshou.algorithm import algorithm_base

        with timed(algorithm_base, "_gae", seconds, "advantages"):
            for i in range(2 if quick else 15):
                marks = [time.perf_counter()]
                with policy_within_training_step(policy):
                    collected = collector.collect(n_step=16 * 256)
                    marks.append(time.perf_counter())
                    with torch_train_mode(policy):
                        algorithm.update(buffer=buffer, batch_size=256, repeat=4)
                marks.append(time.perf_counter())
                collector.reset_buffer(keep_statistics=True)
                seconds["rollout"] += marks[1] - marks[0]
                seconds["update"] += marks[2] - marks[1]
                if collected.returns_stat is not None:
                    curve.append(((i + 1) * 16 * 256, float(collected.returns_stat.mean)))
    total = seconds["rollout"] + seconds["update"]
    seconds["update"] -= seconds["advantages"]
    return {"seconds": total, "parts": seconds, "curve": curve}
