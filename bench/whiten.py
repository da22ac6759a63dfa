"""Advantage normalisation, (x - mean) / (std + 1e-8).

Floor: x is read for its moments and once more to be scaled, y written once: 12 bytes and 6 FLOPs an element.
"""

from __future__ import annotations

import torch
from torch import Tensor

import ppo_fast as pf

from .harness import OURS, Case, Provider, Workload, compiled


def eager(x):
    return (x - x.mean()) / (x.std() + 1e-8)


def _named(y) -> dict[str, Tensor]:
    return {"y": y}


def build(case: Case) -> Workload:
    x = 3.0 * torch.randn(case.shape) + 1.0
    fast = compiled(eager)
    providers = [
        Provider(OURS, lambda: pf.whiten(x), _named),
        Provider("eager", lambda: eager(x), _named),
        Provider("compile", lambda: fast(x), _named),
    ]
    return Workload(providers, lambda: _named(pf.reference.whiten(x.double())), "eager", [x, x])


def _case(n: int, quick: bool = False) -> Case:
    return Case("whiten", (n,), "float32", "forward", 12 * n, 6 * n, build, (), quick)


CASES = [_case(512, quick=True), _case(1_048_576)]
