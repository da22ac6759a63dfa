"""An update in CleanRL's shape, distribution checks off and Adam fused on both sides: its formulas in eager torch, and our ops.

The rest, networks, environments, order of random numbers, is the same code: `examples/cleanrl_ppo.py`.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any
from unittest import mock

PACKAGE, TASK = "gymnasium", "CleanRL's ppo.py, its defaults, CartPole-v1"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples/cleanrl_ppo.py"


def eager_gae(rewards, values, last_values, *, terminated, gamma, lam):
    import torch

    advantages, carried = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        following = values[t + 1] if t + 1 < len(rewards) else last_values
        alive = 1.0 - terminated[t].float()
        delta = rewards[t] + gamma * following * alive - values[t]
        advantages[t] = carried = delta + gamma * lam * alive * carried
    return advantages, advantages + values


def eager_loss(self, obs, config, *, actions, old_log_prob, advantages, old_values, returns, index):
    import torch

    import ppo_fast as pf

    distribution = torch.distributions.Categorical(logits=self.actor(obs), validate_args=False)
    values = self.critic(obs).squeeze(-1)
    d = distribution.log_prob(actions[index]) - old_log_prob[index]
    ratio = d.exp()
    with torch.no_grad():
        old_approx_kl, approx_kl = (-d).mean(), ((ratio - 1) - d).mean()
        clip_fraction = ((ratio - 1.0).abs() > config.clip_low).float().mean()
    a = advantages[index]
    a = (a - a.mean()) / (a.std() + 1e-8)
    policy = torch.max(-a * ratio, -a * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)).mean()
    old, target = old_values[index], returns[index]
    near = old + (values - old).clamp(-config.value_clip, config.value_clip)
    value = 0.5 * torch.max((values - target) ** 2, (near - target) ** 2).mean()
    entropy = distribution.entropy().mean()
    loss = policy - config.entropy_coef * entropy + config.value_coef * value
    vector = torch.zeros(len(pf.config.STATS))
    for name, x in {"policy_loss": policy, "value_loss": value, "entropy": entropy, "old_approx_kl": old_approx_kl,
                    "approx_kl": approx_kl, "clip_fraction": clip_fraction}.items():  # fmt: skip
        vector[pf.config.STATS.index(name)] = x.detach()
    return pf.PPOLoss(loss, pf.outputs.Stats(vector))


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import torch

    import ppo_fast as pf

    from . import timed

    spec = importlib.util.spec_from_file_location("cleanrl_ppo", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    seconds: dict[str, float] = {}
    curve: list[tuple[int, float]] = []
    writer = mock.Mock()
    writer.add_scalar = lambda name, x, step: curve.append((step, x)) if name.endswith("return") and x == x else None
    if not enabled:
        example.Agent.loss = eager_loss
        example.pf = mock.Mock(wraps=pf, gae=eager_gae, LossConfig=pf.LossConfig)

    with mock.patch.object(example, "SummaryWriter", lambda *_: writer), \
            timed(example.pf, "gae", seconds, "advantages"), timed(example.Agent, "loss", seconds, "networks and loss"), \
            timed(torch.Tensor, "backward", seconds, "backward"), \
            timed(torch.nn.utils, "clip_grad_norm_", seconds, "clip and Adam"), \
            timed(torch.optim.Adam, "step", seconds, "clip and Adam"):  # fmt: skip
        start = time.perf_counter()
        example.main(example.Ppo(seed=seed, total_timesteps=20_000 if quick else 200_000))
        total = time.perf_counter() - start
    seconds["update"] = seconds["networks and loss"] + seconds["backward"] + seconds["clip and Adam"]
    return {"seconds": total, "parts": seconds, "curve": curve}
