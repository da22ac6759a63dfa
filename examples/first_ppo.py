"""PPO on one page: the five steps of the algorithm, from top to bottom. A cart learns to balance a pole.

python examples/first_ppo.py                  # 1000 episodes at most; leaves the learning curve in first_ppo.png
python examples/first_ppo.py --episodes 20    # only to see that it runs
"""

import argparse

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import ppo_fast as pf

parser = argparse.ArgumentParser()
parser.add_argument("--episodes", type=int, default=1000, help="stop after so many, converged or not")
parser.add_argument("--seed", type=int, default=1, help="another seed, another run")
args = parser.parse_args()

# 1. Initialise. The policy says how likely each action is in a state; the value function, how much reward is to come.
torch.manual_seed(args.seed)
env = gym.make("CartPole-v1", max_episode_steps=100)  # every step until the pole falls is a reward of 1
policy = nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 2))
value = nn.Sequential(nn.Linear(4, 128), nn.Tanh(), nn.Linear(128, 1))
optimizer = torch.optim.Adam([*policy.parameters(), *value.parameters()], lr=1e-3)
config = pf.LossConfig(clip_low=0.2, clip_high=0.2, value_coef=0.5, normalize_advantages=True)
lengths, converged = [], False

# 5. Repeat until converged: the last 100 episodes all but perfect.
while len(lengths) < args.episodes and not converged:
    # 2. Collect ten episodes with the policy as it is now.
    steps = []
    for _ in range(10):
        (state, _), start, done = env.reset(seed=args.seed + len(lengths)), len(steps), False
        while not done:
            with torch.no_grad():
                action = torch.distributions.Categorical(logits=policy(torch.as_tensor(state))).sample().item()
            next_state, reward, terminated, truncated, _ = env.step(action)  # fell over; was cut off at 100 steps
            steps.append((state, action, reward, next_state, terminated, truncated))
            state, done = next_state, terminated or truncated
        lengths.append(len(steps) - start)
    columns = (torch.as_tensor(np.stack(column)) for column in zip(*steps, strict=True))
    states, actions, rewards, next_states, terminated, truncated = columns

    # 3. Advantages: how much better each action turned out than the value function expected. What follows a fall is
    #    worth nothing; what would have followed a cut is worth what the value function says.
    with torch.no_grad():
        values, final_values = value(states).squeeze(1), value(next_states).squeeze(1)
        old_log_prob, _ = pf.categorical_log_prob(policy(states), actions)
    ends = {"terminated": terminated, "truncated": truncated, "final_values": final_values}
    advantages, returns = pf.gae(rewards.float(), values, **ends, gamma=0.99, lam=0.95)

    # 4. Update. Make actions with a positive advantage likelier, the others less likely, but change no probability by
    #    much more than 20 % (the clip): these steps say little about a policy far from the one that took them.
    for _ in range(10):
        for index in torch.randperm(len(steps)).split(64):
            out = pf.categorical_ppo_loss(
                policy(states[index]), actions, old_log_prob, advantages, config,
                values=value(states[index]).squeeze(1), returns=returns, index=index,
            )  # fmt: skip
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()

    mean = np.mean(lengths[-100:])
    converged = len(lengths) >= 100 and mean >= 99
    print(f"episode {len(lengths):4}  mean length {mean:5.1f}  clipped {100 * float(out.stats.clip_fraction):.0f} %")

# The learning curve.
smooth = [np.mean(lengths[max(0, i - 99) : i + 1]) for i in range(len(lengths))]
plt.plot(lengths, ".", markersize=3, color="silver", label="episode")
plt.plot(smooth, label="mean of the last 100")
plt.gca().set(title="PPO on CartPole-v1", xlabel="episode", ylabel="steps until the pole falls, at most 100")
plt.legend()
plt.savefig("first_ppo.png", dpi=120)
print(f"{'converged' if converged else 'stopped'} after {len(lengths)} episodes; first_ppo.png has the curve")
