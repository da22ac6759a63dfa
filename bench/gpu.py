"""Measures the ops on an NVIDIA GPU against eager torch, torch.compile and other people's kernels.

    python -m ppo_fast.bench.gpu                     every case; a few minutes
    python -m ppo_fast.bench.gpu --only gae ppo_loss
    python -m ppo_fast.bench.gpu --quick             short measurements, no torch.compile, no JAX: a look, not a result

Results: OUT/<gpu>/gpu.csv, gpu.png, gpu.md (quick.* or partial.* where not everything ran). Every result is compared with
the float64 reference first, and a number whose result is wrong is refused (exit code 1).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast import _backend

from . import gpu_report, machine, peers
from .gpu_cases import (
    CASES,
    FORWARD,
    IN_PLACE,
    Formula,
    GpuCase,
    Inputs,
    Outputs,
    caller,
    ours,
    restore,
    results,
    sample_of,
    sampled,
    truth,
)
from .gpu_peers import MAKERS, PACKAGES, Left
from .gpu_report import COPY, GpuRow
from .gpu_timing import (
    Clock,
    Method,
    call_seconds,
    clock_of,
    copy_bandwidth,
    copy_of,
    graph_seconds,
    sets_of,
    take_turns,
)
from .harness import SOMETHING_ELSE, deviation, refusal

BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
SLOW_TO_START = ("torch.compile", "JAX")
#: A call that takes longer is not profiled, captured or timed in a Python loop: thousands of launches.
SLOW = 20e-3
#: A call that takes longer is not made once more for its memory.
PATIENCE = 1.0


# --- one case ---------------------------------------------------------------------------------------------------------


def formulas(case: GpuCase, device: torch.device, wanted: Sequence[str] | None) -> dict[str, Formula | str]:
    """Every provider's formula, or why it has none here."""
    found: dict[str, Formula | str] = {}
    formula: Formula | str | None
    for name in BACKENDS[device.type]:
        found[name] = _backend._WHY_NOT[name] or ours(case)
    for name, make in MAKERS.items():
        if wanted is not None and name not in wanted and name != "eager":  # eager is the yardstick of parity
            continue
        try:
            formula = make(case)
        except Left as why:
            formula = str(why)
        if formula is not None:
            found[name] = formula
    return {name: f for name, f in found.items() if wanted is None or name in (*wanted, "eager")}


def context_of(case: GpuCase, name: str) -> Callable[[], contextlib.AbstractContextManager]:
    """What a provider's calls run in: our backend by name, and no gradient where there is none."""

    @contextlib.contextmanager
    def entered():
        with contextlib.ExitStack() as stack:
            if name in gpu_report.OURS:
                stack.enter_context(pf.use_backend(name))
            if case.mode == FORWARD:
                stack.enter_context(torch.no_grad())
            yield

    return entered


def as_tensors(out: dict[str, Any], device: torch.device) -> Outputs:
    """Of another framework's arrays, too."""
    import numpy as np

    return {k: v if isinstance(v, Tensor) else torch.from_numpy(np.array(v)).to(device) for k, v in out.items()}


def checked_result(case: GpuCase, formula: Formula, x: Inputs, rows: Tensor | None, device: torch.device) -> Outputs:
    """The sampled rows of what one call gives; where only a sample is compared, all of it must at least be finite."""
    if case.mode == IN_PLACE:
        restore(x)
    out = as_tensors(results(case, formula, x), device)
    if rows is not None:
        for name, value in out.items():
            if not all(bool(part.isfinite().all()) for part in value.split(1024)):
                raise ArithmeticError(f"{name} is not finite everywhere")
    return {k: v.detach().clone() for k, v in sampled(case, out, rows).items()}


def judge(case: GpuCase, row: GpuRow, formula: Formula, got: Outputs, eager: Outputs, want: Outputs) -> None:
    """Error and, where the result is wrong, the status."""
    compared = {k: v for k, v in want.items() if not formula.compared or k in formula.compared}
    scales = case.recipe.scales
    errors = [deviation(v, compared[k], scales.get(k, 0.0)) for k, v in got.items() if k in compared]
    row.error = max(errors, default=None)
    if row.provider in gpu_report.OURS:
        why = refusal(got, eager, want, scales)
        if why:
            row.status, row.note = "parity failed", why
    elif row.error is not None and not row.error <= SOMETHING_ELSE:
        row.status, row.note = "differs", "computes something else"


def run_case(case: GpuCase, clock: Clock, seconds: float, wanted: Sequence[str] | None = None) -> list[GpuRow]:
    """Parity, then times. Where no backend of ours is right, nobody's time is taken."""
    torch.manual_seed(0)
    device, n_sets = clock.device, sets_of(case.bytes, clock)
    sets, rows_checked = [case.inputs(device) for _ in range(n_sets)], sample_of(case)
    want, found, rows = truth(case, sets[0], rows_checked), formulas(case, device, wanted), {}
    ready: dict[str, tuple[Formula, list[Inputs]]] = {}
    results_of: dict[str, Outputs] = {}
    for name, formula in found.items():
        row = rows[name] = GpuRow(case, name, sets=n_sets)
        if isinstance(formula, str):
            row.status, row.note = "left out", formula
            continue
        row.note = formula.note
        try:
            mine = [formula.wrap(x) for x in sets] if formula.wrap else sets
            with context_of(case, name)():
                results_of[name] = checked_result(case, formula, mine[0], rows_checked, device)
        except Exception as error:  # one that breaks is a line in the table, not the end of the run
            row.status, row.note = "failed", f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        ready[name] = formula, mine
    for name in list(ready):
        judge(case, rows[name], ready[name][0], results_of[name], results_of.get("eager", {}), want)
        if rows[name].status != "ok" or (wanted is not None and name not in wanted):
            del ready[name]
    del results_of, want
    if any(name in gpu_report.OURS for name in ready):
        time_them(case, clock, seconds, ready, rows)
    elif wanted is None or any(name in wanted for name in gpu_report.OURS):
        for name in ready:
            rows[name].note = rows[name].note or "not timed: no result of ours was right"
    return [row for name, row in rows.items() if wanted is None or name in wanted or name == COPY]


def time_them(case: GpuCase, clock: Clock, seconds: float, ready: dict[str, tuple[Formula, list[Inputs]]],
              rows: dict[str, GpuRow]) -> None:  # fmt: skip
    methods = [method_of(case, name, formula, sets) for name, (formula, sets) in ready.items()]
    for m in methods:
        row = rows[m.name]
        with m.context():
            began = time.perf_counter()
            m.calls[0]()
            clock.wait()
            took = time.perf_counter() - began
            if took < PATIENCE:
                row.peak_bytes = clock.peak_bytes(m)
            if took > SLOW:
                continue
            row.counts = clock.counts(m) if m.finish is None else None
        if row.counts is not None:
            m.launches = max(1, row.counts.launches + row.counts.copies)
    methods.append(copy_of(case.bytes, clock, COPY))
    rows[COPY] = GpuRow(case, COPY, sets=len(methods[-1].calls))
    taken = take_turns(methods, clock, seconds)
    copy = taken[COPY].quantile(0.5)
    best = next(taken[name].quantile(0.5) for name in gpu_report.OURS if name in taken)
    for m in methods:
        row, times = rows[m.name], taken[m.name]
        row.samples, row.hidden = len(times.seconds), times.hidden
        row.p20, row.p50, row.p80 = times.quantile(0.2), times.quantile(0.5), times.quantile(0.8)
        row.copy_share, row.ours_faster = copy / row.p50, row.p50 / best
        if case.small and m.name != COPY and row.p50 < SLOW:
            row.call = call_seconds(m, clock, slow=row.p50 > 1e-3)
            row.graph = graph_seconds(m, clock)
            if row.graph is None and m.name in gpu_report.OURS and clock.device.type == "cuda":
                row.note = "could not be captured in a CUDA graph"


def method_of(case: GpuCase, name: str, formula: Formula, sets: list[Inputs]) -> Method:
    """Calls that keep what they returned until their set's next turn."""
    held: list[Any] = [None] * len(sets)

    def keeping(i: int) -> Callable[[], None]:
        call = caller(case, formula, sets[i])

        def kept() -> None:
            held[i] = None
            held[i] = call()

        return kept

    def drop() -> None:
        held[:] = [None] * len(sets)
        for x in sets:
            for name in case.recipe.leaves:
                if isinstance(x[name], Tensor):
                    x[name].grad = None

    restores = [lambda x=x: restore(x) for x in sets] if case.mode == IN_PLACE else None
    calls = [keeping(i) for i in range(len(sets))]
    return Method(name, calls, restores, context_of(case, name), formula.finish, drop)


# --- the run ----------------------------------------------------------------------------------------------------------


def slug(gpu: str) -> str:
    """Folder name of this GPU's results, e.g. "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def facts_of(clock: Clock, bandwidth: float) -> dict[str, str]:
    """Columns that every row of the CSV repeats."""
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": os.environ.get("PPO_FAST_COMMIT") or machine.commit(),
        "gpu": clock.device_name(),
        "driver": driver() if clock.device.type == "cuda" else "none",
        "copy_gb_s": f"{bandwidth / 1e9:.4g}",
        "cuda": str(torch.version.cuda),
        "cpu": machine.cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: peers.version(package) for package in PACKAGES},
    }
    if clock.device.type == "cuda":
        properties = torch.cuda.get_device_properties(clock.device)
        found |= {"processors": str(properties.multi_processor_count), "l2_mb": f"{properties.L2_cache_size / 1e6:.4g}"}
    return found


def selected(options: argparse.Namespace) -> list[GpuCase]:
    found = [c for c in CASES if not options.only or c.op in options.only]
    return [dataclasses.replace(c, shape=c.tiny) for c in found] if options.tiny else found


def measure(cases: list[GpuCase], clock: Clock, options: argparse.Namespace) -> list[GpuRow]:
    """Cases in their order, until the time is up; what was not reached is said, not dropped."""
    names = [name for name in MAKERS if not (options.quick and name in SLOW_TO_START)]
    wanted = options.providers or [*BACKENDS[clock.device.type], *names]
    seconds = 0.15 if options.quick else options.seconds
    began, rows = time.monotonic(), []
    for i, case in enumerate(cases):
        if options.limit and time.monotonic() - began > options.limit:
            rows += [GpuRow(c, BACKENDS[clock.device.type][0], "left out", "time was up") for c in cases[i:]]
            break
        print(f"[{i + 1}/{len(cases)}] {case.name}", file=sys.stderr, flush=True)
        try:
            rows += run_case(case, clock, seconds, wanted)
        except torch.cuda.OutOfMemoryError as error:
            rows.append(GpuRow(case, BACKENDS[clock.device.type][0], "left out", f"memory: {error}".partition(". ")[0]))
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ppo_fast.bench.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    ops = sorted({case.op for case in CASES})
    parser.add_argument("--only", nargs="+", choices=ops, metavar="OP", default=[], help=", ".join(ops))
    parser.add_argument("--providers", nargs="+", choices=["cuda", "triton", "cpu", *MAKERS], metavar="NAME", default=[],
                        help="ours (cuda, triton) and " + ", ".join(MAKERS))  # fmt: skip
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--seconds", type=float, default=0.8, help="measuring time of a case (0.8); compilation comes on top"
    )
    parser.add_argument("--limit", type=float, default=0.0, help="seconds after which no further case begins")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--device", default="cuda", help="cpu: tries this program itself, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="shapes of a test")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    options = parse(args)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("ppo_fast.bench.gpu: no NVIDIA GPU here: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    clock = clock_of(torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device)
    before = copy_bandwidth(clock)
    rows = measure(selected(options), clock, options)
    facts = facts_of(clock, max(before, copy_bandwidth(clock)))  # the harder yardstick of the two
    folder = options.out / slug(facts["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    name = "quick" if options.quick or options.tiny else "partial" if options.only or options.providers else "gpu"
    gpu_report.write_csv(rows, facts, folder / f"{name}.csv")
    text = gpu_report.markdown(rows, facts)
    (folder / f"{name}.md").write_text(text)
    drawn = gpu_report.draw(rows, facts, folder / f"{name}.png")
    print(f"wrote {folder}/{name}.csv, {name}.md{f', {name}.png' if drawn else ' (no picture: no matplotlib)'}\n")
    print(text, end="")
    return 1 if any(r.provider in gpu_report.OURS and r.status in ("failed", "parity failed") for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
