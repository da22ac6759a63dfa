"""CleanRL's `ppo.py` and `ppo_continuous_action.py` in one file, with its hyperparameters and wrappers and our ops.

python examples/cleanrl_ppo.py ppo --env-id CartPole-v1
python examples/cleanrl_ppo.py ppo-continuous-action --env-id HalfCheetah-v5
"""

import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import ppo_fast as pf


@dataclass
class Ppo:
    """Discrete actions."""

    env_id: str = "CartPole-v1"
    """An environment with a vector of observations."""
    seed: int = 1
    total_timesteps: int = 500_000
    learning_rate: float = 2.5e-4
    num_envs: int = 4
    num_steps: int = 128
    """Steps of each environment between two updates."""
    gamma: float = 0.99
    gae_lambda: float = 0.95
    num_minibatches: int = 4
    update_epochs: int = 4
    clip_coef: float = 0.2
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    run_dir: str = "runs/cleanrl_ppo"
    """For TensorBoard."""


@dataclass
class PpoContinuousAction(Ppo):
    """Actions of numbers: a normal policy, observations and rewards normalised."""

    env_id: str = "HalfCheetah-v5"
    total_timesteps: int = 1_000_000
    learning_rate: float = 3e-4
    num_envs: int = 1
    num_steps: int = 2048
    num_minibatches: int = 32
    update_epochs: int = 10
    ent_coef: float = 0.0
    run_dir: str = "runs/cleanrl_ppo_continuous_action"


def make_env(args: Ppo) -> gym.Env:
    env = gym.wrappers.RecordEpisodeStatistics(gym.make(args.env_id))
    if isinstance(args, PpoContinuousAction):
        env = gym.wrappers.NormalizeObservation(gym.wrappers.ClipAction(env))
        env = gym.wrappers.TransformObservation(env, lambda obs: np.clip(obs, -10, 10), env.observation_space)
        env = gym.wrappers.NormalizeReward(env, gamma=args.gamma)
        env = gym.wrappers.TransformReward(env, lambda reward: float(np.clip(reward, -10, 10)))
    return env


def layer(inputs: int, outputs: int, std: float = 2**0.5) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(made.weight, std)
    nn.init.zeros_(made.bias)
    return made


def network(inputs: int, outputs: int, std: float) -> nn.Sequential:
    return nn.Sequential(layer(inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, outputs, std))


class Agent(nn.Module):
    """Two networks, and the deviation of a normal policy."""

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        super().__init__()
        space = envs.single_action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        inputs = int(np.prod(envs.single_observation_space.shape))
        outputs = int(space.n if self.discrete else np.prod(space.shape))
        self.critic, self.actor = network(inputs, 1, 1.0), network(inputs, outputs, 0.01)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.zeros(outputs))

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(actions, their log-probabilities)."""
        out = self.actor(obs)
        if self.discrete:
            actions = torch.multinomial(out.softmax(-1), 1).squeeze(-1)
            return actions, pf.categorical_log_prob(out, actions, entropy=False)[0]
        actions = torch.normal(out, self.log_std.exp().expand_as(out))
        return actions, pf.normal_log_prob(out, self.log_std, actions, entropy=False)[0]

    def loss(self, obs: torch.Tensor, config: pf.LossConfig, **rollout: torch.Tensor) -> pf.PPOLoss:
        values = self.critic(obs).squeeze(-1)
        if self.discrete:
            return pf.categorical_ppo_loss(self.actor(obs), config=config, values=values, **rollout)
        return pf.normal_ppo_loss(self.actor(obs), self.log_std, config=config, values=values, **rollout)


def main(args: Ppo) -> float:
    """Trains; the mean return of the last 100 episodes."""
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    same_step = gym.vector.AutoresetMode.SAME_STEP
    envs = gym.vector.SyncVectorEnv([lambda: make_env(args)] * args.num_envs, autoreset_mode=same_step)
    agent = Agent(envs)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    config = pf.LossConfig.preset(
        "cleanrl", clip_low=args.clip_coef, clip_high=args.clip_coef, value_clip=args.clip_coef,
        entropy_coef=args.ent_coef, value_coef=args.vf_coef,
    )  # fmt: skip
    writer = SummaryWriter(args.run_dir)

    T, N = args.num_steps, args.num_envs
    batch, iterations, returned, start = T * N, args.total_timesteps // (T * N), [], time.time()
    now = torch.as_tensor(envs.reset(seed=args.seed)[0], dtype=torch.float32).flatten(1)
    obs, log_probs = torch.zeros(T, *now.shape), torch.zeros(T, N)
    rewards, values, ended = torch.zeros(T, N), torch.zeros(T, N), torch.zeros(T, N, dtype=torch.bool)
    actions = None
    for iteration in range(1, iterations + 1):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / iterations)

        for t in range(T):
            obs[t] = now
            with torch.no_grad():
                action, log_probs[t] = agent.act(now)
                values[t] = agent.critic(now).squeeze(-1)
            if actions is None:
                actions = torch.zeros(T, *action.shape, dtype=action.dtype)
            actions[t] = action
            following, reward, terminated, truncated, info = envs.step(action.numpy())
            rewards[t], ended[t] = torch.as_tensor(reward), torch.as_tensor(terminated | truncated)
            now = torch.as_tensor(following, dtype=torch.float32).flatten(1)
            if "final_info" in info:
                done = info["final_info"]["_episode"]
                returned += info["final_info"]["episode"]["r"][done].tolist()

        with torch.no_grad():
            last_values = agent.critic(now).squeeze(-1)
        # As in CleanRL an episode that its time limit cut ends like any other; `truncated=` and `final_values=` know better.
        advantages, returns = pf.gae(
            rewards, values, last_values, terminated=ended, gamma=args.gamma, lam=args.gae_lambda
        )

        b_obs = obs.flatten(0, 1)
        streams = {"old_log_prob": log_probs, "advantages": advantages, "old_values": values, "returns": returns}
        rollout = {"actions": actions.flatten(0, 1), **{name: x.flatten() for name, x in streams.items()}}
        order = np.arange(batch)
        for _ in range(args.update_epochs):
            np.random.shuffle(order)
            for index in torch.from_numpy(order).split(batch // args.num_minibatches):
                out = agent.loss(b_obs[index], config, index=index, **rollout)
                optimizer.zero_grad()
                out.loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()

        step, mean = iteration * batch, float(np.mean(returned[-100:])) if returned else float("nan")
        for name, value in out.stats.to_dict().items():
            writer.add_scalar(f"losses/{name}", value, step)
        writer.add_scalar("charts/episodic_return", mean, step)
        if iteration % max(1, iterations // 10) == 0:
            print(f"{step:>8} steps  return {mean:7.1f}  {step / (time.time() - start):6.0f} steps/s", flush=True)
    envs.close()
    writer.close()
    return mean


if __name__ == "__main__":
    main(tyro.extras.subcommand_cli_from_dict({"ppo": Ppo, "ppo-continuous-action": PpoContinuousAction}))
