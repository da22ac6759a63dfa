"""Observations as rows of float32, and action masks, out of what a vector environment returns."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from .errors import UserError

MASK = "action_mask"


class ObservationCodec:
    """Writes batches of observations into [N, dim] float32.

    Box is flattened, Discrete becomes one-hot. A Dict of "action_mask" and one other entry is that entry, with masks.
    """

    def __init__(self, space: spaces.Space) -> None:
        self.key: str | None = None
        self.start: int | None = None  # Discrete: its first value
        self.in_observation = isinstance(space, spaces.Dict) and MASK in space.spaces
        if isinstance(space, spaces.Dict):
            others = [name for name in space.spaces if name != MASK]
            if len(others) == 1:
                self.key = others[0]
                space = space.spaces[self.key]
        if isinstance(space, spaces.Box):
            self.dim = int(np.prod(space.shape))
        elif isinstance(space, spaces.Discrete):
            self.dim, self.start = int(space.n), int(space.start)
        else:
            raise UserError(
                "--env-id: expected observations of Box, Discrete, or a Dict of one of them and an "
                f'"{MASK}", got {space}; wrap the environment in gymnasium.wrappers.FlattenObservation'
            )

    def write(self, obs: Any, rows: np.ndarray) -> None:
        """A batch of observations into `rows` [N, dim]."""
        if self.key is not None:
            obs = obs[self.key]
        if self.start is None:
            np.copyto(rows, np.asarray(obs).reshape(rows.shape), casting="unsafe")
        else:
            rows.fill(0.0)
            rows[np.arange(len(rows)), np.asarray(obs).reshape(-1) - self.start] = 1.0

    def one(self, obs: Any) -> np.ndarray:
        """One observation, not a batch, as [dim]."""
        row = np.empty((1, self.dim), np.float32)
        self.write({self.key: obs[self.key]} if self.key is not None else obs, row)
        return row[0]


class MaskReader:
    """Finds the action mask of each environment, in its observation or in `info["action_mask"]`.

    A mask has one entry an action, nonzero where it is allowed; for MultiDiscrete the heads' masks stand side by side
    (a tuple with one array a head, as `MultiDiscrete.sample` takes, is joined). An environment that masks must do so
    from its first reset on; a step without a mask allows everything.
    """

    def __init__(self, codec: ObservationCodec, width: int, obs: Any, info: dict[str, Any]) -> None:
        self.in_observation, self.width = codec.in_observation, width
        self.active = self.in_observation or MASK in info
        if self.active and not width:
            raise UserError("--env-id: action masks need Discrete or MultiDiscrete actions, got Box")

    def _flat(self, mask: Any) -> np.ndarray:
        flat = np.concatenate([np.ravel(m) for m in mask]) if isinstance(mask, (tuple, list)) else np.ravel(mask)
        if flat.size != self.width:
            raise UserError(f"--env-id: expected action masks with {self.width} entries, got {flat.size}")
        return flat != 0

    def write(self, obs: Any, info: dict[str, Any], rows: np.ndarray) -> None:
        """Masks that belong to `obs` into `rows` [N, actions], bool."""
        if self.in_observation:
            masks = obs[MASK]
            batched = isinstance(masks, np.ndarray)
            for i in range(len(rows)):
                rows[i] = self._flat(masks[i] if batched else [head[i] for head in masks])
            return
        rows.fill(True)
        if MASK in info:
            for env in np.flatnonzero(info["_" + MASK]):
                rows[env] = self._flat(info[MASK][env])
