"""The picture of a run on a GPU: device times, one panel a case, on a logarithmic scale, with the floor as a line."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .gpu_cases import GpuCase
from .gpu_report import COPY, OURS, GpuRow, title_of
from .picture import BAR, GAP, GREEN, GREY, HEAD, INK, LABEL, LINE, PALE, PANEL, SOFT, TICKS, TITLE, _decade, duration
from .report import factor


def _remark(row: GpuRow, copy_bandwidth: float) -> str:
    if row.provider in OURS:
        return f"   {row.bandwidth_share(copy_bandwidth):.0%} of bandwidth" if row.case.bytes > 1e6 else ""
    return "" if row.provider == COPY or row.ours_faster is None else f"   {factor(row.ours_faster)}"


def _panel(axes: Axes, case: GpuCase, rows: list[GpuRow], copy_bandwidth: float) -> None:
    ordered = sorted(rows, key=lambda r: (r.provider != COPY, r.p50), reverse=True)  # the copy on top
    floor = case.bytes / copy_bandwidth
    left = min(floor, *(r.p50 for r in rows)) / 2.5
    longest = max(max(r.p50, r.p80) for r in rows)
    axes.set_xscale("log")
    axes.set_xlim(left, longest * (longest / left) ** 0.5)  # leaves a third of the width for the longest bar's label
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    decades = [10.0**e for e in range(math.ceil(math.log10(left)), math.floor(math.log10(longest)) + 1)]
    axes.set_xticks(decades, [_decade(d) for d in decades])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axvline(floor, color=SOFT, linewidth=0.9, linestyle=(0, (3, 2)))
    for y, row in enumerate(ordered):
        mine = row.provider in OURS
        axes.barh(y, row.p50 - left, left=left, height=0.7, color=GREEN if mine else PALE if row.provider == COPY else GREY,
                  linewidth=0)  # fmt: skip
        axes.plot([row.p20, row.p80], [y, y], color=INK, linewidth=0.8, alpha=0.45, solid_capstyle="butt")
        axes.annotate(duration(row.p50) + _remark(row, copy_bandwidth), (max(row.p50, row.p80), y), (4, 0),
                      textcoords="offset points", va="center", fontsize=7.5, color=INK,
                      fontweight="bold" if mine else "normal")  # fmt: skip
    axes.set_yticks(range(len(ordered)), [r.label.removesuffix(" of as many bytes") for r in ordered])
    for tick, row in zip(axes.get_yticklabels(), ordered, strict=True):
        tick.set_color(GREEN if row.provider in OURS else SOFT if row.provider == COPY else INK)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", length=0, labelsize=6.5, labelcolor=SOFT, pad=1)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    title, under = title_of(case)
    axes.annotate(title, (0, 1), (0, 15), xycoords="axes fraction", textcoords="offset points", fontsize=9.5,
                  fontweight="bold", color=INK)  # fmt: skip
    axes.annotate(under, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=7.5, color=SOFT)


def panels(groups: list[tuple[GpuCase, list[GpuRow]]], headline: str, copy_bandwidth: float, path: Path,
           columns: int = 3) -> None:  # fmt: skip
    columns = min(columns, len(groups))
    lines = [groups[i : i + columns] for i in range(0, len(groups), columns)]
    bars = [max(len(rows) for _, rows in line) for line in lines]
    width = max(columns, 2) * (LABEL + PANEL + GAP)
    height = HEAD + sum(TITLE + TICKS + BAR * n for n in bars) + 0.1
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    top = height - HEAD
    for line, n in zip(lines, bars, strict=True):
        for j, (case, rows) in enumerate(line):
            tall = BAR * len(rows)
            x = LABEL + j * (LABEL + PANEL + GAP)
            place = (x / width, (top - TITLE - tall) / height, PANEL / width, tall / height)
            _panel(figure.add_axes(place), case, rows, copy_bandwidth)
        top -= TITLE + TICKS + BAR * n
    figure.text(
        0.15 / width, 1 - 0.36 / height, "The time of one call on the GPU", fontsize=15, fontweight="bold", color=INK
    )
    legend = ("shorter is better, logarithmic; × = how many times longer than ppo_fast; medians, cold caches; dashed: the "
              f"bytes it must move at the bandwidth of a large copy\n{headline}")  # fmt: skip
    figure.text(0.15 / width, 1 - 0.83 / height, legend, fontsize=8.5, color=SOFT, linespacing=1.4)
    figure.savefig(path, dpi=160)
