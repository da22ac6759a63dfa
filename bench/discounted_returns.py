"""Discounted returns over [T, N] float32 with episode ends and a bootstrap from the last value.

Floor: rewards and the bool flags are read once, returns written once: 9 bytes and 2 FLOPs an element.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import ppo_fast as pf

from . import peers
from .harness import OURS, Case, Provider, Workload, left_out

GAMMA = 0.99


def eager_loop(rewards, last_values, alive):
    running, out = last_values, torch.empty_like(rewards)
    for t in range(rewards.shape[0] - 1, -1, -1):
        out[t] = running = rewards[t] + GAMMA * alive[t] * running
    return out


def numba_loop(rewards, last_values, terminated):
    """One pass, time outside and environments inside."""
    steps, n = rewards.shape
    gamma, zero = np.float32(GAMMA), np.float32(0)
    out, running = np.empty((steps, n), np.float32), last_values.copy()
    for t in range(steps - 1, -1, -1):
        for i in range(n):
            running[i] = rewards[t, i] + (zero if terminated[t, i] else gamma) * running[i]
            out[t, i] = running[i]
    return out


def _named(result) -> dict[str, Tensor]:
    return {"returns": torch.as_tensor(result)}


def build(case: Case) -> Workload:
    steps, n = case.shape
    rewards, last_values, terminated = torch.randn(steps, n), torch.randn(n), torch.rand(steps, n) < 0.01
    alive = (~terminated).float()
    arrays = [x.numpy() for x in (rewards, last_values, terminated)]
    providers = [
        Provider(OURS, lambda: pf.discounted_returns(rewards, last_values, terminated=terminated, gamma=GAMMA), _named),
        Provider("eager", lambda: eager_loop(rewards, last_values, alive), _named),
    ]
    loop, why = peers.njit(numba_loop)
    if loop is None:
        providers.append(left_out("numba", why))
    else:
        providers.append(Provider("numba", lambda: loop(*arrays), _named, single_thread=True))
    reward2go, why = peers.torchrl_function("reward2go")
    if reward2go is None:
        providers.append(left_out("torchrl-vec", why))
    else:
        bootstrapped = rewards.clone()  # it knows no last value: that goes into the last reward beforehand
        bootstrapped[-1] += GAMMA * alive[-1] * last_values
        providers.append(Provider("torchrl-vec", lambda: reward2go(bootstrapped, terminated, GAMMA), _named))
    providers.append(left_out("compile", "unrolls the loop over T, up to minutes to compile"))

    def truth() -> dict[str, Tensor]:
        wide = rewards.double(), last_values.double()
        return _named(pf.reference.discounted_returns(*wide, terminated=terminated, gamma=GAMMA))

    return Workload(providers, truth, "eager", [rewards, last_values, terminated])


def _case(steps: int, n: int, quick: bool = False) -> Case:
    size = steps * n
    return Case("discounted_returns", (steps, n), "float32", "forward", 9 * size + 4 * n, 2 * size, build, (), quick)


CASES = [_case(128, 4, quick=True), _case(128, 1024)]
