"""What a person sees of a run: progress with sampled responses, the learning curve, the summary at the end."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .config import LanguageConfig
from .trainer import Now

SHOWN = 5  # sampled responses beside the progress


def share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def excerpt(text: str, width: int = 60) -> str:
    """One line of printable characters."""
    shown = repr(text)[1:-1]
    return shown if len(shown) <= width else "…" + shown[1 - width :]


class LiveProgress:
    """On a terminal a bar over a table of sampled responses; elsewhere plain lines, at every twentieth of the run and at
    least every 30 s, with one response each."""

    def __init__(self, config: LanguageConfig, console: Console) -> None:
        self.config, self.console = config, console
        self._last_time, self._last_iteration = -math.inf, 0
        self._live: Live | None = None
        if config.progress and console.is_terminal:
            self._bar = Progress(
                TextColumn(config.algorithm), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=console, auto_refresh=False,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=config.iterations, text="")
            # no refresh thread: it would compete with the threads that train
            self._live = Live(self._bar, console=console, auto_refresh=False)
            self._live.start()

    def update(self, now: Now, row: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        if not self.config.progress:
            return
        text = f"reward {share(now.reward)}  held out {share(now.last_eval)} (at first {share(now.first_eval)})"
        if self._live is not None:
            table = Table("prompt", "response", "reward", box=None, expand=True)
            for s in samples[:SHOWN]:
                table.add_row(Text(excerpt(s["prompt"])), Text(excerpt(s["completion"])), f"{s['reward']:.2f}")
            self._bar.update(self._task, completed=now.iteration, text=text)
            self._live.update(Group(self._bar, table), refresh=True)
            return
        elapsed, total = time.perf_counter() - self._last_time, self.config.iterations
        if now.iteration - self._last_iteration < total / 20 and elapsed < 30 and now.iteration < total:
            return
        example = (
            f"  e.g. {excerpt(samples[0]['prompt'], 30)} → {excerpt(samples[0]['completion'], 30)}" if samples else ""
        )
        kl = "" if math.isnan(row["kl"]) else f"  kl {row['kl']:.3f}"
        self.console.print(
            f"iteration {now.iteration:,}/{total:,}  {now.total:.0f} s  {text}  entropy {row['entropy']:.3f}{kl}{example}",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
        self._last_time, self._last_iteration = time.perf_counter(), now.iteration

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def draw_curve(progress: Path, first_eval: float, title: str) -> bytes:
    """The learning curve as a PNG: mean reward of the sampled responses, and of greedy ones to held-out prompts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no pyplot state
    from matplotlib.figure import Figure

    with open(progress, newline="") as file:
        rows = [(int(r["iteration"]), float(r["reward"]), float(r["eval_reward"])) for r in csv.DictReader(file)]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [i for i, _, _ in rows], [r for _, r, _ in rows], color="tab:blue", alpha=0.5, label="sampled, training prompts"
    )
    held_out = [(0, first_eval)] + [(i, e) for i, _, e in rows]
    held_out = [(i, e) for i, e in held_out if not math.isnan(e)]
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), "o-", markersize=3, color="tab:orange", label="greedy, held-out prompts"
        )
    axes.set(title=title, xlabel="iteration", ylabel="mean reward")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def summary(config: LanguageConfig, now: Now, parameters: int, files: list[tuple[str, Path]]) -> Table:
    """The closing table: what was reached, how fast, and where the files are."""
    table = Table(title=f"{config.algorithm}, seed {config.seed}", show_header=False, title_justify="left")
    table.add_row("trained parameters", f"{parameters:,}")
    table.add_row("iterations", f"{now.iteration:,}")
    table.add_row("sampled responses", f"{now.responses:,} of {now.tokens:,} tokens")
    table.add_row("mean reward, last rollout", share(now.reward))
    if not math.isnan(now.first_eval):
        table.add_row("mean greedy reward, held out", f"{share(now.first_eval)} before, {share(now.last_eval)} after")
    table.add_row("time", f"{now.total:.1f} s")
    for name, seconds in now.seconds.items():
        table.add_row(f"  {name}", f"{seconds:7.1f} s {100 * seconds / max(now.total, 1e-9):5.1f} %")
    for name, path in files:
        table.add_row(name, str(path))
    return table
