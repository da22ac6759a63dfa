"""The README's table of trainers, from bench/results/peers/tests.csv and bench/results/trainers/*.csv, and from nothing else.

python -m bench.trainers.table
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"

#: What runs on our kernels. A trainer stands in the table in this order.
REPLACED = {
    "sb3": "advantages, PPO's update",
    "sb3_contrib": "updates of MaskablePPO, RecurrentPPO",
    "cleanrl": "advantages and loss, in a copy of the script",
    "rsl_rl": "returns, PPO's update",
    "skrl": "advantages, PPO's update",
    "torchrl": "advantages, ClipPPOLoss (MAPPO, IPPO)",
    "rllib": "value targets, PPO's loss",
    "rl_games": "advantages",
    "tianshou": "advantages",
    "verl": "advantages, log-probs, entropies, losses",
    "trl": "head, log-probs, GRPO's loss",
    "openrlhf": "advantages, log-probs, losses",
    "nemo_rl": "advantages, log-probs, losses",
    "slime": "advantages",
}
HEADER = ("trainer", "on our kernels", "own tests", "advantages", "update", "whole run", "peak memory")


def tests() -> dict[str, dict[str, str]]:
    with (RESULTS / "peers/tests.csv").open() as file:
        return {row["trainer"]: row for row in csv.DictReader(file)}


def steps(name: str) -> tuple[dict[tuple[str, str], float], dict[str, str]]:
    """Medians by (metric, "with" or "without"), and the facts of the run."""
    path = RESULTS / f"trainers/{name}.csv"
    if not path.exists():
        return {}, {}
    values, facts = defaultdict(list), {}
    with path.open() as file:
        for row in csv.DictReader(file):
            facts = row
            if row["metric"] != "curve":
                values[row["metric"], row["ppo_fast"]].append(float(row["value"]))
    return {key: statistics.median(x) for key, x in values.items()}, facts


def number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def change(found: dict[tuple[str, str], float], metrics: tuple[str, ...], unit: str, scale: float = 1.0) -> str:
    """Without → with, and the ratio, of the first of these that was measured."""
    for metric in metrics:
        before, after = (found.get((metric, x)) for x in ("without", "with"))
        if before is not None and after is not None:
            ratio = f", {before / after:.3g}×" if after else ""
            return f"{number(before * scale)} → {number(after * scale)} {unit}{ratio}"
    return "–"


def table() -> str:
    own, lines = tests(), [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for name, replaced in REPLACED.items():
        found, facts = steps(name)
        ran = own.get(name, {})
        version = "" if name == "cleanrl" else " " + (ran or facts).get("version", "")  # that one has no package
        passed = f"{ran['passed_without']} → {ran['passed_with']}" if ran.get("passed_with") else "–"
        numbers = (
            change(found, ("seconds of advantages",), "ms", 1e3),
            change(found, ("seconds of update", "seconds of loss and backward"), "s"),
            change(found, ("seconds",), "s"),
            change(found, ("peak_bytes",), "MB", 1e-6),
        )
        lines.append(f"| `{name}`{version.rstrip()} | {replaced} | {passed} | {' | '.join(numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
