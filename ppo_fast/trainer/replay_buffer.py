"""The last transitions, to learn from again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .device import upload
from .errors import UserError


class Transitions(NamedTuple):
    obs: Tensor  # [rows, obs]
    actions: Tensor  # [rows, actions]
    rewards: Tensor  # [rows]
    terminated: Tensor  # [rows], 1 where next_obs is a terminal state; an episode that was only cut has 0
    next_obs: Tensor  # [rows, obs], the true one, not that of the next episode


class ReplayBuffer:
    """A ring of `size` transitions, the row of one holds all of it: a minibatch is one gather."""

    def __init__(self, size: int, obs_dim: int, action_dim: int, device: torch.device) -> None:
        self.widths = (obs_dim, action_dim, 1, 1, obs_dim)
        self.added = 0
        try:
            self.rows = torch.zeros(size, sum(self.widths), device=device)
        except RuntimeError:
            needed = 4e-9 * size * sum(self.widths)
            raise UserError(f"--buffer-size: expected what fits into memory, got {size} ({needed:,.1f} GB)") from None

    def __len__(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, new: Transitions) -> None:
        """At most `size` transitions, over the oldest ones."""
        parts = (x.reshape(len(x), width) for x, width in zip(new, self.widths, strict=True))
        index = torch.arange(self.added, self.added + len(new.obs)) % len(self.rows)
        self.rows[upload(index, self.rows.device)] = upload(torch.cat([*parts], 1), self.rows.device)
        self.added += len(new.obs)

    def sample(self, count: int, generator: torch.Generator) -> Transitions:
        """Uniformly, with replacement."""
        index = torch.randint(len(self), (count,), generator=generator)
        return self[upload(index, self.rows.device)]

    def __getitem__(self, index: Tensor) -> Transitions:
        obs, actions, rewards, terminated, next_obs = self.rows[index].split(self.widths, 1)
        return Transitions(obs, actions, rewards.squeeze(1), terminated.squeeze(1), next_obs)

    def state_dict(self) -> dict[str, Any]:
        """A copy in host memory of what is filled."""
        return {"added": self.added, "rows": self.rows[: len(self)].to("cpu", copy=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        added, rows = int(state["added"]), state["rows"]
        expected = (min(added, len(self.rows)), sum(self.widths))
        if tuple(rows.shape) != expected:
            raise ValueError(f"replay buffer of shape {tuple(rows.shape)}, expected {expected}")
        self.added = added
        self.rows[: len(rows)] = rows.to(self.rows.device)
