"""What a benchmark is made of (case, workload, provider), how providers are timed, and when a number is refused.

All providers of a case take turns in one run, so that whatever else the machine does falls on all of them alike, and
only ratios within one run are reported. A number is refused where the op's result in that same run is wrong.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

OURS, COPY, CLONE, PRODUCTS = "ours", "copy", "clone", "products"
#: Measured beside the providers to compare with, not to compete.
YARDSTICKS = (COPY, CLONE, PRODUCTS)
#: Every provider that an op file may name, and how tables call it.
LABELS = {
    OURS: "ppo_fast",
    "eager": "eager torch",
    "compile": "torch.compile",
    "numba": "numba @njit",
    "sb3": "SB3 numpy",
    "cleanrl": "CleanRL loop",
    "torchrl-loop": "torchrl loop",
    "torchrl-vec": "torchrl vectorised",
    "loop": "loop over tokens",
    "apart": "gae, then whiten",
    "torch-chunked": "torch, chunked",
    "liger": "Liger",
    "trl": "TRL",
    "verl": "verl",
    PRODUCTS: "the products alone",
    COPY: "copy of as many bytes",
    CLONE: "copy to new memory",
}
#: A peer further from the truth than this share of its magnitude computes something else, and is not compared.
SOMETHING_ELSE = 0.05
#: More cores than this at work for other processes, and a time is marked as disturbed: on a busy machine whatever waits
#: for a second thread (every OpenMP loop of torch) takes milliseconds, which flatters whoever does not.
DISTURBED = 0.1


@dataclass(frozen=True)
class Target:
    """The least that the fastest of `peers` must be slower by; against the copy, the share of its bandwidth."""

    at_least: float
    peers: tuple[str, ...]

    def __str__(self) -> str:
        if self.peers == (COPY,):
            return f"≥ {self.at_least:.0%} of copy bandwidth"
        best = "the best of " if len(self.peers) > 1 else ""
        return f"≥ {self.at_least:g}× {best}{', '.join(LABELS[p] for p in self.peers)}"


@dataclass(frozen=True)
class Case:
    """One shape of one op. `bytes` and `flops` are the floor: what any implementation must move and compute.

    bytes: every input read once, every output and gradient written once; inputs that a later pass needs (the backward
    of an op that cannot know its upstream gradient) count again. Scratch does not count.
    flops: adds, multiplies, compares; one exp or log counts as 1.
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    mode: str  # "forward", or "forward + backward": through autograd, gradients into .grad
    bytes: int
    flops: int
    build: Callable[[Case], Workload]
    targets: tuple[Target, ...] = ()
    quick: bool = False  # also part of the quick run
    remark: str = ""
    variant: str = ""  # tells cases of one shape apart

    @property
    def is_heavy(self) -> bool:
        """Seconds a call: measured with all threads only."""
        return self.flops > 1e11

    @property
    def name(self) -> str:
        return f"{self.op} {list(self.shape)} {SHORT[self.dtype]}{self.variant and ' ' + self.variant}"


SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}


@dataclass
class Provider:
    """One way to compute the op. `run` is timed, `prepare` before it is not; `read` names what `run` produced."""

    name: str
    run: Callable[[], Any] | None
    read: Callable[[Any], dict[str, Tensor]] = dict
    prepare: Callable[[], None] | None = None
    single_thread: bool = False  # whatever torch.set_num_threads says
    why_not: str = ""  # not run, and the reason
    note: str = ""  # what it leaves out, say

    def call(self) -> Any:
        assert self.run is not None
        if self.prepare is not None:
            self.prepare()
        return self.run()


def left_out(name: str, why: str) -> Provider:
    return Provider(name, None, why_not=why)


@dataclass
class Workload:
    """Inputs that exist, and everything that runs on them. `reads`: each input as often as the floor counts it."""

    providers: list[Provider]
    truth: Callable[[], dict[str, Tensor]]  # by the reference in float64
    yardstick: str  # the provider whose rounding error the rule allows twice: the eager formula
    reads: list[Tensor]
    peers_only: tuple[str, ...] = ()  # outputs in `truth` that only peers have
    scales: dict[str, float] = field(default_factory=dict)  # magnitude of the terms of an output whose sum cancels


@dataclass
class Row:
    """One line of the result: one provider of one case at one number of threads."""

    case: Case
    threads: int
    provider: str
    status: str = "ok"  # "ok", "left out", "failed", "differs" (a peer's), "parity failed" (ours)
    note: str = ""
    error: float | None = None  # against float64, relative to the largest magnitude; the worst output
    peak_bytes: int | None = None  # most that one call held of torch's memory beside its inputs; None: not torch's
    calls: int = 0
    p20: float = 0.0  # seconds
    p50: float = 0.0
    p80: float = 0.0
    ours_faster: float | None = None  # this provider's median over ours
    copy_share: float | None = None  # the copy's median over this provider's
    others: float | None = None  # cores that other processes kept busy meanwhile; None where it cannot be known

    @property
    def disturbed(self) -> bool:
        return self.others is not None and self.others > DISTURBED


# --- autograd ---------------------------------------------------------------------------------------------------------


def backward(name: str, outputs: Callable[[], dict[str, Tensor]], leaves: dict[str, Tensor],
             upstream: dict[str, Tensor] | None = None, note: str = "") -> Provider:  # fmt: skip
    """Provider of forward + backward: `upstream` names the outputs that get a gradient; without it, "loss" does."""
    given = None if upstream is None else list(upstream.values())

    def prepare() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def run() -> dict[str, Tensor]:
        out = outputs()
        torch.autograd.backward([out["loss"]] if upstream is None else [out[k] for k in upstream], given)
        return out

    def read(out: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**out, **gradients(leaves)}

    return Provider(name, run, read, prepare, note=note)


def compiled(formula: Callable) -> Callable:
    """`torch.compile` of the eager formula at this shape and thread count; nothing kept of earlier compilations."""
    torch._dynamo.reset()
    return torch.compile(formula, dynamic=False)


def gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every leaf that has one, as "d <name>"."""
    return {f"d {name}": x.grad for name, x in leaves.items() if x.grad is not None}


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def double_leaf(x: Tensor) -> Tensor:
    return leaf(x.detach().double())


def grid(x: Tensor) -> Tensor:
    """To multiples of 2⁻¹⁰: no clip or tie of a loss is met to within rounding, where float32 and float64 would part."""
    return (x * 1024.0).round() / 1024.0


# --- parity -----------------------------------------------------------------------------------------------------------


def deviation(x: Tensor, truth: Tensor, least: float = 0.0) -> float:
    """Largest error over the truth's largest magnitude, or `least`; infinite where only one of them is finite."""
    if x.shape != truth.shape:
        return float("inf")
    error, scale = 0.0, least
    # some at a time: float64 of a head's whole gradient, several times over, would not fit beside it
    for part, expected in zip(*(y.detach().flatten().split(1 << 26) for y in (x, truth)), strict=True):
        part, expected = part.double(), expected.double()
        finite = expected.isfinite()
        same = (part == expected) | (part.isnan() & expected.isnan())
        if not bool((part.isfinite() == finite).all()) or not bool(same[~finite].all()):
            return float("inf")
        if bool(finite.any()):
            error = max(error, (part - expected)[finite].abs().max().item())
            scale = max(scale, expected[finite].abs().max().item())
    return error / scale if scale else (0.0 if error == 0.0 else float("inf"))


def refusal(ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor],
            scales: dict[str, float], ulps: float = 8.0) -> str:  # fmt: skip
    """Why our result does not pass, or "". The rule: at most twice the eager formula's error, plus a few ulp."""
    for name, expected in truth.items():
        if name not in ours:
            return f"{name} is missing"
        allowed = ulps * torch.finfo(ours[name].dtype).eps
        least = scales.get(name, 0.0)
        if name in eager and (theirs := deviation(eager[name], expected, least)) != float("inf"):
            allowed += 2.0 * theirs
        error = deviation(ours[name], expected, least)
        if not error <= allowed:
            return f"{name}: error {error:.1e}, allowed {allowed:.1e}"
    return ""


# --- one case ---------------------------------------------------------------------------------------------------------


def copies_of(n_bytes: int) -> list[Provider]:
    """A copy that moves as many bytes as the case must, half read and half written, to memory that is there beforehand.

    And where it matters one to new memory, as every op has it that returns its results: above 32 MiB the C library asks
    the kernel for each block anew, and first touches of pages can cost several times the copy.
    """
    source = torch.zeros(max(1, n_bytes // 8))
    target = torch.empty_like(source)
    copies = [Provider(COPY, lambda: target.copy_(source), lambda _: {})]
    if n_bytes >= 1 << 20:
        copies.append(Provider(CLONE, source.clone, lambda _: {}))
    return copies


def run_case(case: Case, threads: int, wanted: Collection[str], seconds: float) -> list[Row]:
    """Parity, then times, of every wanted provider of one case. If ours is wrong, nobody's time is taken."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    workload = case.build(case)
    truth = workload.truth()
    rows: list[Row] = []
    ready: list[Provider] = []
    results: dict[str, dict[str, Tensor]] = {}
    for p in workload.providers:
        row = Row(case, threads, p.name, note=p.note or ("one thread" if p.single_thread else ""))
        if p.name in wanted or p.name == PRODUCTS:
            rows.append(row)
        elif p.name not in (OURS, workload.yardstick):
            continue
        if p.run is None:
            row.status, row.note = "left out", p.why_not
            continue
        try:
            results[p.name] = {k: v.detach().clone() for k, v in p.read(p.call()).items()}
        except Exception as error:  # a peer that breaks is a line in the table, not the end of the run
            row.status, row.note = "failed", f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        if not p.single_thread:
            row.peak_bytes = peak_memory(p)
        row.error = max(
            (deviation(x, truth[k], workload.scales.get(k, 0.0)) for k, x in results[p.name].items() if k in truth),
            default=None,
        )
        if p.name != OURS and row.error is not None and row.error > SOMETHING_ELSE:
            row.status, row.note = "differs", "computes something else"
        elif p.name in wanted or p.name == PRODUCTS:
            ready.append(p)
    by_name = {row.provider: row for row in rows}
    if OURS in by_name:
        due = {k: v for k, v in truth.items() if k not in workload.peers_only}
        why = refusal(results.get(OURS, {}), results.get(workload.yardstick, {}), due, workload.scales)
        if by_name[OURS].status == "failed" or why:
            by_name[OURS].status, by_name[OURS].note = "parity failed", by_name[OURS].note or why
            return rows
    for p in copies_of(case.bytes):
        ready.append(p)
        rows.append(Row(case, threads, p.name))
        by_name[p.name] = rows[-1]
    watch = Watch()
    samples = measure(ready, seconds)
    others = watch.others()
    for name, s in samples.items():
        row = by_name[name]
        row.calls, row.p20, row.p50, row.p80 = len(s.seconds), s.quantile(0.2), s.quantile(0.5), s.quantile(0.8)
        row.others = others
        row.copy_share = samples[COPY].quantile(0.5) / row.p50
        if OURS in samples:
            row.ours_faster = row.p50 / samples[OURS].quantile(0.5)
    return rows


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No stderr, not even that of C++: the profiler announces itself there, in the middle of a progress bar."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_memory(provider: Provider) -> int:
    """Most bytes allocated at once during one call, results and gradients included, by torch's own allocator."""
    assert provider.run is not None
    if provider.prepare is not None:
        provider.prepare()
    with silent(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        result = provider.run()
    del result
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((n for _, n in changes), initial=0))


class Watch:
    """How many cores other processes keep busy, from the machine's and our own processor time (Linux)."""

    def __init__(self) -> None:
        self.wall, self.all, self.own = time.perf_counter(), self._machine(), time.process_time()

    @staticmethod
    def _machine() -> float | None:
        try:
            with open("/proc/stat") as file:
                user, nice, system = (int(x) for x in file.readline().split()[1:4])
        except (OSError, ValueError):
            return None
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")

    def others(self) -> float | None:
        machine, wall = self._machine(), time.perf_counter() - self.wall
        if machine is None or self.all is None:
            return None
        return max(0.0, (machine - self.all - (time.process_time() - self.own)) / wall)


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    calls_a_turn: int
    seconds: list[float] = field(default_factory=list)
    turns: int = 0
    spent: float = 0.0

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _estimate(provider: Provider) -> float:
    """Seconds of one call, after warm-up; slow ones are not called again just to be sure."""
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        provider.call()
        best = min(best, time.perf_counter() - start)
        if best > 0.2:
            break
    return best


def _turn(provider: Provider, samples: Samples) -> None:
    """A few calls in a row. Where calls are short the first is not counted: it meets the neighbour's data in the caches."""
    began, run = time.perf_counter(), provider.run
    assert run is not None
    if samples.calls_a_turn > 1:
        provider.call()
    for _ in range(samples.calls_a_turn):
        if provider.prepare is not None:
            provider.prepare()
        start = time.perf_counter()
        result = run()
        samples.seconds.append(time.perf_counter() - start)
        del result  # freed outside the clock, for everyone
    samples.turns += 1
    samples.spent += time.perf_counter() - began


def measure(providers: list[Provider], seconds: float, turns: int = 3) -> dict[str, Samples]:
    """Round-robin for `seconds`, shared evenly: slow providers sit rounds out, but all get at least `turns` of them."""
    taken = {p.name: Samples(max(1, min(20, int(4e-4 / _estimate(p))))) for p in providers}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        start, share = time.perf_counter(), seconds / len(providers)
        while (over := (time.perf_counter() - start) / seconds) < 1 or any(s.turns < turns for s in taken.values()):
            due = [p for p in providers if taken[p.name].turns < turns or taken[p.name].spent <= share * over]
            for p in due or [min(providers, key=lambda p: taken[p.name].spent)]:
                _turn(p, taken[p.name])
    finally:
        if enabled:
            gc.enable()
    return taken
