"""What a person sees of a run: progress, TensorBoard, the learning curve, and the summary at the end."""

from __future__ import annotations

import csv
import io
import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .compress import MISMATCH
from .config import ControlConfig

WINDOW = 100  # episodes in a mean return
EPISODE_COLUMNS = ("global_step", "env", "return", "length")
PROGRESS_COLUMNS = (
    "global_step", "iteration", "episodes", "mean_return", "learning_rate", "policy_loss", "value_loss", "entropy",
    "approx_kl", "clip_fraction", "explained_variance", "grad_norm", *MISMATCH, "steps_per_second",
)  # fmt: skip

#: What a line of progress says, of what the algorithm has.
SHOWN = {
    "approx_kl": "kl {:.1e}", "entropy": "entropy {:.3f}", "critic_loss": "critic loss {:.3g}", "q_mean": "Q {:.1f}"
}  # fmt: skip


@dataclass
class Timing:
    """Seconds by what they were spent on, over the whole run, resumed parts included."""

    rollout: float = 0.0
    advantage: float = 0.0
    update: float = 0.0
    other: float = 0.0  # logs, checkpoints, progress

    @property
    def total(self) -> float:
        return self.rollout + self.advantage + self.update + self.other

    def rate(self, steps: int) -> float:
        return steps / self.total if self.total > 0 else 0.0


@dataclass
class Snapshot:
    """Where a run stands."""

    global_step: int = 0
    iteration: int = 0
    episodes: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    timing: Timing = field(default_factory=Timing)

    @property
    def mean_return(self) -> float:
        """Mean return of the last 100 episodes; NaN before the first one ended."""
        return float(np.mean(self.recent)) if self.recent else float("nan")


class LiveProgress:
    """A bar on a terminal; elsewhere a plain line at every twentieth of the run and at least every 30 s."""

    def __init__(self, config: ControlConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.total = config.planned_steps
        self._last_time, self._last_step = time.perf_counter(), 0
        self._bar: Progress | None = None
        if config.progress and console.is_terminal:
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            )  # fmt: skip
            # no refresh thread: it would compete with the one thread that trains
            self._bar = Progress(*columns, console=console, auto_refresh=False)
            self._task = self._bar.add_task(config.env_id, total=self.total, text="")
            self._bar.start()

    def update(self, now: Snapshot, stats: dict[str, float]) -> None:
        if not self.config.progress:
            return
        elapsed = time.perf_counter() - self._last_time
        rate = now.timing.rate(now.global_step)
        if self._bar is not None:
            if elapsed < 0.25 and now.global_step < self.total:
                return
            text = f"return {now.mean_return:8.1f}  {rate:8,.0f} steps/s"
            self._bar.update(self._task, completed=now.global_step, text=text)
            self._bar.refresh()
        else:
            share = now.global_step - self._last_step
            if share < self.total / 20 and elapsed < 30 and now.global_step < self.total:
                return
            known = {name: x for name, x in stats.items() if not math.isnan(x)}
            shown = "  ".join(text.format(known[name]) for name, text in SHOWN.items() if name in known)
            self.console.print(
                f"step {now.global_step:,}/{self.total:,} ({100 * now.global_step // self.total}%)  "
                f"return {now.mean_return:.1f}  episodes {now.episodes:,}  {shown}  {rate:,.0f} steps/s",
                soft_wrap=True, highlight=False,
            )  # fmt: skip
        self._last_time, self._last_step = time.perf_counter(), now.global_step

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class TensorBoard:
    """Scalars of each iteration. On resume, what was written after the checkpoint is marked as void.

    One event an iteration: `SummaryWriter` makes one for every scalar, which takes a tenth of a run of CartPole.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # slow to import; only who asks for it waits
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))
        if resumed_at:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(self._event(step=resumed_at + 1, wall_time=time.time(), session_log=start))

    def scalars(self, values: dict[str, float], step: int) -> None:
        summary = self._summary(value=[self._summary.Value(tag=t, simple_value=v) for t, v in values.items()])
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_episodes(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps and returns of an episodes.csv."""
    with open(path, newline="") as file:
        rows = [(int(row["global_step"]), float(row["return"])) for row in csv.DictReader(file)]
    data = np.array(rows, float).reshape(-1, 2)
    return data[:, 0], data[:, 1]


def moving_mean(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Mean of up to `window` values ending at each one."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - window)
    return (sums[stop] - sums[start]) / (stop - start)


def draw_curve(steps: np.ndarray, returns: np.ndarray, title: str) -> bytes:
    """The learning curve as a PNG: every episode, and the mean over the last hundred."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no pyplot state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, returns, ".", markersize=2, alpha=0.35, color="tab:blue", label="episode")
    axes.plot(steps, moving_mean(returns), color="tab:orange", linewidth=2, label=f"mean of {WINDOW} episodes")
    axes.set(title=title, xlabel="environment steps", ylabel="return")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def summary(config: ControlConfig, now: Snapshot, files: list[tuple[str, Path]]) -> Table:
    """The closing table: what was reached, how fast, and where the files are."""
    import gymnasium as gym  # here, as the language trainer has none

    timing = now.timing
    title = f"{config.algorithm.upper()} on {config.env_id}, seed {config.seed}"
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("environment steps", f"{now.global_step:,}")
    table.add_row("episodes", f"{now.episodes:,}")
    table.add_row(f"mean return, last {len(now.recent)} episodes", f"{now.mean_return:.1f}")
    spec = gym.registry.get(config.env_id.rpartition(":")[2])
    if spec is not None and spec.reward_threshold is not None:
        solved = len(now.recent) == WINDOW and now.mean_return >= spec.reward_threshold
        table.add_row("solved", f"{'yes' if solved else 'no'} (gymnasium asks for {spec.reward_threshold:g})")
    table.add_row("device", config.device + (", a CUDA graph for each minibatch" if config.cuda_graph else ""))
    table.add_row("time", f"{timing.total:.1f} s")
    table.add_row("steps per second", f"{timing.rate(now.global_step):,.0f}")
    for name in ("rollout", "advantage", "update", "other"):
        seconds = getattr(timing, name)
        if name == "advantage" and not seconds:  # DDPG has none
            continue
        rate = f"{now.global_step / seconds:>12,.0f} steps/s" if seconds > 0 else ""
        table.add_row(f"  {name}", f"{seconds:7.1f} s {100 * seconds / max(timing.total, 1e-9):5.1f} %{rate}")
    for name, path in files:
        table.add_row(name, f"{path} ({path.stat().st_size / 1e6:,.2f} MB)")
    return table


def tensorboard_scalars(row: dict[str, Any]) -> dict[str, float]:
    charts = ("mean_return", "learning_rate", "steps_per_second", "episodes")
    skipped = ("global_step", "iteration")
    return {
        f"{'charts' if name in charts else 'losses'}/{name}": value
        for name, value in row.items()
        if name not in skipped and value == value  # TensorBoard draws NaN as a gap of its own; leave it out
    }
