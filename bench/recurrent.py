"""What a memory is worth: learning curves of CartPole without velocities, with an LSTM and without, as CSV and PNG.

python -m bench.recurrent --seeds 1 2 3 --at-least 475
"""

from __future__ import annotations

import csv
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from ppo_fast.trainer.control import preset, train
from ppo_fast.trainer.report import WINDOW, moving_mean, read_episodes

from . import machine

ENV_ID = "ppo_fast/CartPoleNoVelocity-v1"
POINTS = 200  # rows of a curve in the CSV
Curve = tuple[np.ndarray, np.ndarray]  # steps, mean returns of the last 100 episodes


@dataclass(frozen=True)
class RecurrentConfig:
    """Trains the preset with each memory and seed; exit code 1 where a seed with the first memory ends below --at-least."""

    memories: tuple[str, ...] = ("lstm", "none")
    """Values of --recurrent."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run each."""
    at_least: float = 475.0
    """Mean return of the last 100 episodes."""
    jobs: int = 1
    """Runs at a time, one thread each."""
    out: Path = Path("bench/results/learning")
    """Gets CartPoleNoVelocity-v1.csv and .png."""


def curve(memory: str, seed: int) -> Curve:
    with tempfile.TemporaryDirectory() as folder:
        changes = {"recurrent": memory, "seed": seed, "run_dir": f"{folder}/run", "tensorboard": False, "plot": False}
        train(preset(ENV_ID, **changes), console=Console(quiet=True))
        steps, returns = read_episodes(Path(folder) / "run" / "episodes.csv")
    means = moving_mean(returns)
    print(f"{ENV_ID}  {memory}  seed {seed}  mean return of the last {WINDOW} episodes {means[-1]:.1f}", flush=True)
    return steps, means


def write_csv(path: Path, curves: dict[tuple[str, int], Curve], facts: dict[str, str]) -> None:
    """Sampled at equal distances in steps; the last row of a run is its result."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["env_id", "recurrent", "seed", "global_step", f"mean_return_{WINDOW}", "episodes", *facts])
        for run, (steps, means) in curves.items():
            rows = np.searchsorted(steps, np.linspace(steps[0], steps[-1], POINTS), "right") - 1
            rows[-1] = len(means) - 1
            for row in rows:
                writer.writerow([ENV_ID, *run, int(steps[row]), f"{means[row]:.2f}", row + 1, *facts.values()])


def draw(path: Path, curves: dict[tuple[str, int], Curve], facts: dict[str, str], at_least: float) -> None:
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    memories = list(dict.fromkeys(memory for memory, _ in curves))
    for (memory, seed), (steps, means) in curves.items():
        label = f"--recurrent {memory}, seed {seed}: {means[-1]:.1f}"
        axes.plot(steps, means, linewidth=1.5, color=f"C{memories.index(memory)}", label=label)
    axes.axhline(at_least, color="grey", linestyle="--", linewidth=1, label=f"target {at_least:g}")
    axes.set(title=f"{ENV_ID}: return, mean of {WINDOW} episodes", xlabel="environment steps", ylabel="return")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.supxlabel(
        f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, commit {facts['commit']}", fontsize=7
    )
    figure.savefig(path)


def run(config: RecurrentConfig) -> int:
    facts = {**machine.facts(), "gymnasium": metadata.version("gymnasium")}
    runs = [(memory, seed) for memory in config.memories for seed in config.seeds]
    with ProcessPoolExecutor(config.jobs) as pool:
        curves = dict(zip(runs, pool.map(curve, *zip(*runs, strict=True)), strict=True))
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / ENV_ID.rpartition("/")[2]
    write_csv(path.with_suffix(".csv"), curves, facts)
    draw(path.with_suffix(".png"), curves, facts, config.at_least)
    worst = min(means[-1] for (memory, _), (_, means) in curves.items() if memory == config.memories[0])
    print(f"{ENV_ID}  {config.memories[0]}  worst {worst:.1f}")
    return int(worst < config.at_least)


if __name__ == "__main__":
    sys.exit(run(tyro.cli(RecurrentConfig)))
