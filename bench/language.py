"""Learning curves of `ppo-fast train language` at its defaults: greedy exact match on held-out sums, over wall time, as CSV
and PNG, with the machine beside them.

    python -m bench.language --algorithms ppo grpo --seeds 1
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import machine

#: (iteration, seconds of training so far, accuracy)
Curve = list[tuple[int, float, float]]


@dataclass(frozen=True)
class LanguageBenchConfig:
    """A run of each algorithm with each seed, one after another; exit code 1 where one ends below --at-least."""

    algorithms: tuple[str, ...] = ("ppo", "grpo")
    """Values of --algorithm."""
    seeds: tuple[int, ...] = (1,)
    """Values of --seed."""
    at_least: float = 0.9
    """Share of the held-out sums that must be answered exactly."""
    out: Path = Path("bench/results/learning")
    """Gets language.csv and language.png."""


def train(algorithm: str, seed: int) -> Curve:
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--algorithm", algorithm, "--seed", str(seed), "--run-dir", "run", "--no-progress", "--no-tensorboard"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "ppo_fast.cli", "train", "language", *flags]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"bench.language: {algorithm}, seed {seed} failed: {done.stderr}")
        seconds, curve = 0.0, []
        with (Path(folder) / "run" / "progress.csv").open() as file:
            for row in csv.DictReader(file):
                seconds += float(row["seconds"])
                if row["eval_reward"] != "nan":
                    curve.append((int(row["iteration"]), seconds, float(row["eval_reward"])))
    print(f"{algorithm}  seed {seed}  {curve[-1][2]:.3f} after {seconds:.0f} s", flush=True)
    return curve


def run(config: LanguageBenchConfig) -> int:
    facts = {**machine.facts(), "transformers": metadata.version("transformers")}
    curves = {(a, s): train(a, s) for a in config.algorithms for s in config.seeds}
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / "language.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["algorithm", "seed", "iteration", "seconds", "exact_match", *facts])
        for (algorithm, seed), curve in curves.items():
            for iteration, seconds, accuracy in curve:
                writer.writerow([algorithm, seed, iteration, f"{seconds:.1f}", f"{accuracy:.4f}", *facts.values()])
    draw(config, curves, facts)
    return int(any(curve[-1][2] < config.at_least for curve in curves.values()))


def draw(config: LanguageBenchConfig, curves: dict[tuple[str, int], Curve], facts: dict[str, str]) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (algorithm, seed), curve in curves.items():
        _, seconds, accuracy = zip(*curve, strict=True)
        axes.plot(seconds, accuracy, linewidth=1.5, label=f"{algorithm}, seed {seed}: {accuracy[-1]:.3f}")
    axes.axhline(config.at_least, color="grey", linestyle="--", linewidth=1, label=f"target {config.at_least:g}")
    axes.set(title="Additions: exact match on held-out sums", xlabel="seconds of training", ylabel="share")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    figure.supxlabel(
        f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, commit {facts['commit']}", fontsize=7
    )
    figure.savefig(config.out / "language.png")


if __name__ == "__main__":
    sys.exit(run(tyro.cli(LanguageBenchConfig)))
