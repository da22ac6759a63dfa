"""A study of `ppo-fast tune` on CartPole-v1: its table and pictures, with the machine beside them.

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
    out: Path = Path("bench/results/tuning")
    """Gets ENV.csv, ENV.png and ENV-importances.png."""


def run(config: TuningConfig) -> int:
    facts = {**machine.facts(), **{p: metadata.version(p) for p in ("gymnasium", "optuna")}}
    flags = ["--env-id", config.env_id, "--total-timesteps", config.total_timesteps, "--search", *config.search]
    flags += ["--trials", config.trials, "--seeds", config.seeds, "--jobs", config.jobs, "--study", "study"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    config.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ppo_fast.cli", "tune", "control", *map(str, flags)]
        if code := subprocess.run(command, cwd=folder, env=environment).returncode:
            return code
        study = Path(folder) / "study"
        with (study / "trials.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        shutil.copyfile(study / "parallel.png", config.out / f"{config.env_id}.png")
        shutil.copyfile(study / "importances.png", config.out / f"{config.env_id}-importances.png")
    with (config.out / f"{config.env_id}.csv").open("w", newline="") as file:
        columns = {"env_id": config.env_id, "total_timesteps": config.total_timesteps, "seeds": config.seeds}
        writer = csv.DictWriter(file, [*columns, *rows[0], *facts])
        writer.writeheader()
        writer.writerows({**columns, **row, **facts} for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(TuningConfig)))
