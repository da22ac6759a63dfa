"""The result of a run on a GPU: rows, what they reached of the targets, and the table, the CSV file and the picture."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .gpu_cases import SHORT_MODE, GpuCase, Target
from .gpu_timing import Counts
from .harness import SHORT
from .report import factor, microseconds

COPY = "copy"
OURS = ("cuda", "triton", "cpu")
LABELS = {"cuda": "ppo_fast CUDA", "triton": "ppo_fast Triton", "cpu": "ppo_fast CPU", "eager": "eager torch",
          COPY: "copy of as many bytes"}  # fmt: skip
COLUMNS = (
    "op", "case", "shape", "dtype", "mode", "provider", "status", "note", "samples", "device_p20_us", "device_p50_us",
    "device_p80_us", "python_hidden", "call_us", "graph_us", "launches", "torch_launches", "copies", "syncs", "busy_us",
    "bytes", "gb_per_s", "bandwidth_share", "copy_share", "ours_faster", "error", "peak_bytes", "sets",
)  # fmt: skip


@dataclass
class GpuRow:
    """One provider of one case. Times in seconds; None: not measured, or there is no such thing."""

    case: GpuCase
    provider: str
    status: str = "ok"  # "ok", "left out", "failed", "differs" (a peer's), "parity failed" (ours)
    note: str = ""
    error: float | None = None  # against float64, relative to the largest magnitude; the worst output
    samples: int = 0
    p20: float = 0.0
    p50: float = 0.0
    p80: float = 0.0
    hidden: bool = True  # False: the GPU waited for Python, so that p50 is not the GPU's own time
    call: float | None = None
    graph: float | None = None
    counts: Counts | None = None
    peak_bytes: int | None = None
    sets: int = 0
    copy_share: float | None = None  # the time of a copy of as many bytes over p50
    ours_faster: float | None = None  # p50 over that of our first backend

    @property
    def label(self) -> str:
        return LABELS.get(self.provider, self.provider)

    def bandwidth_share(self, copy_bandwidth: float) -> float | None:
        return self.case.bytes / self.p50 / copy_bandwidth if self.samples else None


# --- numbers ----------------------------------------------------------------------------------------------------------


def by_case(rows: Iterable[GpuRow]) -> list[tuple[GpuCase, dict[str, GpuRow]]]:
    groups = itertools.groupby(rows, key=lambda r: r.case)
    return [(case, {row.provider: row for row in group}) for case, group in groups]


def first_of_ours(group: dict[str, GpuRow]) -> GpuRow | None:
    return next((group[name] for name in OURS if name in group and group[name].samples), None)


def reached(target: Target, row: GpuRow | None, group: dict[str, GpuRow], copy_bandwidth: float) -> float | None:
    """What a row reached of a target, or None where there is no number."""
    if row is None or not row.samples:
        return None
    if target.kind == "bandwidth":
        return row.bandwidth_share(copy_bandwidth)
    if target.kind == "device":
        return row.p50 if row.hidden else row.graph
    if target.kind == "call":
        return row.call
    if target.kind == "launches":  # torch's own, such as the fill of the gradient 1, are nobody's choice
        return None if row.counts is None else row.counts.launches - row.counts.foreign
    if target.kind == "syncs":
        return None if row.counts is None else row.counts.syncs
    peer = group.get(target.peer)
    return peer.p50 / row.p50 if peer is not None and peer.samples else None


def shown(target: Target, value: float) -> str:
    if target.kind == "bandwidth":
        return f"{value:.0%}"
    if target.kind in ("device", "call"):
        return f"{microseconds(value)} µs"
    return factor(value) if target.kind == "faster" else f"{value:g}"


def target_lines(rows: list[GpuRow], facts: dict[str, str]) -> list[list[str]]:
    """Case, target, what each of our backends reached, and the verdict on the first of them."""
    bandwidth = float(facts["copy_gb_s"]) * 1e9
    backends = [name for name in OURS if any(r.provider == name for r in rows)]
    lines = [["case", "target", *(LABELS[b] for b in backends), ""]]
    for case, group in by_case(rows):
        for target in case.targets:
            values = [reached(target, group.get(b), group, bandwidth) for b in backends]
            verdict = "not measured" if values[0] is None else "met" if target.met(values[0]) else "**missed**"
            cells = [("–" if v is None else shown(target, v)) for v in values]
            lines.append([case.name, str(target), *cells, verdict])
    return lines


# --- Markdown, which is also what the terminal gets ---------------------------------------------------------------------


def table(lines: list[list[str]]) -> list[str]:
    """Aligned, so that it reads as it is; numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = [i == 0 or lines[0][i] in ("target", "") for i in range(len(widths))]
    rules = ["-" * w if to_left else "-" * (w - 1) + ":" for w, to_left in zip(widths, left, strict=True)]

    def row(cells: list[str]) -> str:
        padded = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(cells, widths, left, strict=True))
        return "| " + " | ".join(padded) + " |"

    return [row(lines[0]), "| " + " | ".join(rules) + " |", *map(row, lines[1:])]


def _us(seconds: float | None) -> str:
    return "" if seconds is None else microseconds(seconds)


def case_lines(rows: list[GpuRow], facts: dict[str, str]) -> list[list[str]]:
    bandwidth = float(facts["copy_gb_s"]) * 1e9
    backends = [name for name in OURS if any(r.provider == name for r in rows)]
    head = ["case", *(f"{LABELS[b].split()[-1]} µs" for b in backends), "of bandwidth", "of copy", "call µs", "graph µs",
            "launches", "peak MB", "error", "times faster than"]  # fmt: skip
    lines = [head]
    for case, group in by_case(rows):
        ours = first_of_ours(group)
        times = []
        for b in backends:
            row = group.get(b)
            text = "" if row is None else _us(row.p50) if row.samples else row.status
            times.append(text + ("" if row is None or row.hidden or not row.samples else " (waits)"))
        if ours is None:
            lines.append([case.name, *times, *[""] * (len(head) - 1 - len(backends))])
            continue
        peers = (f"{r.label} {factor(r.ours_faster)}" for r in group.values()
                 if r.ours_faster is not None and r.provider not in (*OURS, COPY))  # fmt: skip
        c = ours.counts
        launches = "" if c is None else f"{c.launches - c.foreign}" + (f" + {c.foreign} of torch" if c.foreign else "")
        lines.append([
            case.name, *times, f"{ours.bandwidth_share(bandwidth):.0%}",
            "" if ours.copy_share is None else f"{ours.copy_share:.0%}", _us(ours.call), _us(ours.graph), launches,
            "" if ours.peak_bytes is None else f"{ours.peak_bytes / 1e6:.3g}",
            "" if ours.error is None else f"{ours.error:.0e}", ", ".join(peers),
        ])  # fmt: skip
    return lines


def notes(rows: list[GpuRow]) -> list[str]:
    """What rows say beside their numbers → whom it is about, each once; what went wrong first."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.note:
            text = row.note if row.status == "ok" else f"{row.status}: {row.note}"
            alarm = row.status in ("failed", "parity failed", "differs")
            who = f"{row.label} in {row.case.name}" if alarm else f"{row.label} in {row.case.op}"
            found.setdefault(text, {})[who] = None
    ordered = sorted(found, key=lambda text: not text.startswith(("parity failed", "failed", "differs")))
    return [f"{text}: {', '.join(found[text])}" for text in ordered]


EXPLANATION = (
    "Medians; caches are cold where two dozen sets of inputs do not fit into them. CUDA, Triton: time on the device. of "
    "bandwidth: the floor's bytes over the time, as a share of the bandwidth of a large copy. of copy: the time of a copy of "
    "as many bytes over ours. call: wall time of one call in a Python loop. graph: replayed from a CUDA graph. error: "
    "against float64, relative to the largest. Columns after the times are of the first backend that has one; (waits): the "
    "GPU waited for Python."
)


def headline(facts: dict[str, str]) -> str:
    return (f"{facts['gpu']} (driver {facts['driver']}), copy {float(facts['copy_gb_s']):,.0f} GB/s; torch {facts['torch']}, "
            f"CUDA {facts['cuda']}, triton {facts['triton']}; commit {facts['commit']}, {facts['date']}")  # fmt: skip


def markdown(rows: list[GpuRow], facts: dict[str, str]) -> str:
    """Details first and the targets last: of a log the end is seen."""
    parts = [f"# {facts['gpu']}", "", headline(facts), "", EXPLANATION, "", *table(case_lines(rows, facts)), ""]
    parts += [f"- {note}" for note in notes(rows)]
    targets = target_lines(rows, facts)
    if len(targets) > 1:
        parts += ["", "## Targets", "", *table(targets)]
    return "\n".join(parts) + "\n"


# --- CSV --------------------------------------------------------------------------------------------------------------


def write_csv(rows: list[GpuRow], facts: dict[str, str], path: Path) -> None:
    """One line a row, with the machine and the versions in every line, so that files can be joined."""
    bandwidth = float(facts["copy_gb_s"]) * 1e9

    def micro(x: float | None) -> str:
        return "" if x is None else f"{x * 1e6:.3f}"

    def short(x: float | None) -> str:
        return "" if x is None else f"{x:.4g}"

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *facts])
        writer.writeheader()
        for r in rows:
            line = {
                "op": r.case.op, "case": r.case.name, "shape": "x".join(map(str, r.case.shape)), "dtype": r.case.dtype,
                "mode": r.case.mode, "provider": r.provider, "status": r.status, "note": r.note, "samples": r.samples,
                "bytes": r.case.bytes, "sets": r.sets, "call_us": micro(r.call), "graph_us": micro(r.graph),
                "error": "" if r.error is None else f"{r.error:.3e}",
                "peak_bytes": "" if r.peak_bytes is None else r.peak_bytes,
            }  # fmt: skip
            if r.counts is not None:
                line |= {"launches": r.counts.launches, "torch_launches": r.counts.foreign, "copies": r.counts.copies,
                         "syncs": r.counts.syncs, "busy_us": micro(r.counts.busy)}  # fmt: skip
            if r.samples:
                line |= {"device_p20_us": micro(r.p20), "device_p50_us": micro(r.p50), "device_p80_us": micro(r.p80),
                         "python_hidden": r.hidden, "gb_per_s": short(r.case.bytes / r.p50 / 1e9),
                         "bandwidth_share": short(r.bandwidth_share(bandwidth)), "copy_share": short(r.copy_share),
                         "ours_faster": short(r.ours_faster)}  # fmt: skip
            writer.writerow(line | facts)


# --- picture ----------------------------------------------------------------------------------------------------------


def draw(rows: list[GpuRow], facts: dict[str, str], path: Path) -> bool:
    """Device times by provider, one panel a case. False without matplotlib, or where there is no time to show."""
    groups = [(case, [r for r in group.values() if r.samples]) for case, group in by_case(rows)]
    groups = headlines([(case, group) for case, group in groups if any(r.provider in OURS for r in group)])
    if not groups:
        return False
    try:
        from .gpu_picture import panels
    except ImportError:
        return False
    panels(groups, headline(facts), float(facts["copy_gb_s"]) * 1e9, path)
    return True


def headlines(groups: list[tuple[GpuCase, list[GpuRow]]]) -> list[tuple[GpuCase, list[GpuRow]]]:
    """Of many cases those with a target, and of an op that has none its largest."""
    if len(groups) <= 12:
        return groups
    aimed = {case.op for case, _ in groups if case.targets}
    largest = {case.op: case for case, _ in sorted(groups, key=lambda g: g[0].bytes)}
    return [g for g in groups if g[0].targets or (g[0].op not in aimed and g[0] is largest[g[0].op])]


def title_of(case: GpuCase) -> tuple[str, str]:
    title = f"{case.op}  {' × '.join(f'{n:,}' for n in case.shape)}  {SHORT[case.dtype]}"
    return title, SHORT_MODE[case.mode] + (f", {case.remark}" if case.remark else "")
