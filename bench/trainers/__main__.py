"""Other people's trainers before and after, in one run: without and with us in turn, a process each, medians.

    python -m bench.trainers                        # every trainer that is installed
    python -m bench.trainers sb3 --runs 5
    python -m bench.trainers verl --path build/peers/verl/packages      # installed elsewhere, as `python -m tests.peers` does

Writes bench/results/trainers/<name>.csv and .png: seconds of the whole and of its parts, peak memory where a trainer's module
measures it, and the learning curves of both.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from .. import machine, peers

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py") if path.stem != "table")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class TrainersConfig:
    """Other people's trainers without and with ppo_fast."""

    trainers: tyro.conf.Positional[tuple[str, ...]] = ()
    """Modules of bench/trainers; none: all."""
    runs: int = 3
    """Runs without and with us, in turn, each with a seed of its own."""
    threads: int = 1
    """OMP_NUM_THREADS of each run."""
    quick: bool = False
    """A few steps, to see that it works; nothing is written."""
    path: tuple[Path, ...] = ()
    """Folders of packages ahead of the installed ones."""
    out: Path = ROOT / "bench/results/trainers"


def one(name: str, enabled: bool, seed: int, quick: bool) -> None:
    """In a process of its own: the last line of its output is the result."""
    module = importlib.import_module(f"bench.trainers.{name}")
    print("\n" + json.dumps({"version": peers.version(module.PACKAGE), **module.measure(enabled, seed, quick)}))


def run(config: TrainersConfig, name: str, enabled: bool, seed: int) -> dict[str, Any]:
    path = os.pathsep.join(
        map(str, [*(folder.resolve() for folder in config.path), ROOT, os.environ.get("PYTHONPATH", "")])
    ).rstrip(os.pathsep)
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(config.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    code = f"from bench.trainers.__main__ import one; one({name!r}, {enabled}, {seed}, {config.quick})"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(config: TrainersConfig, name: str) -> dict[bool, list[dict[str, Any]]]:
    found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for seed in range(1, config.runs + 1):
        for enabled in (False, True) if seed % 2 else (True, False):  # neither is always the one that runs first
            found[enabled].append(run(config, name, enabled, seed))
    return found


def medians(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of every number that the runs have: the whole's seconds, each part's, the peak."""
    numbers = {"seconds": [x["seconds"] for x in results]}
    for part in results[0].get("parts", {}):
        numbers[f"seconds of {part}"] = [x["parts"][part] for x in results]
    if "peak_bytes" in results[0]:
        numbers["peak_bytes"] = [x["peak_bytes"] for x in results]
    return {key: statistics.median(values) for key, values in numbers.items()}


def write(config: TrainersConfig, name: str, found: dict[bool, list[dict[str, Any]]]) -> None:
    module = importlib.import_module(f"bench.trainers.{name}")
    facts = {"package": module.PACKAGE, "version": found[True][0]["version"], "task": module.TASK, **machine.facts()}
    config.out.mkdir(parents=True, exist_ok=True)
    with (config.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ppo_fast", "seed", "metric", "x", "value", "threads", *facts])
        for enabled, results in found.items():
            for seed, result in enumerate(results, 1):
                rows: list[tuple[str, Any, float]] = [("seconds", "", result["seconds"])]
                rows += [(f"seconds of {part}", "", value) for part, value in result.get("parts", {}).items()]
                rows += [("peak_bytes", "", result["peak_bytes"])] if "peak_bytes" in result else []
                rows += [("curve", x, y) for x, y in result.get("curve", [])]
                for metric, x, value in rows:
                    with_us = "with" if enabled else "without"
                    writer.writerow([with_us, seed, metric, x, f"{value:.6g}", config.threads, *facts.values()])
    draw(config.out / f"{name}.png", name, module.TASK, found, facts)


def draw(to: Path, name: str, task: str, found: dict[bool, list[dict[str, Any]]], facts: dict[str, str]) -> None:
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    bars, curves = figure.subplots(1, 2)
    colors = {False: "tab:gray", True: "tab:blue"}
    numbers = {enabled: medians(results) for enabled, results in found.items()}
    keys = [key for key in numbers[True] if key != "peak_bytes"]
    for i, enabled in enumerate((False, True)):
        heights = [numbers[enabled][key] for key in keys]
        at = [k + (i - 0.5) * 0.4 for k in range(len(keys))]
        label = f"{name} with ppo_fast" if enabled else name
        marks = bars.bar(at, heights, width=0.4, color=colors[enabled], label=label)
        bars.bar_label(marks, fmt="%.3g", fontsize=7)
        for result in found[enabled]:
            if result.get("curve"):
                curves.plot(*zip(*result["curve"], strict=True), color=colors[enabled], linewidth=1)
    bars.set_xticks(
        range(len(keys)), [key.removeprefix("seconds of ") if key != "seconds" else "whole" for key in keys]
    )
    bars.set(ylabel="seconds, medians", title=task)
    bars.legend(fontsize=8)
    curves.set(xlabel="step", ylabel="mean return or reward", title="learning, every seed")
    curves.grid(alpha=0.3)
    about = f"{facts['package']} {facts['version']}, torch {facts['torch']}, {facts['cpu']}, commit {facts['commit']}"
    figure.supxlabel(about, fontsize=7)
    figure.savefig(to)


def main(config: TrainersConfig) -> int:
    unknown = [name for name in config.trainers if name not in NAMES]
    if unknown:
        raise SystemExit(f"bench.trainers: trainers must be of {', '.join(NAMES)}, got {', '.join(unknown)}")
    console, failed = Console(), False
    for name in config.trainers or NAMES:
        try:
            with console.status(f"{name}: {config.runs} runs without us and with us"):
                found = measure(config, name)
        except RuntimeError as error:
            console.print(f"{name}: {error}", style="red", markup=False)
            failed = True
            continue
        without, with_us = medians(found[False]), medians(found[True])
        table = Table("", "without", "with", "ratio", title=f"{name} {found[True][0]['version']}")
        for key in without:
            ratio = without[key] / with_us[key] if with_us[key] else float("nan")
            table.add_row(key, f"{without[key]:.4g}", f"{with_us[key]:.4g}", f"{ratio:.2f}")
        console.print(table)
        if not config.quick:
            write(config, name, found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(TrainersConfig, description=__doc__)))
