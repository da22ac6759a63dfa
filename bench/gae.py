"""GAE over [T, N] float32 with episode ends; T time steps, N environments.

Floor: rewards, values and the bool flags are read once, advantages and returns written once: 17 bytes an element, and
7 FLOPs: it is a copy with a little arithmetic. The recursion over T is serial, so few environments (N = 1, 8) are bound
by the latency of one multiply-add a step instead.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import ppo_fast as pf

from . import peers
from .harness import COPY, OURS, Case, Provider, Target, Workload, compiled, left_out

GAMMA, LAM = 0.99, 0.95


def cleanrl_loop(rewards, values, dones, next_value, next_done):
    """What CleanRL-like trainers run: `dones[t]` says that the observation at t came after a reset."""
    steps = rewards.shape[0]
    advantages = torch.zeros_like(rewards)
    running = 0
    for t in range(steps - 1, -1, -1):
        last = t == steps - 1
        alive = 1.0 - (next_done if last else dones[t + 1])
        following = next_value if last else values[t + 1]
        delta = rewards[t] + GAMMA * following * alive - values[t]
        advantages[t] = running = delta + GAMMA * LAM * alive * running
    return advantages, advantages + values


def unrolled_loop(rewards, values, last_values, terminated):
    """For torch.compile, as LeanRL-like trainers give it: rows in lists, so that nothing is written in place."""
    rows = [x.unbind() for x in (rewards, values, 1.0 - terminated.float())]
    running, following, out = torch.zeros_like(last_values), last_values, []
    for reward, value, alive in zip(*map(reversed, rows), strict=True):
        running = reward + GAMMA * following * alive - value + GAMMA * LAM * alive * running
        following = value
        out.append(running)
    advantages = torch.stack(out[::-1])
    return advantages, advantages + values


def numba_loop(rewards, values, last_values, terminated):
    """One pass, time outside and environments inside, so that numba reads rows and can use SIMD."""
    steps, n = rewards.shape
    gamma, decay, one, zero = np.float32(GAMMA), np.float32(GAMMA * LAM), np.float32(1), np.float32(0)
    advantages, returns = np.empty((steps, n), np.float32), np.empty((steps, n), np.float32)
    running, following = np.zeros(n, np.float32), last_values.copy()
    for t in range(steps - 1, -1, -1):
        for i in range(n):
            alive = zero if terminated[t, i] else one
            value = values[t, i]
            running[i] = rewards[t, i] + gamma * following[i] * alive - value + decay * alive * running[i]
            following[i] = value
            advantages[t, i] = running[i]
            returns[t, i] = running[i] + value
    return advantages, returns


def _named(result) -> dict[str, Tensor]:
    advantages, returns = result
    return {"advantages": torch.as_tensor(advantages), "returns": torch.as_tensor(returns)}


def _sb3(rewards, values, last_values, terminated) -> Provider:
    """The real buffer of stable-baselines3, its arrays filled as its rollout does."""
    buffers, why = peers.imported("stable_baselines3.common.buffers")
    if buffers is None:
        return left_out("sb3", why)
    from gymnasium.spaces import Box, Discrete

    steps, n = rewards.shape
    buffer = buffers.RolloutBuffer(steps, Box(-1, 1, (1,)), Discrete(2), "cpu", LAM, GAMMA, n)
    buffer.rewards, buffer.values = rewards.numpy(), values.numpy()
    buffer.episode_starts = np.concatenate([np.zeros((1, n)), terminated[:-1].numpy()]).astype(np.float32)
    last_dones = terminated[-1].numpy()

    def run():
        buffer.compute_returns_and_advantage(last_values, last_dones)
        return buffer.advantages, buffer.returns

    return Provider("sb3", run, _named, single_thread=True)


def _torchrl(name: str, function: str, rewards, values, last_values, terminated) -> Provider:
    estimate, why = peers.torchrl_function(function)
    if estimate is None:
        return left_out(name, why)
    following = torch.cat([values[1:], last_values[None]])
    return Provider(name, lambda: estimate(GAMMA, LAM, values, following, rewards, terminated, terminated), _named)


def build(case: Case) -> Workload:
    steps, n = case.shape
    rewards, values, last_values = torch.randn(steps, n), torch.randn(steps, n), torch.randn(n)
    terminated = torch.rand(steps, n) < 0.01
    dones = torch.cat([torch.zeros(1, n), terminated[:-1].float()])
    next_done = terminated[-1].float()
    data = rewards, values, last_values, terminated
    arrays = [x.numpy() for x in data]
    # What is held against copy_ writes where copy_ does: into memory that is there already.
    out = (torch.empty(steps, n), torch.empty(steps, n)) if steps * n > 1 << 21 else None
    providers = [
        Provider(
            OURS,
            lambda: pf.gae(rewards, values, last_values, terminated=terminated, gamma=GAMMA, lam=LAM, out=out),
            _named,
        ),
        Provider("cleanrl", lambda: cleanrl_loop(rewards, values, dones, last_values, next_done), _named),
    ]
    loop, why = peers.njit(numba_loop)
    if loop is None:
        providers.append(left_out("numba", why))
    else:
        providers.append(Provider("numba", lambda: loop(*arrays), _named, single_thread=True))
    providers.append(_sb3(*data))
    providers.append(_torchrl("torchrl-loop", "generalized_advantage_estimate", *data))
    if steps * n > 1 << 21:
        providers.append(left_out("torchrl-vec", "pads every episode to the longest: gigabytes at this shape"))
    else:
        providers.append(_torchrl("torchrl-vec", "vec_generalized_advantage_estimate", *data))
    if steps <= 128 and n > 1000:
        fast = compiled(unrolled_loop)
        providers.append(Provider("compile", lambda: fast(*data), _named))
    else:
        providers.append(left_out("compile", "unrolls the loop over T, up to minutes to compile: only at [128, 1024]"))

    def truth() -> dict[str, Tensor]:
        wide = [x.double() for x in data[:3]]
        return _named(pf.reference.gae(*wide, terminated=terminated, gamma=GAMMA, lam=LAM))

    return Workload(providers, truth, "cleanrl", list(data))


# --- tokens of a language model: [B, T], a mask that trainers carry values over ------------------------------------------


def masked_loop(rewards, values, mask):
    """As trainers for language models run it, on the CPU of their driver: a step of all sequences at a time."""
    running = following = torch.zeros(len(rewards))
    out = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        keep = mask[:, t]
        advantage = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * running
        running = keep * advantage + (1 - keep) * running
        following = keep * values[:, t] + (1 - keep) * following
        out.append(running)
    advantages = torch.stack(out[::-1], 1)
    return advantages * mask, (advantages + values) * mask


def build_masked(case: Case) -> Workload:
    rewards, values = torch.randn(case.shape), torch.randn(case.shape)
    mask = torch.rand(case.shape) < 0.9
    out = (torch.empty(case.shape), torch.empty(case.shape))
    numbers = mask.float()
    providers = [
        Provider(OURS, lambda: pf.gae(rewards, values, mask=mask, gamma=GAMMA, lam=LAM, time_dim=1, out=out), _named),
        Provider("loop", lambda: masked_loop(rewards, values, numbers), _named),
    ]

    def truth() -> dict[str, Tensor]:
        return _named(pf.reference.gae(rewards.double(), values.double(), mask=mask, gamma=GAMMA, lam=LAM, time_dim=1))

    return Workload(providers, truth, "loop", [rewards, values, mask])


# --- advantages that are whitened next: the sums for it taken in the same pass, or apart ---------------------------------


def build_whitened(case: Case) -> Workload:
    steps, n = case.shape
    data = torch.randn(steps, n), torch.randn(steps, n), torch.randn(n), torch.rand(steps, n) < 0.01
    rewards, values, last_values, terminated = data
    dones = torch.cat([torch.zeros(1, n), terminated[:-1].float()])
    out = (torch.empty(steps, n), torch.empty(steps, n))

    def together():
        advantages, returns, moments = pf.gae(rewards, values, last_values, terminated=terminated, gamma=GAMMA, lam=LAM,
                                              out=out, moments=True)  # fmt: skip
        return pf.whiten(advantages, moments=moments), returns

    def apart():
        advantages, returns = pf.gae(rewards, values, last_values, terminated=terminated, gamma=GAMMA, lam=LAM, out=out)
        return pf.whiten(advantages), returns

    def eager():
        advantages, returns = cleanrl_loop(rewards, values, dones, last_values, terminated[-1].float())
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8), returns

    def truth() -> dict[str, Tensor]:
        wide = [x.double() for x in data[:3]]
        advantages, returns = pf.reference.gae(*wide, terminated=terminated, gamma=GAMMA, lam=LAM)
        return _named((pf.reference.whiten(advantages), returns))

    providers = [Provider(OURS, together, _named), Provider("apart", apart, _named), Provider("cleanrl", eager, _named)]
    return Workload(providers, truth, "cleanrl", [*data, rewards, rewards])


def _whitened_case(steps: int, n: int) -> Case:
    """Advantages are written, read again and written whitened: 8 bytes a step more than without."""
    size = steps * n
    return Case("gae", (steps, n), "float32", "forward", 25 * size + 4 * n, 12 * size, build_whitened,
                remark="then whitened, by the sums that it took", variant="whitened")  # fmt: skip


def _masked_case(batch: int, steps: int, *targets: Target, quick: bool = False) -> Case:
    size = batch * steps
    return Case("gae", (batch, steps), "float32", "forward", 17 * size, 7 * size, build_masked, targets, quick,
                "tokens [B, T] with a mask; into memory that is there (out=)")  # fmt: skip


def _case(steps: int, n: int, *targets: Target, quick: bool = False, remark: str = "") -> Case:
    size = steps * n
    return Case("gae", (steps, n), "float32", "forward", 17 * size + 4 * n, 7 * size, build, targets, quick, remark)


CASES = [
    _case(2048, 4096, Target(0.85, (COPY,)), remark="into memory that is there (out=), as copy_ does"),
    _case(128, 1024, Target(4, ("numba",)), Target(10, ("sb3",)), Target(20, ("torchrl-loop", "torchrl-vec"))),
    _case(2048, 8, Target(1.5, ("numba",)), Target(100, ("cleanrl",))),
    _case(2048, 1, Target(1.5, ("numba",)), Target(100, ("cleanrl",)), remark="CleanRL's MuJoCo rollout"),
    _case(128, 4, quick=True, remark="CleanRL's CartPole rollout"),
    _masked_case(512, 8192, Target(0.8, (COPY,)), Target(500, ("loop",))),
    _whitened_case(2048, 4096),
    _whitened_case(128, 1024),
]
