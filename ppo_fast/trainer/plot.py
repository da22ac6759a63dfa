"""Learning curves of several runs in one picture: `ppo-fast plot RUN RUN ...`."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro

from .checkpoint import write_atomic
from .errors import UserError, one_line
from .fields import read_json
from .report import WINDOW, moving_mean, read_episodes
from .rundir import CONFIG


@dataclass(frozen=True)
class PlotConfig:
    """Draws the learning curves of runs of `ppo-fast train control` over environment steps, in one picture.

    Runs of one algorithm on one environment have a colour each; else every algorithm, and environment, has one.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = field(default=())
    """Folders of runs, e.g. runs/Pendulum-v1 runs/Pendulum-v1-ddpg."""

    out: Path = Path("curves.png")
    """The picture, a PNG."""


@dataclass(frozen=True)
class Curve:
    name: str
    env_id: str
    algorithm: str
    steps: np.ndarray
    returns: np.ndarray

    @property
    def final(self) -> float:
        """Mean return of the last 100 episodes."""
        return float(self.returns[-WINDOW:].mean())


def read_run(folder: Path) -> Curve:
    """The curve of a run; `UserError` for another folder."""
    config, episodes = folder / CONFIG, folder / "episodes.csv"
    if not (config.exists() and episodes.exists()):
        raise UserError(f"plot: expected the folder of a run of ppo-fast train control, got {folder}")
    fields = read_json(config)
    try:
        steps, returns = read_episodes(episodes)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{episodes}: expected the episodes of a run, got {one_line(error)}") from None
    if not len(returns):
        raise UserError(f"{episodes}: expected finished episodes, got none yet")
    return Curve(folder.resolve().name, str(fields.get("env_id")), str(fields.get("algorithm", "ppo")), steps, returns)


def draw(curves: list[Curve], at_least: float | None = None, note: str = "") -> bytes:
    """The picture as a PNG: means over the last hundred episodes, a target, and a line of small print."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no pyplot state
    from matplotlib.figure import Figure

    worlds = list(dict.fromkeys(c.env_id for c in curves))
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        where = f" on {curve.env_id}" if len(worlds) > 1 else ""
        groups.setdefault(f"{curve.algorithm.upper()}{where}", []).append(curve)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (group, members) in enumerate(groups.items()):
        finals = [c.final for c in members]
        spread = f", runs {min(finals):.1f} to {max(finals):.1f}" if len(finals) > 1 else ""
        for j, curve in enumerate(members):
            colour, label = f"C{j}", f"{curve.name}: {curve.final:.1f}"
            if len(groups) > 1:
                colour, label = f"C{i}", "" if j else f"{group}: {np.mean(finals):.1f}{spread}"
            axes.plot(curve.steps, moving_mean(curve.returns), color=colour, linewidth=1.5, label=label or None)
    if at_least is not None:
        axes.axhline(at_least, color="grey", linestyle="--", linewidth=1, label=f"target {at_least:g}")
    title = ", ".join(groups) + (f" on {worlds[0]}" if len(worlds) == 1 else "")
    axes.set(title=title, xlabel="environment steps", ylabel=f"return, mean of {WINDOW} episodes")
    axes.legend(loc="best", fontsize=8)
    axes.grid(alpha=0.3)
    if note:
        figure.supxlabel(note, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def run(config: PlotConfig) -> int:
    if not config.runs:
        raise UserError("plot: expected the folders of runs, got none")
    curves = [read_run(folder) for folder in config.runs]
    try:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(config.out, draw(curves))
    except OSError as error:
        raise UserError(f"--out: expected a file that can be written, got {config.out} ({one_line(error)})") from None
    for curve in curves:
        print(
            f"{curve.name}  {curve.algorithm} on {curve.env_id}  {len(curve.returns):,} episodes  "
            f"{curve.final:.1f} over the last {min(WINDOW, len(curve.returns))}"
        )
    print(config.out)
    return 0
