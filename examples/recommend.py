"""Slates out of 10,000 items for users whose interests drift: PPO with action masks, against ε-greedy and popularity.

python examples/recommend.py                                          two seeds, some minutes on one core
python examples/recommend.py --items 500 --iterations 3 --seeds 1     seconds, and nothing learned; --help has more
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.progress import track
from torch import nn

import ppo_fast as pf


@dataclass(frozen=True)
class Config:
    """A session is some slates, a slate some different items that were not shown yet. The return is the clicks of a session."""

    seeds: tuple[int, ...] = (1, 2)  # each is a catalogue, users, and a run of every policy
    items: int = 10_000  # the number of actions; a fifth of them is not available to a user
    users: int = 32  # sessions side by side
    slates: int = 20  # in a session
    slots: int = 3  # items in a slate
    iterations: int = 250  # each is a session of every user, then the update
    epsilon: float = 0.05  # share of slots that ε-greedy fills at random
    out: Path = Path("runs/recommend.png")  # the picture


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class Shop(gym.vector.VectorEnv):
    """P(click) = σ(4·interest·topic + lure - 3·tired·topic + trust - 3).

    Users tire of what they see, and a lure costs trust: a click now can cost clicks later. All but the interest is observed.
    """

    def __init__(self, config: Config, seed: int) -> None:
        self.metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
        self.rng, self.num_envs, self.slates, self.d = np.random.default_rng(seed), config.users, config.slates, 8
        self.topics, self.lure = unit(self.rng.normal(size=(config.items, self.d))), self.rng.normal(size=config.items)
        self.features = torch.tensor(np.column_stack([self.topics, self.lure]), dtype=torch.float32)  # [A, F]
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2 * self.d + 2,), np.float32)
        self.single_action_space = gym.spaces.MultiDiscrete([config.items] * config.slots)

    def _state(self) -> tuple[np.ndarray, dict]:
        left = np.full(self.num_envs, 1 - self.time / self.slates)
        obs = np.column_stack([self.tired, self.clicked, self.trust, left]).astype(np.float32)
        return obs, {"action_mask": self.mask.copy(), "clicks": self.clicks}

    def reset(self, *, seed=None, options=None):
        n = self.num_envs
        self.interest, self.mask = unit(self.rng.normal(size=(n, self.d))), self.rng.random((n, len(self.lure))) > 0.2
        self.tired = self.clicked = np.zeros((n, self.d))
        self.trust, self.clicks, self.time = np.zeros(n), np.zeros((n, 0)), 0
        return self._state()

    def step(self, slates: np.ndarray):  # [N, K]
        topic, lure = self.topics[slates], self.lure[slates]  # [N, K, d], [N, K]
        liked = (topic * (4 * self.interest - 3 * self.tired)[:, None]).sum(-1)
        p = 1 / (1 + np.exp(3 - liked - lure - self.trust[:, None]))
        self.clicks = (self.rng.random(p.shape) < p).astype(np.float32)
        self.tired = 0.8 * self.tired + 0.2 * topic.mean(1)
        self.clicked = 0.8 * self.clicked + (self.clicks[..., None] * topic).mean(1)
        self.trust = 0.9 * self.trust - 0.2 * lure.mean(1)
        self.interest = unit(self.interest + 0.1 * self.rng.normal(size=self.interest.shape))
        np.put_along_axis(self.mask, slates, False, 1)
        self.time += 1
        over = np.full(self.num_envs, self.time == self.slates)
        obs, info = self._state()
        return obs, self.clicks.sum(1), over, over & False, info


class Network(nn.Module):
    """What a state asks for, whose dot product with the features of an item is its score; and a value for each slot."""

    def __init__(self, shop: Shop) -> None:
        super().__init__()
        inputs, outputs = shop.single_observation_space.shape[0], shop.features.shape[1]
        self.features, slots = shop.features, len(shop.single_action_space.nvec)
        self.query = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, outputs))
        self.value = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, slots))

    def scores(self, obs: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return 4 * self.query(obs) @ features.mT  # of all items [B, A], or of those of a slate [B, 1, K]


def session(shop: Shop, choose) -> dict[str, torch.Tensor]:
    """Streams [T, N, ...] of a session of every user; `choose(obs, mask)` gives slates [N, K]. Masks are [T, N, K, A]."""
    (obs, info), steps = shop.reset(), []
    for _ in range(shop.slates):
        seen, mask = torch.from_numpy(obs), torch.from_numpy(info["action_mask"])
        slate = choose(seen, mask)
        masks = mask[:, None].repeat(1, slate.shape[1], 1)
        for k in range(1, slate.shape[1]):  # a slot may not repeat those before it
            masks[:, k] = masks[:, k - 1].scatter(1, slate[:, k - 1 : k], False)
        obs, _, _, _, info = shop.step(slate.numpy())
        steps.append((seen, slate, masks, torch.from_numpy(info["clicks"])))
    names = ("obs", "actions", "action_mask", "clicks")
    return dict(zip(names, map(torch.stack, zip(*steps, strict=True)), strict=True))


def ppo(config: Config, shop: Shop):
    """Yields the click-through of an iteration. A slate is K decisions in a row, each with its own click and advantage."""
    net, slots = Network(shop), config.slots
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    loss = pf.LossConfig(entropy_coef=0.001, normalize_advantages=True)

    def choose(obs, mask):  # with Gumbel noise the K largest are K draws without replacement
        scores = net.scores(obs, net.features)
        noisy = scores - torch.empty_like(scores).exponential_().clamp_(min=1e-20).log_()
        return noisy.masked_fill_(~mask, -torch.inf).topk(slots).indices

    while True:
        with torch.no_grad():
            seen = session(shop, choose)
            actions, masks, values = seen["actions"], seen["action_mask"], net.value(seen["obs"])
            scores = net.scores(seen["obs"], net.features)[:, :, None].expand(masks.shape)  # no copy
            old, _ = pf.categorical_log_prob(scores, actions, action_mask=masks, entropy=False)
            clicks, values = (x.transpose(1, 2).flatten(0, 1) for x in (seen["clicks"], values))  # [T·K, N]
            estimates = pf.gae(clicks, values, gamma=0.99, lam=0.95)  # the session ends with the last slot
            advantages, returns = (x.unflatten(0, (-1, slots)).transpose(1, 2) for x in estimates)
        yield float(clicks.mean())
        streams = {"old_log_prob": old, "advantages": advantages, "returns": returns, "actions": actions}
        flat = {"action_mask": masks.flatten(0, 2), **{name: x.flatten() for name, x in streams.items()}}
        obs = seen["obs"].flatten(0, 1)
        for _ in range(4):
            for index in torch.randperm(len(obs)).tensor_split(4):
                each = net.scores(obs[index], net.features)[:, None].expand(-1, slots, -1)
                rows = index[:, None] * slots + torch.arange(slots)  # the kernel gathers these of the flat streams
                out = pf.categorical_ppo_loss(each, config=loss, values=net.value(obs[index]), index=rows, **flat)
                optimizer.zero_grad()
                out.loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()


def epsilon_greedy(config: Config, shop: Shop):
    """The K items that a model of clicks, the same network, finds most likely, or random ones; it learns from all sessions."""
    net, seen = Network(shop), []
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def choose(obs, mask):
        best = net.scores(obs, net.features).masked_fill(~mask, -torch.inf).topk(config.slots).indices
        other = torch.rand(mask.shape).masked_fill_(~mask, -1.0).scatter_(1, best, -1.0).topk(config.slots).indices
        return torch.where(torch.rand(best.shape) < config.epsilon, other, best)

    while True:
        with torch.no_grad():
            new = session(shop, choose)
        yield float(new["clicks"].mean())
        seen.append([new[name].flatten(0, 1) for name in ("obs", "actions", "clicks")])
        obs, actions, clicks = map(torch.cat, zip(*seen, strict=True))
        for _ in range(16):
            index = torch.randint(len(obs), (len(new["obs"]) * config.users // 4,))
            scores = net.scores(obs[index, None], net.features[actions[index]])[:, 0] + net.value(obs[index])
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(scores, clicks[index]).backward()
            optimizer.step()


def popularity(config: Config, shop: Shop):
    """The items that fresh users click most, by the true mean over 1,000 of them: no log could tell it better."""
    interests = unit(shop.rng.normal(size=(1000, shop.d)))
    popular = torch.tensor((1 / (1 + np.exp(3 - 4 * interests @ shop.topics.T - shop.lure))).mean(0))  # [A]
    while True:
        seen = session(shop, lambda obs, mask: popular.where(mask, -1.0).topk(config.slots).indices)
        yield float(seen["clicks"].mean())


def train(config: Config) -> dict[str, np.ndarray]:
    """Click-through by policy, [seeds, iterations]."""
    curves: dict[str, list[list[float]]] = {}
    for policy in (ppo, epsilon_greedy, popularity):
        for seed in config.seeds:
            torch.manual_seed(seed)
            steps = policy(config, Shop(config, seed))
            iterations = track(range(config.iterations), f"{policy.__name__}, seed {seed}")
            curves.setdefault(policy.__name__, []).append([next(steps) for _ in iterations])
    return {name: np.array(of_seeds) for name, of_seeds in curves.items()}


def draw(config: Config, curves: dict[str, np.ndarray]) -> None:
    figure, last = Figure(figsize=(8, 4.5), dpi=120, layout="constrained"), -(-config.iterations // 10)
    axes = figure.add_subplot(xlabel=f"iterations of {config.users} sessions, means of {last}", ylabel="click-through")
    for (name, clicks), color in zip(curves.items(), ("tab:orange", "tab:blue", "tab:grey"), strict=True):
        means = np.array([np.convolve(x, np.ones(last) / last, "valid") for x in clicks]).T
        label = [f"{name}: {means[-1].mean():.3f} at the end", *["_"] * (len(clicks) - 1)]
        axes.plot(np.arange(last, config.iterations + 1), means, color=color, label=label)
        print(f"{name:<14}  click-through of the last {last} iterations {means[-1].mean():.3f}")
    axes.set(title=f"Slates out of {config.items:,} items: share of what was shown that was clicked", ylim=(0, None))
    axes.legend(loc="upper left")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out)


if __name__ == "__main__":
    config = tyro.cli(Config)
    draw(config, train(config))
