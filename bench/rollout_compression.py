"""Time of a rollout by the policy itself, by its int8 copy and by its pruned one, the making of the copy included.

    python -m bench.rollout_compression

One thread. Policies take turns; medians. Seconds are of the process's CPU time, which other processes on the machine stretch
less than the wall's; both are in the CSV, with the load.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from ppo_fast.trainer.compress import compressed, rollout_actor
from ppo_fast.trainer.config import ControlConfig
from ppo_fast.trainer.control import Trainer

from . import machine

KINDS = ("full", "int8", "pruned")
#: [copy, rollout with its copy, units of a rollout]
Measured = tuple[Callable[[], Any], Callable[[], Any], int]


@dataclass(frozen=True)
class RolloutCompressionConfig:
    """What each case is stands in the first column of the CSV."""

    repeats: int = 7
    """Rollouts of each policy, after one to warm up."""
    out: Path = Path("bench/results")
    """The CSV goes to OUT/cpu/rollout_compression.csv."""


def control(kind: Any, hidden: tuple[int, ...], num_envs: int, num_steps: int) -> Measured:
    """CartPole-v1; a unit is a step of an environment, whose own time is in it."""
    config = ControlConfig(
        env_id="CartPole-v1", rollout_policy=kind, hidden_sizes=hidden, num_envs=num_envs, num_steps=num_steps
    )
    trainer = Trainer(config)
    return lambda: rollout_actor(trainer.net.actor, config), trainer.collector.collect, config.batch_size


def language(kind: Any, model: dict[str, Any], num_responses: int) -> Measured:
    """Sampling 8 tokens after the sums of the task that ships; a unit is a token. Random weights: none ends early."""
    from ppo_fast.trainer.language import LanguageConfig, prompts, rewards
    from ppo_fast.trainer.language import model as models
    from ppo_fast.trainer.language.trainer import Task, Trainer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(json.dumps({**models.SMALL, **model}))
        causal, tokenizer = models.build(str(path))
    config = LanguageConfig(algorithm="grpo", kl_coef=0.0, rollout_policy=kind, num_responses=num_responses)
    task = Task(prompts.tokenize(prompts.additions()[0], tokenizer, 64, "additions"), None, rewards.find(config.reward))
    trainer = Trainer(config, causal, tokenizer, task, torch.device("cpu"))

    def rollout() -> None:
        with trainer.policy.standing_in(compressed(causal, config)):
            trainer.respond(task.train, list(range(num_responses)))

    return lambda: compressed(causal, config), rollout, num_responses * config.max_new_tokens


CASES: dict[str, Callable[[Any], Measured]] = {
    "control: CartPole-v1, 64 x 64, 8 environments": lambda kind: control(kind, (64, 64), 8, 128),
    "control: CartPole-v1, 2048 x 2048, 64 environments": lambda kind: control(kind, (2048, 2048), 64, 32),
    "language: Llama of 99,000 parameters, width 64, 256 responses": lambda kind: language(kind, {}, 256),
    "language: Llama of 28.5 million parameters, width 768, 64 responses": lambda kind: language(
        kind, {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12,
               "num_key_value_heads": 12}, 64,
    ),
}  # fmt: skip


def seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def run(config: RolloutCompressionConfig) -> int:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, make in CASES.items():
        measured = {kind: make(kind) for kind in KINDS}
        taken: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
        for repeat in range(config.repeats + 1):
            for kind, (copy, rollout, _) in measured.items():
                found = (*seconds(copy), *seconds(rollout))
                if repeat:
                    taken[kind].append(found)
        for kind, (_, _, units) in measured.items():
            copy_cpu, _, cpu, wall = (statistics.median(column) for column in zip(*taken[kind], strict=True))
            rows.append({"case": name, "policy": kind, "copy_cpu_ms": 1e3 * copy_cpu, "rollout_cpu_ms": 1e3 * cpu,
                         "rollout_wall_ms": 1e3 * wall, "units_per_cpu_second": units / cpu,
                         "speed_of_full": rows[-KINDS.index(kind)]["rollout_cpu_ms"] / (1e3 * cpu) if kind != "full" else 1.0,
                         "load": os.getloadavg()[0]})  # fmt: skip
            row = rows[-1]
            print(f"{name:<68} {kind:<7} {row['rollout_cpu_ms']:9.1f} ms, the copy {row['copy_cpu_ms']:7.1f} ms, "
                  f"{row['speed_of_full']:5.2f} x the speed", flush=True)  # fmt: skip
    facts = machine.facts()
    path = config.out / "cpu" / "rollout_compression.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        for row in rows:
            line = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**line, **facts})
    return 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(RolloutCompressionConfig)))
