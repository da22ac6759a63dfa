"""The result as a table, a CSV file and a picture."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .harness import COPY, LABELS, OURS, SHORT, YARDSTICKS, Case, Row, Target

SHORT_MODE = {"forward": "fwd", "forward + backward": "fwd + bwd"}

COLUMNS = (
    "op", "case", "shape", "dtype", "mode", "threads", "provider", "status", "note", "calls", "p20_us", "p50_us",
    "p80_us", "bytes", "flops", "gb_per_s", "copy_share", "ours_faster", "error", "peak_bytes",
    "others_cores",
)  # fmt: skip


# --- numbers ----------------------------------------------------------------------------------------------------------


def by_case(rows: Iterable[Row]) -> list[tuple[Case, list[Row]]]:
    return [(case, list(group)) for case, group in itertools.groupby(rows, key=lambda r: r.case)]


def microseconds(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:,.0f}" if us >= 100 else f"{us:.1f}" if us >= 10 else f"{us:.2f}"


def factor(x: float) -> str:
    return f"{x:,.0f}×" if x >= 20 else f"{x:.1f}×" if x >= 2 else f"{x:.2f}×" if x >= 0.1 else f"{x:.1g}×"


def bandwidth(row: Row) -> float:
    return row.case.bytes / row.p50 / 1e9


def reached(target: Target, rows: Iterable[Row], threads: int) -> float | None:
    """What ours reached of a target at this number of threads; None where the peers or ours have no number."""
    times = {r.provider: r for r in rows if r.threads == threads and r.calls}
    if OURS not in times or not all(p in times or p.startswith("torchrl") for p in target.peers):
        return None
    if target.peers == (COPY,):
        return times[OURS].copy_share
    rivals = [times[p].p50 for p in target.peers if p in times]
    return min(rivals) / times[OURS].p50 if rivals else None


# --- table ------------------------------------------------------------------------------------------------------------


def _cells(row: Row | None, wide: bool) -> list[str | Text]:
    """Of one provider at one number of threads: time, spread, bandwidth, share of the copy, how much faster ours is."""
    if row is None or not row.calls:
        alarm = row is not None and row.status in ("parity failed", "failed")
        first = Text("" if row is None else row.status, style="red" if alarm else "dim")
        return [first, *[""] * (4 if wide else 2)]
    share = "" if row.copy_share is None or row.provider == COPY else f"{row.copy_share:.0%}"
    faster = "" if row.ours_faster is None or row.provider in (OURS, *YARDSTICKS) else factor(row.ours_faster)
    extra: list[str | Text] = []
    if wide:
        extra = [Text(f"±{(row.p80 - row.p20) / 2 / row.p50:.0%}", style="dim"), f"{bandwidth(row):.3g}"]
    return [microseconds(row.p50), *extra, share, Text(faster, style="bold")]


def op_table(op: str, groups: list[tuple[Case, list[Row]]], wide: bool = True) -> Table:
    threads = sorted({row.threads for _, rows in groups for row in rows})
    table = Table(title=op, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for n in threads:
        time = f"{n} thread{'s' if n > 1 else ''}\nµs"
        for head in (time, "\nspread", "\nGB/s", "of\ncopy", "ours\nis") if wide else (time, "of\ncopy", "ours\nis"):
            table.add_column(head, justify="right", no_wrap=True)
    for head in ("peak\nMB", "\nerror") if wide else ("\nerror",):
        table.add_column(head, justify="right", no_wrap=True)
    for case, rows in groups:
        head = f"{list(case.shape)} {SHORT[case.dtype]} {SHORT_MODE[case.mode]}{case.variant and ', ' + case.variant}"
        table.add_row(Text(head, style="bold cyan"))
        for provider in dict.fromkeys(row.provider for row in rows):
            mine = {row.threads: row for row in rows if row.provider == provider}
            errors = [row.error for row in mine.values() if row.error is not None]
            style = "green" if provider == OURS else "dim" if provider in YARDSTICKS else ""
            cells = [cell for n in threads for cell in _cells(mine.get(n), wide)]
            error = f"{max(errors):.0e}" if errors else ""
            peaks = [row.peak_bytes for row in mine.values() if row.peak_bytes is not None]
            peak = [f"{max(peaks) / 1e6:.3g}" if peaks else ""] if wide else []
            table.add_row(f"  {LABELS[provider]}", *cells, *peak, error, style=style)
    return table


def _notes(rows: list[Row]) -> dict[str, list[str]]:
    """What a row says beside its numbers → whom it is about, each once."""
    notes: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.note:
            note = row.note if row.status == "ok" else f"{row.status}: {row.note}"
            where = {"ok": "", "left out": f" in {row.case.op}"}.get(row.status, f" in {row.case.name}")
            who = LABELS[row.provider] + where
            notes.setdefault(note, {})[who] = None
    return {note: list(who) for note, who in notes.items()}


def _verdict(target: Target, got: float | None, group: list[Row]) -> Text:
    if got is None:
        return Text("not measured", style="dim")
    if any(row.disturbed for row in group):
        return Text("no verdict: machine busy", style="yellow")
    return Text("met", style="green") if got >= target.at_least else Text("missed", style="bold red")


def target_table(rows: list[Row]) -> Table | None:
    threads = sorted({row.threads for row in rows})
    title = f"targets, judged at {threads[-1]} thread{'s' * (threads[-1] > 1)}"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("case", no_wrap=True)
    table.add_column("target")
    for n in threads:
        table.add_column(f"{n} thr.", justify="right")
    table.add_column("")
    for case, group in by_case(rows):
        for target in case.targets:
            got = [reached(target, group, n) for n in threads]
            show = [("–" if x is None else f"{x:.0%}" if target.peers == (COPY,) else factor(x)) for x in got]
            table.add_row(case.name, str(target), *show, _verdict(target, got[-1], group))
    return table if table.rows else None


def print_table(rows: list[Row], facts: dict[str, str], console: Console | None = None) -> None:
    """Everything for the reader: what was measured where, one table an op, the targets, and what was left out and why."""
    console = console or Console()
    if not console.is_terminal:  # a log has no width of its own
        console = Console(file=console.file, width=130, no_color=True, highlight=False)
    console.print(f"\n[bold]{facts['cpu']}[/], {facts['cores']} cores, {facts['isa']} kernels; "
                  f"torch {facts['torch']}, python {facts['python']}; commit {facts['commit']}, {facts['date']}")  # fmt: skip
    console.print(
        "Medians; spread: half of p20 to p80. GB/s: the floor's bytes over the time. of copy: share of the bandwidth of "
        "torch's copy_ of as many bytes. ours is: so many times faster than this. peak: memory of one call beside its "
        "inputs. error: against float64, relative to the largest.\n",
        style="dim",
    )
    wide = console.width >= 115
    for op, groups in itertools.groupby(by_case(rows), key=lambda g: g[0].op):
        console.print(op_table(op, list(groups), wide))
    targets = target_table(rows)
    if targets is not None:
        console.print(targets)
    if disturbed := {row.case.name: row.others or 0.0 for row in rows if row.disturbed}:
        console.print(f"Other processes kept up to {max(disturbed.values()):.1f} cores busy during {len(disturbed)} of "
                      f"{len(by_case(rows))} cases: these times prove nothing. Run again on a calm machine.",
                      style="bold yellow")  # fmt: skip
    for note, who in _notes(rows).items():
        console.print(f"{note}: {', '.join(who)}", style="red" if note.startswith(("parity", "failed")) else "dim")


# --- CSV --------------------------------------------------------------------------------------------------------------


def write_csv(rows: list[Row], facts: dict[str, str], path: Path) -> None:
    """One line a row, with the machine and the versions in every line, so that files can be joined."""

    def micro(x: float) -> str:
        return f"{x * 1e6:.3f}"

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *facts])
        writer.writeheader()
        for r in rows:
            line = {
                "op": r.case.op, "case": r.case.name, "shape": "x".join(map(str, r.case.shape)), "dtype": r.case.dtype,
                "mode": r.case.mode, "threads": r.threads, "provider": r.provider, "status": r.status, "note": r.note,
                "calls": r.calls, "bytes": r.case.bytes, "flops": r.case.flops,
                "peak_bytes": "" if r.peak_bytes is None else r.peak_bytes,
                "error": "" if r.error is None else f"{r.error:.3e}",
            }  # fmt: skip
            if r.calls:
                line |= {"p20_us": micro(r.p20), "p50_us": micro(r.p50), "p80_us": micro(r.p80),
                         "gb_per_s": f"{bandwidth(r):.4g}"}  # fmt: skip
                line["others_cores"] = "" if r.others is None else f"{r.others:.2f}"
                line["copy_share"] = "" if r.copy_share is None else f"{r.copy_share:.4g}"
                line["ours_faster"] = "" if r.ours_faster is None else f"{r.ours_faster:.4g}"
            writer.writerow(line | facts)


# --- picture ----------------------------------------------------------------------------------------------------------


def draw(rows: list[Row], facts: dict[str, str], path: Path) -> bool:
    """Times by provider, one panel a case, at the largest number of threads. False without matplotlib."""
    try:
        from .picture import panels
    except ImportError:
        return False
    return panels(rows, facts, path)
