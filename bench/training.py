"""Steps per second of `ppo_fast.trainer.control` and of CleanRL's ppo.py, on CartPole-v1 with the same hyperparameters.

    python -m bench.training --cleanrl DIR      DIR: a checkout of github.com/vwxyzjn/cleanrl

The two take turns, a process a run, one thread each. Both write TensorBoard scalars, as CleanRL does; steps per second
are counted from the first step on, without imports, which is what CleanRL prints as SPS. Ours keeps up its checkpoints.
"""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tyro

from . import machine

#: CleanRL's defaults for ppo.py, spelled out so that no preset can change what is compared.
HYPERPARAMETERS = {
    "env_id": "CartPole-v1", "num_envs": 4, "num_steps": 128, "learning_rate": 2.5e-4, "anneal_lr": True, "gamma": 0.99,
    "gae_lambda": 0.95, "num_minibatches": 4, "update_epochs": 4, "normalize_advantages": True, "clip_coef": 0.2,
    "clip_value_loss": True, "entropy_coef": 0.01, "value_coef": 0.5, "max_grad_norm": 0.5, "target_kl": None,
    "adam_eps": 1e-5, "hidden_sizes": [64, 64], "threads": 1, "tensorboard": True, "plot": False, "progress": False,
}  # fmt: skip

OURS = """
import json, sys
from rich.console import Console
from ppo_fast.trainer.config import from_dict
from ppo_fast.trainer.control import train
result = train(from_dict(json.loads(sys.argv[1]), "bench"), console=Console(quiet=True))
t = result.timing
print(json.dumps({"steps": result.global_step, "seconds": t.total, "rollout": t.rollout, "advantage": t.advantage,
                  "update": t.update, "other": t.other, "mean_return": result.mean_return}))
"""


@dataclass(frozen=True)
class TrainingConfig:
    """Interleaved runs of both trainers; medians are compared."""

    cleanrl: Path
    """Folder of a CleanRL checkout; its cleanrl/ppo.py is run as it is."""
    steps: int = 100_000
    """Environment steps a run."""
    runs: int = 5
    """Runs of each trainer."""
    out: Path = Path("bench/results")
    """The CSV goes to OUT/cpu/training.csv."""


def _run(command: list[str], folder: str) -> tuple[str, float]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench.training: {command[0]} failed with exit code {done.returncode}:\n{done.stderr}")
    return done.stdout, time.perf_counter() - start


def run_ours(steps: int, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        fields = {**HYPERPARAMETERS, "total_timesteps": steps, "seed": seed, "run_dir": "run"}
        output, wall = _run(["-c", OURS, json.dumps(fields)], folder)
    found = json.loads(output)
    rate = found.pop("steps") / found.pop("seconds")
    return {"steps_per_second": rate, "wall_seconds": wall, **found}


def run_cleanrl(script: Path, steps: int, seed: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env-id", "CartPole-v1", "--total-timesteps", str(steps), "--seed", str(seed), "--no-cuda"]
        output, wall = _run([str(script), *flags], folder)
    rates = re.findall(r"^SPS: (\d+)$", output, re.MULTILINE)
    if not rates:
        raise SystemExit(f"bench.training: expected lines 'SPS: N' from {script}, got none")
    return {"steps_per_second": float(rates[-1]), "wall_seconds": wall}


def run(config: TrainingConfig) -> int:
    script = (config.cleanrl / "cleanrl" / "ppo.py").resolve()
    if not script.is_file():
        raise SystemExit(f"bench.training: --cleanrl: expected a checkout with cleanrl/ppo.py, got {config.cleanrl}")
    rows = []
    for seed in range(1, config.runs + 1):
        for trainer in ("ppo_fast", "cleanrl"):
            load = os.getloadavg()[0]
            measured = (
                run_ours(config.steps, seed) if trainer == "ppo_fast" else run_cleanrl(script, config.steps, seed)
            )
            rows.append({"trainer": trainer, "seed": seed, "steps": config.steps, "load_before": load, **measured})
            print(f"{trainer:<9} seed {seed}  {measured['steps_per_second']:>9,.0f} steps/s", flush=True)
    medians = {
        trainer: statistics.median(r["steps_per_second"] for r in rows if r["trainer"] == trainer)
        for trainer in ("ppo_fast", "cleanrl")
    }
    print(f"median {medians['ppo_fast']:,.0f} against {medians['cleanrl']:,.0f} steps/s: "
          f"{medians['ppo_fast'] / medians['cleanrl']:.2f}x")  # fmt: skip
    facts = {**machine.facts(), "gymnasium": metadata.version("gymnasium"), "cleanrl": _revision(config.cleanrl)}
    path = config.out / "cpu" / "training.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ("trainer", "seed", "steps", "steps_per_second", "wall_seconds", "rollout", "advantage", "update", "other",
               "mean_return", "load_before")  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *facts], restval="")
        writer.writeheader()
        for row in rows:
            line = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow({**line, **facts})
    print("wrote", path)
    return 0


def _revision(checkout: Path) -> str:
    """Commit of the CleanRL checkout, where it is one."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    sys.exit(run(tyro.cli(TrainingConfig)))
