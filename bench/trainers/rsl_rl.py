"""RSL-RL's runner with its PPO on a torque-limited pendulum, many at once as its simulators do."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

PACKAGE, TASK = "rsl-rl-lib", "PPO, 512 pendulums, 24 steps an iteration"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    from rsl_rl.env import VecEnv
    from rsl_rl.runners import OnPolicyRunner
    from tensordict import TensorDict

    from ppo_fast.integrations import rsl_rl

    from . import timed

    class Pendulums(VecEnv):
        """Gymnasium's Pendulum-v1; an episode is 200 steps, at different times for each."""

        num_envs, num_actions, max_episode_length, device, cfg = 512, 1, 200, "cpu", {}

        def __init__(self) -> None:
            self.state = torch.empty(self.num_envs, 2)
            self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
            self.total = torch.zeros(self.num_envs)
            self.finished: list[float] = []
            self._reset(torch.ones(self.num_envs, dtype=torch.bool))

        def _reset(self, where: torch.Tensor) -> None:
            angle, speed = (torch.rand(2, self.num_envs) * 2 - 1) * torch.tensor([[math.pi], [1.0]])
            self.state = torch.where(where[:, None], torch.stack([angle, speed], 1), self.state)

        def get_observations(self) -> TensorDict:
            angle, speed = self.state.unbind(1)
            seen = torch.stack([angle.cos(), angle.sin(), speed / 8], 1)
            return TensorDict({"policy": seen}, batch_size=[self.num_envs])

        def step(self, actions: torch.Tensor) -> tuple[TensorDict, torch.Tensor, torch.Tensor, dict[str, Any]]:
            angle, speed = self.state.unbind(1)
            torque = 2 * actions[:, 0].clamp(-1, 1)
            error = (angle + math.pi) % (2 * math.pi) - math.pi
            rewards = -(error**2 + 0.1 * speed**2 + 0.001 * torque**2)
            speed = (speed + (15 * angle.sin() + 3 * torque) * 0.05).clamp(-8, 8)
            self.state = torch.stack([angle + speed * 0.05, speed], 1)
            self.episode_length_buf += 1
            self.total += rewards
            dones = self.episode_length_buf >= self.max_episode_length
            self.finished += self.total[dones].tolist()
            self._reset(dones)
            self.episode_length_buf[dones] = 0
            self.total[dones] = 0
            return self.get_observations(), 0.1 * rewards, dones, {"time_outs": dones}

    torch.manual_seed(seed)
    network = {"class_name": "MLPModel", "hidden_dims": [64, 64], "activation": "elu"}
    gaussian = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "scalar"}
    configuration = {
        "num_steps_per_env": 24, "save_interval": 10**9, "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "algorithm": {"class_name": "PPO", "entropy_coef": 0.005}, "critic": network,
        "actor": network | {"distribution_cfg": gaussian}, "multi_gpu": None,
    }  # fmt: skip
    seconds: dict[str, float] = {}
    curve: list[tuple[int, float]] = []
    with rsl_rl.enabled() if enabled else nullcontext(), ExitStack() as stack:
        env = Pendulums()
        runner = OnPolicyRunner(env, configuration, log_dir=None, device="cpu")
        stack.enter_context(timed(runner.alg, "compute_returns", seconds, "advantages"))
        stack.enter_context(timed(runner.alg, "update", seconds, "update"))
        env.episode_length_buf = torch.randint(env.max_episode_length, (env.num_envs,))
        start = time.perf_counter()
        for i in range(1 if quick else 15):
            runner.learn(10 if not quick else 2)
            if recent := env.finished[-env.num_envs :]:
                curve.append(((i + 1) * 10 * 24 * env.num_envs, sum(recent) / len(recent)))
        total = time.perf_counter() - start
    seconds["rollout"] = total - sum(seconds.values())
    return {"seconds": total, "parts": seconds, "curve": curve}
