"""V-trace over [T, N] float32 with episode ends; T time steps, N actors.

Floor: log ratios, rewards, values and the bool flags are read once, targets and advantages written once: 21 bytes and
15 FLOPs an element.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import ppo_fast as pf

from . import peers
from .harness import OURS, Case, Provider, Workload, left_out

GAMMA = 0.99


def eager_loop(log_rhos, rewards, values, last_values, alive):
    """As IMPALA-like trainers write it: everything elementwise at once, then a loop over time for the recursion."""
    rhos = log_rhos.exp()
    clipped = rhos.clamp(max=1.0)
    following = torch.cat([values[1:], last_values[None]])
    deltas = clipped * (rewards + GAMMA * alive * following - values)
    running, out = torch.zeros_like(last_values), []
    for t in range(rewards.shape[0] - 1, -1, -1):
        running = deltas[t] + GAMMA * alive[t] * clipped[t] * running
        out.append(running)
    targets = torch.stack(out[::-1]) + values
    next_targets = torch.cat([targets[1:], last_values[None]])
    return targets, clipped * (rewards + GAMMA * alive * next_targets - values)


def numba_loop(log_rhos, rewards, values, last_values, terminated):
    """One pass, time outside and actors inside."""
    steps, n = rewards.shape
    gamma, one, zero = np.float32(GAMMA), np.float32(1), np.float32(0)
    targets, advantages = np.empty((steps, n), np.float32), np.empty((steps, n), np.float32)
    running, following = np.zeros(n, np.float32), last_values.copy()
    for t in range(steps - 1, -1, -1):
        for i in range(n):
            discount = zero if terminated[t, i] else gamma
            clipped, value = min(one, np.exp(log_rhos[t, i])), values[t, i]
            advantages[t, i] = clipped * (rewards[t, i] + discount * (following[i] + running[i]) - value)
            delta = clipped * (rewards[t, i] + discount * following[i] - value)
            running[i] = delta + discount * clipped * running[i]
            following[i] = value
            targets[t, i] = value + running[i]
    return targets, advantages


def _named(result) -> dict[str, Tensor]:
    targets, advantages = result
    return {"targets": torch.as_tensor(targets), "advantages": torch.as_tensor(advantages)}


def build(case: Case) -> Workload:
    steps, n = case.shape
    log_rhos, rewards, values = 0.3 * torch.randn(steps, n), torch.randn(steps, n), torch.randn(steps, n)
    last_values, terminated = torch.randn(n), torch.rand(steps, n) < 0.01
    alive = (~terminated).float()
    data = log_rhos, rewards, values, last_values
    arrays = [x.numpy() for x in (*data, terminated)]
    providers = [
        Provider(OURS, lambda: pf.vtrace(*data, terminated=terminated, gamma=GAMMA), _named),
        Provider("eager", lambda: eager_loop(*data, alive), _named),
    ]
    loop, why = peers.njit(numba_loop)
    if loop is None:
        providers.append(left_out("numba", why))
    else:
        providers.append(Provider("numba", lambda: loop(*arrays), _named, single_thread=True))
    estimate, why = peers.torchrl_function("vtrace_advantage_estimate")
    if estimate is None:
        providers.append(left_out("torchrl-loop", why))
    else:
        following, zeros = torch.cat([values[1:], last_values[None]]), torch.zeros_like(log_rhos)

        def torchrl():
            advantages, targets = estimate(GAMMA, log_rhos, zeros, values, following, rewards, terminated, terminated)
            return targets, advantages

        providers.append(Provider("torchrl-loop", torchrl, _named))
    providers.append(left_out("compile", "unrolls the loop over T, up to minutes to compile"))

    def truth() -> dict[str, Tensor]:
        return _named(pf.reference.vtrace(*(x.double() for x in data), terminated=terminated, gamma=GAMMA))

    return Workload(providers, truth, "eager", [*data, terminated])


def _case(steps: int, n: int, quick: bool = False, remark: str = "") -> Case:
    size = steps * n
    return Case("vtrace", (steps, n), "float32", "forward", 21 * size + 4 * n, 15 * size, build, (), quick, remark)


CASES = [_case(20, 32, quick=True, remark="IMPALA's batch"), _case(128, 1024)]
