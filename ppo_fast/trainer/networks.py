"""Policy and value network: two tanh MLPs, and a log_std that does not depend on the state."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(sizes: list[int], last_gain: float, generator: torch.Generator) -> nn.Sequential:
    """Linear layers with tanh between them: orthogonal weights with gain √2, `last_gain` in the last; biases 0."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        gain = last_gain if i == len(sizes) - 2 else math.sqrt(2.0)
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def without_modules(network: nn.Sequential) -> Callable[[Tensor], Tensor]:
    """The same function, for a few rows and without a graph: there half the time of a forward is the modules' own."""
    *hidden, last = [(x.weight, x.bias) for x in network if isinstance(x, nn.Linear)]

    def forward(x: Tensor) -> Tensor:
        for weight, bias in hidden:
            x = F.linear(x, weight, bias).tanh_()
        return F.linear(x, *last)

    return forward


class ActorCritic(nn.Module):
    """CleanRL's agent. `log_std` has `num_log_std` entries, 0 for discrete actions."""

    def __init__(
        self,
        obs_dim: int,
        num_params: int,
        num_log_std: int,
        hidden: tuple[int, ...],
        initial_log_std: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.actor = mlp([obs_dim, *hidden, num_params], 0.01, generator)
        self.critic = mlp([obs_dim, *hidden, 1], 1.0, generator)
        self.log_std = nn.Parameter(torch.full((num_log_std,), initial_log_std))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, obs] -> logits or means [rows, num_params], values [rows]."""
        return self.actor(obs), self.critic(obs).squeeze(-1)
