"""A study of `ppo-fast tune` on CartPole-v1: its table and pictures, and its best beside the defaults on seeds that the
study has not seen, with the machine beside them.

python -m bench.tuning
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tyro

from ppo_fast.trainer.plot import read_run

from . import machine


@dataclass(frozen=True)
class TuningConfig:
    """Tunes the PPO trainer from a preset, by TPE and median pruning."""

    env_id: str = "CartPole-v1"
    """Environment with a preset."""
    total_timesteps: int = 30_000
    """Steps of each run: few, so that hyperparameters matter."""
    search: tuple[str, ...] = ("learning_rate=log:1e-4:3e-2", "num_steps=32,64,128,256", "clip_coef=0.1:0.3")
    """Space, as of ppo-fast tune."""
    trials: int = 24
    """Trials of the study."""
    seeds: int = 1
    """Runs of each trial."""
    jobs: int = 1
    """Trials at a time."""
    fresh_seeds: tuple[int, ...] = (101, 102, 103, 104, 105)
    """Seeds of the comparison with the defaults: the best of a study is partly luck with its own."""
    out: Path = Path("bench/results/tuning")
    """Gets ENV.csv, ENV.png, ENV-importances.png and ENV-best.csv."""


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def run(config: TuningConfig) -> int:
    facts = {**machine.facts(), **{p: metadata.version(p) for p in ("gymnasium", "optuna")}}
    flags = ["--env-id", config.env_id, "--total-timesteps", config.total_timesteps, "--search", *config.search]
    flags += ["--trials", config.trials, "--seeds", config.seeds, "--jobs", config.jobs, "--study", "study"]
    task = {"env_id": config.env_id, "total_timesteps": config.total_timesteps}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    config.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:

        def ppo_fast(*args: object) -> None:
            command = [sys.executable, "-m", "ppo_fast.cli", *map(str, args)]
            subprocess.run(command, cwd=folder, env=environment, check=True)

        ppo_fast("tune", "control", *flags)
        study = Path(folder) / "study"
        with (study / "trials.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        shutil.copyfile(study / "parallel.png", config.out / f"{config.env_id}.png")
        shutil.copyfile(study / "importances.png", config.out / f"{config.env_id}-importances.png")
        best = []
        starts = {"best": ["--config", "study/best.json"], "defaults": flags[:4]}
        for name, start in starts.items():
            for seed in config.fresh_seeds:
                quiet = ["--no-tensorboard", "--no-plot", "--no-progress"]
                ppo_fast("train", "control", *start, "--seed", seed, "--run-dir", f"{name}-{seed}", *quiet)
                final = read_run(Path(folder) / f"{name}-{seed}").final
                best.append({**task, "hyperparameters": name, "seed": seed, "mean_return_100": f"{final:.2f}", **facts})
    write(config.out / f"{config.env_id}.csv", [{**task, "seeds": config.seeds, **row, **facts} for row in rows])
    write(config.out / f"{config.env_id}-best.csv", best)
    return 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(TuningConfig)))
