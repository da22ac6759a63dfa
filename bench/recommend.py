"""examples/recommend.py, measured: click-through of PPO, ε-greedy and popularity as CSV, with the machine beside each number,
and PNG.

    python -m bench.recommend --seeds 1 2
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import tyro

from . import machine

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "recommend.py"


@dataclass(frozen=True)
class RecommendConfig:
    """Runs the example at its defaults; exit code 1 where PPO does not beat both baselines with every seed."""

    seeds: tuple[int, ...] = (1, 2)
    """A catalogue, users and a run of every policy each."""
    out: Path = Path("bench/results/learning")
    """Gets recommend.csv and recommend.png."""


def run(config: RecommendConfig) -> int:
    torch.set_num_threads(1)
    facts = {**machine.facts(), "gymnasium": metadata.version("gymnasium")}
    spec = importlib.util.spec_from_file_location("recommend", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules["recommend"] = example  # its dataclass looks there
    spec.loader.exec_module(example)
    wanted = example.Config(seeds=config.seeds, out=config.out / "recommend.png")
    curves: dict[str, np.ndarray] = example.train(wanted)
    example.draw(wanted, curves)
    with (config.out / "recommend.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "seed", "iteration", "click_through", *facts])
        for name, clicks in curves.items():
            for seed, of_seed in zip(config.seeds, clicks, strict=True):
                writer.writerows([name, seed, i, f"{x:.5f}", *facts.values()] for i, x in enumerate(of_seed, 1))
    last = -(-wanted.iterations // 10)
    ends = {name: clicks[:, -last:].mean(1) for name, clicks in curves.items()}
    print({name: [round(float(x), 4) for x in end] for name, end in ends.items()})
    return int((ends["ppo"] <= np.maximum(ends["epsilon_greedy"], ends["popularity"])).any())


if __name__ == "__main__":
    sys.exit(run(tyro.cli(RecommendConfig)))
