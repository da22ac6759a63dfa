"""Learning curves of the presets: several seeds of one environment, as CSV and PNG, with the machine beside them.

python -m bench.learning --env-id CartPole-v1 --seeds 1 2 3 4 5 --at-least 475
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
    """Mean return of the last 100 episodes that every seed must reach."""
    jobs: int = 1
    """Runs at a time, one thread each."""
    out: Path = Path("bench/results/learning")
    """Gets ENV.csv and ENV.png."""


@dataclass(frozen=True)
class Curve:
    seed: int
    steps: np.ndarray
    returns: np.ndarray

    @property
    def final(self) -> float:
        return float(self.returns[-WINDOW:].mean())


def train(env_id: str, seed: int) -> Curve:
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
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ppo_fast.cli", "train", "control", *flags]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench.learning: {env_id}, seed {seed} failed: {done.stderr}")
        curve = Curve(seed, *read_episodes(Path(folder) / "run" / "episodes.csv"))
    print(f"{env_id}  seed {seed}  mean return of the last {WINDOW} episodes {curve.final:.1f}", flush=True)
    return curve


def write_csv(path: Path, env_id: str, curves: list[Curve], facts: dict[str, str]) -> None:
    """Moving means, sampled at equal distances in steps; the last row of a seed is its result."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_id", "seed", "global_step", f"mean_return_{WINDOW}", "episodes", *facts])
        for curve in curves:
            means = moving_mean(curve.returns)
            rows = np.searchsorted(curve.steps, np.linspace(curve.steps[0], curve.steps[-1], POINTS), "right") - 1
            rows[-1] = len(means) - 1
            for row in rows:
                step = int(curve.steps[row])
                writer.writerow([env_id, curve.seed, step, f"{means[row]:.2f}", row + 1, *facts.values()])


def draw(path: Path, env_id: str, curves: list[Curve], facts: dict[str, str], at_least: float | None) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        means = moving_mean(curve.returns)
        axes.plot(curve.steps, means, linewidth=1.5, label=f"seed {curve.seed}: {curve.final:.1f}")
    if at_least is not None:
        axes.axhline(at_least, color="grey", linestyle="--", linewidth=1, label=f"target {at_least:g}")
    axes.set(title=f"{env_id}: return, mean of {WINDOW} episodes", xlabel="environment steps", ylabel="return")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    figure.supxlabel(
        f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, commit {facts['commit']}", fontsize=7
    )
    figure.savefig(path)


def run(config: LearningConfig) -> int:
    facts = {**machine.facts(), "gymnasium": metadata.version("gymnasium")}
    with ThreadPoolExecutor(config.jobs) as pool:
        curves = list(pool.map(lambda seed: train(config.env_id, seed), config.seeds))
    config.out.mkdir(parents=True, exist_ok=True)
    write_csv(config.out / f"{config.env_id}.csv", config.env_id, curves, facts)
    draw(config.out / f"{config.env_id}.png", config.env_id, curves, facts, config.at_least)
    worst = min(curve.final for curve in curves)
    print(f"{config.env_id}  worst {worst:.1f}  mean {np.mean([c.final for c in curves]):.1f}")
    return int(config.at_least is not None and worst < config.at_least)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(LearningConfig)))
