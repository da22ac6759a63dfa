"""`ppo-fast bench`: runs the cases, prints the table, writes CSV and picture."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine, report
from .harness import OURS, Case, Row, run_case

Op = Literal[
    "gae", "vtrace", "discounted_returns", "whiten", "categorical_log_prob", "multi_categorical_log_prob",
    "bernoulli_log_prob", "normal_log_prob", "beta_log_prob", "ppo_loss", "categorical_ppo_loss", "normal_ppo_loss",
    "linear_log_prob", "linear_ppo_loss",
]  # fmt: skip
Peer = Literal[
    "ours", "eager", "compile", "numba", "sb3", "cleanrl", "torchrl-loop", "torchrl-vec", "loop", "torch-chunked", "liger",
    "trl", "verl",
]  # fmt: skip
OPS: tuple[str, ...] = Op.__args__  # type: ignore[attr-defined]
PEERS: tuple[str, ...] = Peer.__args__  # type: ignore[attr-defined]


@dataclass
class BenchConfig:
    """Measures the ops of ppo_fast against what trainers run today, on this machine.

    All providers of a case take turns in one run; times are medians. Every result is compared with the float64
    reference first, and a number whose result is wrong is refused (exit code 1). Each provider runs at 1 thread and at
    all threads. The copy is torch's copy_ of as many bytes as the op must move, in the same run.

    Examples: "ppo-fast bench --quick" (a minute, to see that it works), "ppo-fast bench --ops gae ppo_loss",
    "ppo-fast bench" (some fifteen minutes; leave the machine alone meanwhile). Missing peers are listed, not needed:
    pip install "ppo_fast[peers]".
    """

    ops: tuple[Op, ...] = ()
    """Ops to measure; all of them by default."""
    providers: tuple[Peer, ...] = ()
    """Only these, and the copy; all of them by default. Without "ours" nothing is checked or compared."""
    threads: tuple[int, ...] = ()
    """Thread counts; 1 and all cores by default. Targets are judged at the largest."""
    quick: bool = False
    """One small case an op, short measurements, no torch.compile: a smoke test in a minute, not a measurement."""
    seconds: float = 2.0
    """Measuring time of one case at one thread count; warm-up and compilation come on top."""
    out: Path = Path("bench/results")
    """Results go to OUT/<machine>/: ops.csv and ops.png (quick.* or partial.* where not everything ran)."""
    png: bool = True
    """Draw the picture."""

    def __post_init__(self) -> None:
        for op in self.ops:
            if op not in OPS:
                raise ValueError(f"ops must be of {', '.join(OPS)}; got {op}")
        for provider in self.providers:
            if provider not in PEERS:
                raise ValueError(f"providers must be of {', '.join(PEERS)}; got {provider}")
        if any(n < 1 for n in self.threads):
            raise ValueError(f"threads must be at least 1, got {self.threads}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")


def cases(ops: tuple[str, ...] = (), quick: bool = False) -> list[Case]:
    found = [c for op in ops or OPS for c in importlib.import_module(f".{op}", __package__).CASES]
    return [c for c in found if c.quick or not quick]


def wanted(config: BenchConfig) -> tuple[str, ...]:
    return config.providers or tuple(p for p in PEERS if not (config.quick and p == "compile"))


def thread_counts(config: BenchConfig) -> list[int]:
    return sorted(set(config.threads or (1, machine.cores())))


@contextlib.contextmanager
def _progress(total: int) -> Iterator:
    """A bar for people; for logs a line a case."""
    console = Console(stderr=True)
    if not console.is_terminal:
        done = iter(range(1, total + 1))
        yield lambda what: print(f"[{next(done)}/{total}] {what}", file=sys.stderr, flush=True)
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    # no thread that redraws: it would take turns with what is timed
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)
        started = False

        def step(what: str) -> None:
            nonlocal started
            bar.update(task, description=what, advance=int(started), refresh=True)
            started = True

        yield step


def measure_all(selected: list[Case], config: BenchConfig) -> list[Row]:
    seconds = min(config.seconds, 0.3) if config.quick else config.seconds
    threads = thread_counts(config)
    runs = [(case, n) for case in selected for n in threads if n == threads[-1] or not case.is_heavy]
    before, rows = torch.get_num_threads(), []
    try:
        with _progress(len(runs)) as step:
            for case, n in runs:
                step(f"{case.name}, {n} thread{'s' if n > 1 else ''}")
                rows += run_case(case, n, wanted(config), seconds)
    finally:
        torch.set_num_threads(before)
    return rows


def run(config: BenchConfig) -> int:
    """Measures, prints, writes; 0, or 1 where a number was refused because the result was wrong."""
    rows = measure_all(cases(config.ops, config.quick), config)
    facts = machine.facts()
    report.print_table(rows, facts)
    folder = config.out / machine.slug()
    folder.mkdir(parents=True, exist_ok=True)
    name = "quick" if config.quick else "partial" if config.ops or config.providers or config.threads else "ops"
    report.write_csv(rows, facts, folder / f"{name}.csv")
    written = [folder / f"{name}.csv"]
    if config.png and report.draw(rows, facts, folder / f"{name}.png"):
        written.append(folder / f"{name}.png")
    print("wrote", ", ".join(map(str, written)))
    return 1 if any(row.provider == OURS and row.status != "ok" for row in rows) else 0
