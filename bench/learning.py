"""Learning curves of the presets: several seeds of one environment, as CSV and PNG, with the machine beside them.

python -m bench.learning --env-id CartPole-v1 --seeds 1 2 3 4 5 --at-least 475
python -m bench.learning --env-id Pendulum-v1 --algorithms ppo ddpg --seeds 1 2 3 --at-least -200
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
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

from ppo_fast.trainer.plot import Curve, draw, read_run
from ppo_fast.trainer.report import WINDOW, moving_mean

from . import machine

POINTS = 200  # rows of a curve in the CSV


@dataclass(frozen=True)
class LearningConfig:
    """Trains the preset of an environment with several seeds; exit code 1 where one ends below --at-least."""

    env_id: str = "CartPole-v1"
    """Environment with a preset."""
    algorithms: tuple[str, ...] = ("ppo",)
    """Values of --algorithm."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """One run of each algorithm each."""
    at_least: float | None = None
    """Mean return of the last 100 episodes that every run must reach."""
    jobs: int = 1
    """Runs at a time, one thread each."""
    out: Path = Path("bench/results/learning")
    """Gets ENV.csv and ENV.png, with several algorithms ENV-ppo-ddpg.csv and .png."""


def train(env_id: str, algorithm: str, seed: int) -> Curve:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env-id", env_id, "--algorithm", algorithm, "--seed", str(seed), "--run-dir", "run"]
        flags += ["--no-tensorboard", "--no-plot", "--no-progress"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ppo_fast.cli", "train", "control", *flags]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench.learning: {algorithm} on {env_id}, seed {seed} failed: {done.stderr}")
        curve = dataclasses.replace(read_run(Path(folder) / "run"), name=f"seed {seed}")
    print(
        f"{env_id}  {algorithm}  seed {seed}  mean return of the last {WINDOW} episodes {curve.final:.1f}", flush=True
    )
    return curve


def write_csv(path: Path, curves: list[Curve], facts: dict[str, str]) -> None:
    """Moving means, sampled at equal distances in steps; the last row of a seed is its result."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_id", "algorithm", "seed", "global_step", f"mean_return_{WINDOW}", "episodes", *facts])
        for curve in curves:
            means, seed = moving_mean(curve.returns), curve.name.removeprefix("seed ")
            rows = np.searchsorted(curve.steps, np.linspace(curve.steps[0], curve.steps[-1], POINTS), "right") - 1
            rows[-1] = len(means) - 1
            for row in rows:
                now = int(curve.steps[row]), f"{means[row]:.2f}", row + 1
                writer.writerow([curve.env_id, curve.algorithm, seed, *now, *facts.values()])


def run(config: LearningConfig) -> int:
    facts = {**machine.facts(), "gymnasium": metadata.version("gymnasium")}
    runs = list(itertools.product(config.algorithms, config.seeds))
    with ThreadPoolExecutor(config.jobs) as pool:
        curves = list(pool.map(lambda run: train(config.env_id, *run), runs))
    config.out.mkdir(parents=True, exist_ok=True)
    name = "-".join([config.env_id, *config.algorithms]) if config.algorithms != ("ppo",) else config.env_id
    write_csv(config.out / f"{name}.csv", curves, facts)
    note = f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, commit {facts['commit']}"
    (config.out / f"{name}.png").write_bytes(draw(curves, config.at_least, note))
    worst = min(curve.final for curve in curves)
    print(f"{config.env_id}  worst {worst:.1f}  mean {np.mean([c.final for c in curves]):.1f}")
    return int(config.at_least is not None and worst < config.at_least)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(LearningConfig)))
