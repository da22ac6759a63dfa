"""skrl's PPO on Pendulum-v1, with its hyperparameters for that task."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

PACKAGE, TASK = "skrl", "PPO, 16 Pendulum-v1 at once"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import gymnasium
    from skrl.agents.torch.ppo import PPO
    from skrl.agents.torch.ppo import ppo as module
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    from skrl.resources.preprocessors.torch import RunningStandardScaler
    from skrl.utils import set_seed

    from ppo_fast.integrations import skrl

    from . import timed

    def layers() -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Linear(3, 64), torch.nn.ELU(), torch.nn.Linear(64, 64), torch.nn.ELU(), torch.nn.Linear(64, 1)
        )

    class Policy(GaussianMixin, Model):
        def __init__(self, **spaces: Any) -> None:
            Model.__init__(self, **spaces)
            GaussianMixin.__init__(self, clip_actions=False)
            self.net, self.log_std = layers(), torch.nn.Parameter(torch.zeros(1))

        def compute(self, inputs: Any, role: str) -> Any:
            return 2 * torch.tanh(self.net(inputs["observations"])), {"log_std": self.log_std}

    class Value(DeterministicMixin, Model):
        def __init__(self, **spaces: Any) -> None:
            Model.__init__(self, **spaces)
            DeterministicMixin.__init__(self)
            self.net = layers()

        def compute(self, inputs: Any, role: str) -> Any:
            return self.net(inputs["observations"]), {}

    set_seed(seed)
    rollouts, envs = 256, 16
    env = wrap_env(gymnasium.make_vec("Pendulum-v1", num_envs=envs, vectorization_mode="sync"), verbose=False)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}
    configuration = {
        "rollouts": rollouts, "learning_epochs": 10, "mini_batches": 16, "discount_factor": 0.9, "learning_rate": 1e-3,
        "grad_norm_clip": 0.5, "value_loss_scale": 0.5, "value_clip": 0.2, "entropy_loss_scale": 0.0,
        "rewards_shaper": lambda rewards, *_: rewards * 0.1,
        "observation_preprocessor": RunningStandardScaler,
        "observation_preprocessor_kwargs": {"size": env.observation_space, "device": "cpu"},
        "value_preprocessor": RunningStandardScaler, "value_preprocessor_kwargs": {"size": 1, "device": "cpu"},
        "experiment": {"write_interval": 0, "checkpoint_interval": 0},
    }  # fmt: skip
    seconds: dict[str, float] = {}
    curve: list[tuple[int, float]] = []
    total, finished = torch.zeros(envs), []
    with skrl.enabled() if enabled else nullcontext(), ExitStack() as stack:
        agent = PPO(
            models={"policy": Policy(**spaces), "value": Value(**spaces)}, cfg=configuration, **spaces,
            memory=RandomMemory(memory_size=rollouts, num_envs=envs, device="cpu"),
        )  # fmt: skip
        agent.init()
        agent.enable_training_mode(True)
        stack.enter_context(timed(skrl if enabled else module, "compute_gae", seconds, "advantages"))
        stack.enter_context(timed(agent, "update", seconds, "update"))
        states, _ = env.reset()
        steps = rollouts * (1 if quick else 20)
        start = time.perf_counter()
        for step in range(steps):
            with torch.no_grad():
                actions, _ = agent.act(states, None, timestep=step, timesteps=steps)
                after, rewards, terminated, truncated, _ = env.step(actions)
                agent.record_transition(
                    observations=states, states=None, actions=actions, rewards=rewards, next_observations=after,
                    next_states=None, terminated=terminated, truncated=truncated, infos={}, timestep=step, timesteps=steps,
                )  # fmt: skip
            total += rewards.flatten()
            ends = (terminated | truncated).flatten()
            finished += total[ends].tolist()
            total[ends] = 0
            agent.post_interaction(timestep=step, timesteps=steps)
            if (step + 1) % rollouts == 0 and finished:
                curve.append(((step + 1) * envs, sum(finished[-3 * envs :]) / len(finished[-3 * envs :])))
            states = after
        whole = time.perf_counter() - start
    seconds["update"] -= seconds["advantages"]
    seconds["rollout"] = whole - seconds["update"] - seconds["advantages"]
    return {"seconds": whole, "parts": seconds, "curve": curve}
