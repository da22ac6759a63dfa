"""The picture: how long each provider takes, one panel a case, on a logarithmic scale."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .harness import CLONE, LABELS, OURS, SHORT, YARDSTICKS, Row
from .report import by_case, factor, microseconds

INK, SOFT, GREEN, GREY, PALE, LINE = "#22272e", "#7a828c", "#0b8457", "#b8c0cc", "#dfe4ea", "#eceff2"
#: Inches.
BAR, TITLE, TICKS, HEAD, LABEL, PANEL, GAP = 0.24, 0.55, 0.26, 1.0, 1.45, 3.5, 0.2


def duration(seconds: float) -> str:
    return f"{microseconds(seconds)} µs" if seconds < 1e-3 else f"{microseconds(seconds * 1e-3)} ms"


def _decade(seconds: float) -> str:
    return (
        f"{seconds * 1e6:g} µs" if seconds < 0.9e-3 else f"{seconds * 1e3:g} ms" if seconds < 0.9 else f"{seconds:g} s"
    )


def _remark(row: Row) -> str:
    if row.provider == OURS:
        return f"   {row.copy_share:.0%} of copy" if row.copy_share is not None and row.case.bytes > 1e6 else ""
    return "" if row.provider in YARDSTICKS or row.ours_faster is None else f"   {factor(row.ours_faster)}"


def _panel(axes: Axes, rows: list[Row]) -> None:
    case = rows[0].case
    ordered = sorted(rows, key=lambda r: (r.provider not in YARDSTICKS, r.p50), reverse=True)  # yardsticks on top
    left = min(r.p50 for r in rows) / 2.5
    longest = max(max(r.p50, r.p80) for r in rows)
    right = longest * (longest / left) ** 0.5  # leaves a third of the width for the longest bar's label
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    decades = [10.0**e for e in range(math.ceil(math.log10(left)), math.floor(math.log10(longest)) + 1)]
    axes.set_xticks(decades, [_decade(d) for d in decades])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for y, row in enumerate(ordered):
        color = GREEN if row.provider == OURS else PALE if row.provider in YARDSTICKS else GREY
        axes.barh(y, row.p50 - left, left=left, height=0.7, color=color, linewidth=0)
        axes.plot([row.p20, row.p80], [y, y], color=INK, linewidth=0.8, alpha=0.45, solid_capstyle="butt")
        axes.annotate(duration(row.p50) + _remark(row), (max(row.p50, row.p80), y), (4, 0), textcoords="offset points",
                      va="center", fontsize=7.5, color=INK, fontweight="bold" if row.provider == OURS else "normal")  # fmt: skip
    axes.set_yticks(range(len(ordered)), [LABELS[r.provider].removesuffix(" of as many bytes") for r in ordered])
    for tick, row in zip(axes.get_yticklabels(), ordered, strict=True):
        tick.set_color(GREEN if row.provider == OURS else SOFT if row.provider in YARDSTICKS else INK)
        tick.set_fontweight("bold" if row.provider == OURS else "normal")
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", length=0, labelsize=6.5, labelcolor=SOFT, pad=1)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    title = f"{case.op}  {' × '.join(f'{n:,}' for n in case.shape)}  {SHORT[case.dtype]}"
    axes.annotate(title, (0, 1), (0, 15), xycoords="axes fraction", textcoords="offset points", fontsize=9.5,
                  fontweight="bold", color=INK)  # fmt: skip
    under = f"{case.mode}{', ' + case.remark if case.remark else ''}"
    axes.annotate(under, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=7.5, color=SOFT)


def headlines(groups: list[list[Row]]) -> list[list[Row]]:
    """Of many cases those with a target, and of an op that has none its largest."""
    if len(groups) <= 18:
        return groups
    with_targets = {g[0].case.op for g in groups if g[0].case.targets}
    largest = {g[0].case.op: g for g in sorted(groups, key=lambda g: g[0].case.bytes)}
    return [g for g in groups if g[0].case.targets or (g[0].case.op not in with_targets and g is largest[g[0].case.op])]


def panels(rows: list[Row], facts: dict[str, str], path: Path, columns: int = 3) -> bool:
    """Writes the picture; False where there is no time to show."""
    threads = max((row.threads for row in rows), default=1)
    groups = [[r for r in group if r.calls and r.threads == threads] for _, group in by_case(rows)]
    groups = [[r for r in g if r.provider != CLONE or (r.copy_share or 0.0) < 0.7] for g in groups]  # where it differs
    groups = headlines([g for g in groups if any(r.provider == OURS for r in g)])
    if not groups:
        return False
    columns = min(columns, len(groups))
    lines = [groups[i : i + columns] for i in range(0, len(groups), columns)]
    width = max(columns, 2) * (LABEL + PANEL + GAP)
    height = HEAD + sum(TITLE + TICKS + BAR * max(map(len, line)) for line in lines) + 0.1
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    top = height - HEAD
    for line in lines:
        for j, group in enumerate(line):
            tall = BAR * len(group)
            x = LABEL + j * (LABEL + PANEL + GAP)
            _panel(figure.add_axes((x / width, (top - TITLE - tall) / height, PANEL / width, tall / height)), group)
        top -= TITLE + TICKS + BAR * max(map(len, line))
    figure.text(0.15 / width, 1 - 0.36 / height, "The time of one call", fontsize=15, fontweight="bold", color=INK)
    busy = "; OTHER PROCESSES WERE BUSY" if any(r.disturbed for g in groups for r in g) else ""
    legend = (f"shorter is better, logarithmic; × = how many times longer than ppo_fast; medians, {threads} thread"
              f"{'s' * (threads > 1)}{busy}\n{facts['cpu']}, {facts['cores']} cores, {facts['isa']}; torch {facts['torch']}, "
              f"commit {facts['commit']}, {facts['date']}")  # fmt: skip
    figure.text(0.15 / width, 1 - 0.83 / height, legend, fontsize=8.5, color=SOFT, linespacing=1.4)
    figure.savefig(path, dpi=160)
    return True
