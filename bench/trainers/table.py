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
    "sb3": "advantages of rollout buffers, PPO's update",
    "sb3_contrib": "updates of MaskablePPO and RecurrentPPO",
    "cleanrl": "advantages and loss: two calls in a copy of the script",
}
HEADER = (
    "trainer",
    "version",
    "on our kernels",
    "own tests passed, without → with",
    "update without → with",
    "peak memory",
)


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


def change(found: dict[tuple[str, str], float], metric: str, number: str, scale: float = 1.0) -> str:
    before, after = (found.get((metric, x)) for x in ("without", "with"))
    if before is None or after is None:
        return "–"
    ratio = f" ({before / after:.1f}×)" if after else ""
    return f"{before * scale:{number}} → {after * scale:{number}}{ratio}"


def table() -> str:
    own, lines = tests(), [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for name, replaced in REPLACED.items():
        found, facts = steps(name)
        ran = own.get(name)
        version = (ran or facts).get("version", "–")
        passed = f"{ran['passed_without']} → {ran['passed_with']}" if ran else "–"
        seconds = change(found, "seconds of update", ".3g")
        seconds = seconds.replace(" (", " s (", 1) if seconds != "–" else seconds
        memory = change(found, "peak_bytes", ".3g", 1e-6)
        memory = memory.replace(" (", " MB (", 1) if memory != "–" else memory
        lines.append(f"| `{name}` | {version} | {replaced} | {passed} | {seconds} | {memory} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
