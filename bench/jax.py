"""ppo_fast.jax against what JAX trainers run: lax.scan, plain jnp and rlax, all jitted, on this machine's CPU.

    python -m bench.jax [--quick]

Floors and bytes are those of the torch ops (gae.py, ppo_loss.py, ...): the kernels are the same. Every call waits for its
results (block_until_ready). XLA gives a program fresh memory for them, which above 32 MiB the system maps anew; where memory is
donated, every provider writes to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import ppo_fast as pf
import ppo_fast.jax as pfj
from ppo_fast.config import STATS

from . import machine, peers, report
from .gae import GAMMA, LAM
from .harness import (
    LABELS,
    OURS,
    Case,
    Provider,
    Row,
    Target,
    Workload,
    double_leaf,
    gradients,
    grid,
    left_out,
    run_case,
)
from .main import _progress
from .ppo_loss import CLIP, CONFIG, ENTROPY_COEF, LOSS_SCALE, STATS_BYTES, VALUE_COEF

SCAN, JNP, RLAX = "scan", "jnp", "rlax"
LABELS |= {SCAN: "lax.scan", JNP: "plain jnp", RLAX: "rlax"}


def to_torch(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x))


def to_jax(x: Tensor) -> jax.Array:
    return jnp.asarray(x.detach().numpy())


def provider(
    name: str,
    function: Callable,
    arrays: tuple,
    read: Callable[[Any], dict[str, Any]],
    note: str = "",
    donates: bool = False,
) -> Provider:
    """`function`, jitted, of arrays that lie on the device; done when its results are there. `donates`: the results of a call
    are given to the next as `out`, memory that is there; a function that does not ask for it writes there all the same."""
    if donates and name != OURS:
        program = jax.jit(lambda *x: function(*x[:-1]), donate_argnums=len(arrays), keep_unused=True)
    else:
        program = jax.jit(function, donate_argnums=len(arrays) if donates else None)
    kept = [jax.tree.map(jnp.copy, jax.jit(function)(*arrays))] if donates else []

    def run() -> Any:
        if not donates:
            return jax.block_until_ready(program(*arrays))
        kept[0] = jax.block_until_ready(program(*arrays, kept[0]))
        return kept[0]

    def result(out: Any) -> dict[str, Tensor]:
        return {k: to_torch(v) for k, v in read(out).items()}

    return Provider(name, run, result, note=note)


# --- scans ----------------------------------------------------------------------------------------------------------------


def scan_gae(rewards, values, last_values, terminated):
    """As PureJaxRL-like trainers write it: one step of lax.scan for each step of time."""
    alive = 1.0 - terminated
    following = jnp.concatenate([values[1:], last_values[None]])
    delta = rewards + GAMMA * following * alive - values

    def step(running, x):
        delta, alive = x
        running = delta + GAMMA * LAM * alive * running
        return running, running

    _, advantages = jax.lax.scan(step, jnp.zeros_like(last_values), (delta, alive), reverse=True)
    return advantages, advantages + values


def associative_gae(rewards, values, last_values, terminated):
    """In parallel over time, by lax.associative_scan."""
    alive = 1.0 - terminated
    following = jnp.concatenate([values[1:], last_values[None]])
    delta = rewards + GAMMA * following * alive - values

    def joined(later, earlier):
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    _, advantages = jax.lax.associative_scan(joined, (GAMMA * LAM * alive, delta), reverse=True)
    return advantages, advantages + values


def rlax_gae(rlax):
    def gae(rewards, values, last_values, terminated):
        every = jnp.concatenate([values, last_values[None]])
        one = lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, LAM, v)  # noqa: E731
        advantages = jax.vmap(one, 1, 1)(rewards, GAMMA * (1.0 - terminated), every)
        return advantages, advantages + values

    return gae


def build_gae(case: Case) -> Workload:
    steps, n = case.shape
    data = torch.randn(steps, n), torch.randn(steps, n), torch.randn(n), torch.rand(steps, n) < 0.01
    arrays = tuple(map(to_jax, data))
    read = lambda out: dict(zip(("advantages", "returns"), out, strict=True))  # noqa: E731

    def ours(rewards, values, last_values, terminated, out=None):
        return pfj.gae(rewards, values, last_values, terminated=terminated, gamma=GAMMA, lam=LAM, out=out)

    there = not case.variant
    rlax, why = peers.imported("rlax")
    providers = [
        provider(OURS, ours, arrays, read, donates=there),
        provider(SCAN, scan_gae, arrays, read, donates=there),
        provider(JNP, associative_gae, arrays, read, "lax.associative_scan", there),
        left_out(RLAX, why) if rlax is None else provider(RLAX, rlax_gae(rlax), arrays, read, donates=there),
    ]

    def truth() -> dict[str, Tensor]:
        wide = [x.double() for x in data[:3]]
        return read(pf.reference.gae(*wide, terminated=data[3], gamma=GAMMA, lam=LAM))

    return Workload(providers, truth, SCAN, list(data))


# --- losses: with gradients, as jax.value_and_grad gives them ----------------------------------------------------------------


def plain_loss(log_prob, values, entropy, old_log_prob, advantages, old_values, returns):
    """The loss as a trainer writes it, and the same statistics that ours gives."""
    log_ratio = log_prob - old_log_prob
    ratio = jnp.exp(log_ratio)
    policy_loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - CLIP, 1 + CLIP)).mean()
    value_error = (values - returns) ** 2
    near_error = (old_values + jnp.clip(values - old_values, -CLIP, CLIP) - returns) ** 2
    value_loss = 0.5 * jnp.maximum(value_error, near_error).mean()
    loss = policy_loss + VALUE_COEF * value_loss - ENTROPY_COEF * entropy.mean()
    low, high = (ratio < 1 - CLIP).mean(), (ratio > 1 + CLIP).mean()
    value_clipped = (near_error > value_error) & (jnp.abs(values - old_values) > CLIP)
    mean_ratio, zero = ratio.mean(), jnp.zeros(())
    stats = jnp.stack([
        policy_loss, value_loss, entropy.mean(), zero, ((ratio - 1) - log_ratio).mean(), (-log_ratio).mean(), low + high, low,
        high, zero, value_clipped.mean(), mean_ratio, ratio.min(), ratio.max(), mean_ratio**2 / (ratio**2).mean(),
        1 - (returns - values).var() / returns.var(),
    ])  # fmt: skip
    return loss, stats


def rlax_loss(rlax):
    """rlax has the surrogate; the rest is plain jnp, without statistics."""

    def loss(log_prob, values, entropy, old_log_prob, advantages, old_values, returns):
        policy_loss = rlax.clipped_surrogate_pg_loss(rlax_ratio(log_prob, old_log_prob), advantages, CLIP)
        near = old_values + jnp.clip(values - old_values, -CLIP, CLIP)
        value_loss = jnp.maximum(rlax.l2_loss(values, returns), rlax.l2_loss(near, returns)).mean()
        return policy_loss + VALUE_COEF * value_loss - ENTROPY_COEF * entropy.mean(), ()

    def rlax_ratio(log_prob, old_log_prob):
        return jnp.exp(log_prob - old_log_prob)

    return loss


def _read_loss(names):
    def read(out):
        (loss, stats), grads = out
        found = {"loss": loss, **{f"d {k}": g for k, g in zip(names, grads, strict=True)}}
        if not isinstance(stats, tuple):
            found["stats"] = stats.vector if isinstance(stats, pfj.Stats) else stats
        return found

    return read


def build_ppo_loss(case: Case) -> Workload:
    (n,) = case.shape
    old_log_prob, advantages, old_values = grid(-torch.rand(n)), torch.randn(n), grid(torch.randn(n))
    returns = old_values + grid(0.5 * torch.randn(n))
    learned = {
        "log_prob": old_log_prob + grid(0.15 * torch.randn(n)), "values": old_values + grid(0.2 * torch.randn(n)),
        "entropy": torch.rand(n),
    }  # fmt: skip
    rollout = old_log_prob, advantages, old_values, returns
    arrays, read = tuple(map(to_jax, (*learned.values(), *rollout))), _read_loss(learned)

    def ours(log_prob, values, entropy, old_log_prob, advantages, old_values, returns):
        return pfj.ppo_loss(log_prob, old_log_prob, advantages, CONFIG, values=values, entropy=entropy, old_values=old_values,
                            returns=returns)  # fmt: skip

    def with_grads(loss):
        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)

    rlax, why = peers.imported("rlax")
    note = "surrogate and squares of rlax; no statistics"
    providers = [
        provider(OURS, with_grads(ours), arrays, read),
        provider(JNP, with_grads(plain_loss), arrays, read),
        left_out(RLAX, why) if rlax is None else provider(RLAX, with_grads(rlax_loss(rlax)), arrays, read, note),
    ]

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(v) for k, v in learned.items()}
        old, adv, old_v, ret = (x.double() for x in rollout)
        out = pf.reference.ppo_loss(wide["log_prob"], old, adv, CONFIG, values=wide["values"], old_values=old_v,
                                    returns=ret, entropy=wide["entropy"])  # fmt: skip
        out.loss.backward()
        return {"loss": out.loss, "stats": out.stats.vector, **gradients(wide)}

    return Workload(providers, truth, JNP, [*learned.values(), *rollout], scales=LOSS_SCALE)


def build_categorical(case: Case) -> Workload:
    n, width = case.shape
    logits, actions = torch.randn(n, width), torch.randint(width, (n,), dtype=torch.int32)
    rows = torch.arange(n)
    old_log_prob = grid(torch.log_softmax(logits, -1)[rows, actions.long()] + 0.15 * torch.randn(n))
    advantages, values, old_values = torch.randn(n), grid(torch.randn(n)), grid(torch.randn(n))
    returns = old_values + grid(0.5 * torch.randn(n))
    learned = {"logits": logits, "values": values}
    given = actions, old_log_prob, advantages, old_values, returns
    arrays, read = tuple(map(to_jax, (*learned.values(), *given))), _read_loss(learned)

    def ours(logits, values, actions, old_log_prob, advantages, old_values, returns):
        return pfj.categorical_ppo_loss(logits, actions, old_log_prob, advantages, CONFIG, values=values,
                                        old_values=old_values, returns=returns)  # fmt: skip

    def plain(logits, values, actions, old_log_prob, *rest):
        every = jax.nn.log_softmax(logits)
        log_prob = jnp.take_along_axis(every, actions[:, None], -1)[:, 0]
        return plain_loss(log_prob, values, -(jnp.exp(every) * every).sum(-1), old_log_prob, *rest)

    def with_grads(loss):
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(v) for k, v in learned.items()}
        old, adv, old_v, ret = (x.double() for x in given[1:])
        out = pf.reference.categorical_ppo_loss(wide["logits"], actions.long(), old, adv, CONFIG, values=wide["values"],
                                                old_values=old_v, returns=ret)  # fmt: skip
        out.loss.backward()
        return {"loss": out.loss, "stats": out.stats.vector, **gradients(wide)}

    providers = [provider(OURS, with_grads(ours), arrays, read), provider(JNP, with_grads(plain), arrays, read)]
    return Workload(providers, truth, JNP, [*learned.values(), *given], scales=LOSS_SCALE)


# --- cases ------------------------------------------------------------------------------------------------------------------


def _gae(steps: int, n: int, *targets: Target, quick: bool = False, variant: str = "") -> Case:
    size, remark = steps * n, "into fresh memory" if variant else "into donated memory"
    n_bytes = 17 * size + 4 * n
    return Case("gae", (steps, n), "float32", "forward", n_bytes, 7 * size, build_gae, targets, quick, remark, variant)


def _loss(n: int, *targets: Target, quick: bool = False) -> Case:
    return Case(
        "ppo_loss", (n,), "float32", "forward + backward", 40 * n + STATS_BYTES, 60 * n, build_ppo_loss, targets, quick
    )


def _categorical(n: int, width: int, *targets: Target, quick: bool = False) -> Case:
    n_bytes = n * (8 * width + 28) + STATS_BYTES
    return Case("categorical_ppo_loss", (n, width), "float32", "forward + backward", n_bytes, n * (10 * width + 60),
                build_categorical, targets, quick)  # fmt: skip


CASES = [
    _gae(2048, 4096, Target(3, (SCAN, JNP, RLAX))),
    _gae(2048, 4096, variant="fresh"),
    _gae(128, 1024, Target(3, (SCAN, JNP, RLAX))),
    _gae(128, 8, quick=True),
    _loss(256, quick=True),
    _loss(65_536, Target(3, (JNP,))),
    _loss(1_048_576),
    _categorical(65_536, 6, Target(3, (JNP,))),
    _categorical(4096, 18),
]
assert len(STATS) == 16  # plain_loss has them all


@dataclass
class JaxBenchConfig:
    """Measures ppo_fast.jax against lax.scan, plain jnp and rlax, all jitted, on all cores of this machine."""

    quick: bool = False
    """Small cases only: to see that it works."""
    seconds: float = 3.0
    """Measuring time of one case; compilation comes on top."""
    out: Path = Path("bench/results")
    """Results go to OUT/<machine>/: jax.csv and jax.png (jax-quick.* where not everything ran)."""


def main(config: JaxBenchConfig) -> int:
    wanted, rows = (OURS, SCAN, JNP, RLAX), list[Row]()
    cases = [c for c in CASES if c.quick or not config.quick]
    with _progress(len(cases)) as step:
        for case in cases:
            step(case.name)
            for row in run_case(
                case, machine.cores(), wanted, min(config.seconds, 0.3) if config.quick else config.seconds
            ):
                row.peak_bytes = None  # torch's allocator sees nothing of XLA's
                rows.append(dataclasses.replace(row))
    facts = machine.facts() | {package: peers.version(package) for package in ("jax", "jaxlib", "rlax")}
    report.print_table(rows, facts)
    folder = config.out / machine.slug()
    folder.mkdir(parents=True, exist_ok=True)
    name = "jax-quick" if config.quick else "jax"
    report.write_csv(rows, facts, folder / f"{name}.csv")
    drawn = report.draw(rows, facts, folder / f"{name}.png")
    print("wrote", folder / f"{name}.csv", folder / f"{name}.png" if drawn else "")
    return 1 if any(row.provider == OURS and row.status != "ok" for row in rows) else 0


if __name__ == "__main__":
    import tyro

    raise SystemExit(main(tyro.cli(JaxBenchConfig)))
