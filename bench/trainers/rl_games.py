"""rl_games' PPO on CartPole-v1, with its own configuration for that task."""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from typing import Any

PACKAGE, TASK = "rl-games", "PPO, its ppo_cartpole.yaml on the CPU"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    from pathlib import Path

    import gymnasium
    import rl_games as package
    import yaml
    from rl_games.common import env_configurations, vecenv

    from ppo_fast.integrations import rl_games

    from . import timed

    class Worlds(vecenv.IVecEnv):
        """Gymnasium's own vector of environments."""

        def __init__(self, config_name: str, num_actors: int, **_: Any) -> None:
            self.env = gymnasium.make_vec(
                "CartPole-v1",
                num_envs=num_actors,
                vectorization_mode="sync",
                vector_kwargs={"autoreset_mode": "SameStep"},
            )

        def reset(self) -> Any:
            return self.env.reset(seed=seed)[0]

        def step(self, actions: Any) -> Any:
            seen, rewards, ends, cuts, _ = self.env.step(actions)
            return seen, rewards, ends | cuts, {}

        def get_number_of_agents(self) -> int:
            return 1

        def get_env_info(self) -> dict[str, Any]:
            return {
                "observation_space": self.env.single_observation_space, "action_space": self.env.single_action_space,
                "agents": 1, "value_size": 1,
            }  # fmt: skip

    from rl_games.torch_runner import Runner

    vecenv.register("WORLDS", lambda name, actors, **_: Worlds(name, actors))
    env_configurations.register("worlds", {"vecenv_type": "WORLDS", "env_creator": None})
    folder = Path(package.__file__).parent
    params = yaml.safe_load((folder / "configs/ppo_cartpole.yaml").read_text())["params"]
    params["seed"] = seed
    params["config"] |= {
        "env_name": "worlds",
        "device": "cpu",
        "device_name": "cpu",
        "reward_shaper": {"scale_value": 0.1},
    }
    params["config"] |= {"max_epochs": 3 if quick else 60, "train_dir": "runs", "score_to_win": 10**9}
    seconds: dict[str, float] = {}
    curve: list[tuple[int, float]] = []
    with rl_games.enabled() if enabled else nullcontext(), ExitStack() as stack:
        runner = Runner()
        runner.load({"params": params})
        agent = runner.algo_factory.create(runner.algo_name, base_name="run", params=runner.params)
        agent.init_tensors()
        agent.obs = agent.env_reset()
        stack.enter_context(timed(agent, "discount_values", seconds, "advantages"))
        stack.enter_context(timed(agent, "play_steps", seconds, "rollout"))
        stack.enter_context(timed(agent, "train_actor_critic", seconds, "update"))
        start = time.perf_counter()
        for epoch in range(3 if quick else 150):
            agent.epoch_num = epoch
            agent.train_epoch()
            agent.dataset.update_values_dict(None)
            if agent.game_rewards.current_size:
                curve.append(((epoch + 1) * agent.batch_size, float(agent.game_rewards.get_mean()[0])))
        total = time.perf_counter() - start
    seconds["rollout"] -= seconds["advantages"]
    return {"seconds": total, "parts": seconds, "curve": curve}
