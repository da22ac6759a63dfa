"""Learning curves of the presets: several seeds of one environment, as CSV and PNG, with the machine beside them.

python -m bench.learning --env-id CartPole-v1 --seeds 1 2 3 4 5 --at-least 475
python -m bench.learning --env-id ppo_fast/CartPoleNoVelocity-v1 --vary recurrent --values lstm none --at-least 475
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppo_fast.trainer.report import WINDOW, moving_mean, read_episodes

from . import machine

POINTS = 200  # rows of a curve in the CSV


@dataclass(frozen=True)
class LearningConfig:
    """Trains the preset of an environment with several seeds; exit code 1 where one ends below --at-least."""

    env_id: str = "CartPole-v1"
    """Environment with a preset."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """One run each."""
    at_least: float | None = None
    """Mean return of the last 100 episodes that every seed must reach (with --vary, those of the first value)."""
    vary: str | None = None
    """A flag of `ppo-fast train control` that is given --values in turn, each with every seed."""
    values: tuple[str, ...] = ()
    """Values of --vary."""
    jobs: int = 1
    """Runs at a time, one thread each."""
    out: Path = Path("bench/results/learning")
    """Gets ENV.csv and ENV.png."""

    def __post_init__(self) -> None:
        if bool(self.vary) != bool(self.values):
            raise SystemExit(f"--values: expected values of --vary, got {self.values} of {self.vary}")


@dataclass(frozen=True)
class Curve:
    value: str  # of the flag that is varied
    seed: int
    steps: np.ndarray
    returns: np.ndarray

    @property
    def final(self) -> float:
        return float(self.returns[-WINDOW:].mean())


def train(env_id: str, seed: int, vary: str | None = None, value: str = "") -> Curve:
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--env-id",
            env_id,
            "--seed",
            str(seed),
            "--run-dir",
            "run",
            "--no-tensorboard",
            "--no-plot",
            "--no-progress",
            *([f"--{vary}", value] if vary else []),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ppo_fast.cli", "train", "control", *flags]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench.learning: {env_id}, seed {seed} failed: {done.stderr}")
        curve = Curve(value, seed, *read_episodes(Path(folder) / "run" / "episodes.csv"))
    what = f"{env_id}  {vary} {value}" if vary else env_id
    print(f"{what}  seed {seed}  mean return of the last {WINDOW} episodes {curve.final:.1f}", flush=True)
    return curve


def write_csv(path: Path, env_id: str, curves: list[Curve], facts: dict[str, str], vary: str | None = None) -> None:
    """Moving means, sampled at equal distances in steps; the last row of a seed is its result."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["env_id", *([vary] if vary else []), "seed", "global_step", f"mean_return_{WINDOW}", "episodes", *facts]
        )
        for curve in curves:
            means = moving_mean(curve.returns)
            rows = np.searchsorted(curve.steps, np.linspace(curve.steps[0], curve.steps[-1], POINTS), "right") - 1
            rows[-1] = len(means) - 1
            for row in rows:
                step = int(curve.steps[row])
                value = [curve.value] if vary else []
                writer.writerow([env_id, *value, curve.seed, step, f"{means[row]:.2f}", row + 1, *facts.values()])


def draw(
    path: Path, env_id: str, curves: list[Curve], facts: dict[str, str], at_least: float | None, vary: str | None = None
) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = list(dict.fromkeys(curve.value for curve in curves))
    for curve in curves:
        means, name = moving_mean(curve.returns), f"{vary} {curve.value}, " if vary else ""
        style = {"color": f"C{values.index(curve.value)}"} if vary else {}  # one colour a value
        axes.plot(curve.steps, means, linewidth=1.5, label=f"{name}seed {curve.seed}: {curve.final:.1f}", **style)
    if at_least is not None:
        axes.axhline(at_least, color="grey", linestyle="--", linewidth=1, label=f"target {at_least:g}")
    axes.set(title=f"{env_id}: return, mean of {WINDOW} episodes", xlabel="environment steps", ylabel="return")
    axes.legend(loc="best" if vary else "lower right", fontsize=8)
    axes.grid(alpha=0.3)
    figure.supxlabel(
        f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, commit {facts['commit']}", fontsize=7
    )
    figure.savefig(path)


def run(config: LearningConfig) -> int:
    facts = {**machine.facts(), "gymnasium": metadata.version("gymnasium")}
    values = config.values or ("",)
    runs = [(value, seed) for value in values for seed in config.seeds]
    with ThreadPoolExecutor(config.jobs) as pool:
        curves = list(pool.map(lambda run: train(config.env_id, run[1], config.vary, run[0]), runs))
    config.out.mkdir(parents=True, exist_ok=True)
    name = config.env_id.rpartition("/")[2]  # without the namespace
    write_csv(config.out / f"{name}.csv", config.env_id, curves, facts, config.vary)
    draw(config.out / f"{name}.png", config.env_id, curves, facts, config.at_least, config.vary)
    held = [curve.final for curve in curves if curve.value == values[0]]
    worst = min(held)
    print(f"{config.env_id}  worst {worst:.1f}  mean {np.mean(held):.1f}")
    return int(config.at_least is not None and worst < config.at_least)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(LearningConfig)))
