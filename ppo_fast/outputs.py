"""What a loss returns: the scalar to call `.backward()` on, and one vector of named statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._workspace import raise_reported
from .config import STATS

_INDEX = {name: i for i, name in enumerate(STATS)}


class Stats:
    """Statistics of one loss call, on the loss's device: `stats.approx_kl` is a 0-dim view, `to_dict()` syncs once."""

    __slots__ = ("vector",)

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector  # [len(STATS)], or [K, len(STATS)] of K calls stacked; float32 or float64, no gradient

    def __getattr__(self, name: str) -> torch.Tensor:
        index = _INDEX.get(name)
        if index is None:
            raise AttributeError(f"Stats has no {name!r}; it has {', '.join(STATS)}")
        return self.vector.select(-1, index)

    def __dir__(self) -> list[str]:
        return ["vector", "to_dict", *STATS]

    def __reduce__(self) -> tuple[type[Stats], tuple[torch.Tensor]]:
        return Stats, (self.vector,)

    def to_dict(self) -> dict[str, float]:
        """All statistics as Python floats; one device-to-host copy. Raises for labels out of range that the loss met on a
        GPU."""
        numbers = self.vector.tolist()
        raise_reported()
        return dict(zip(STATS, numbers, strict=True))

    def __repr__(self) -> str:
        return "Stats(" + ", ".join(f"{name}={value:.6g}" for name, value in self.to_dict().items()) + ")"


class PPOLoss(NamedTuple):
    """`loss`: 0-dim, differentiable. `stats`: detached `Stats`."""

    loss: torch.Tensor
    stats: Stats
