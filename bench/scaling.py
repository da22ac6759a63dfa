"""What a node contributes to a run on many: steps per second by processes on this machine, and bytes an iteration sends.

    python -m bench.scaling

Rollout workers on Ray (0: one process without Ray) and ranks of torchrun, each in processes of their own; steps per second
are counted from the first rollout on, without starting Ray or importing anything.
"""

from __future__ import annotations

import csv
import json
import os
import pickle
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
import tyro

from . import machine

TRAIN = """
import json, sys
from rich.console import Console
from ppo_fast.trainer import control
from ppo_fast.trainer.config import from_dict
config, workers, staleness, quiet = from_dict(json.loads(sys.argv[1]), "bench"), *map(int, sys.argv[2:4]), Console(quiet=True)
if workers:
    from ppo_fast.trainer import ray
    result = ray.train(config, workers=workers, max_staleness=staleness, console=quiet)
else:
    result = control.train(config, console=quiet)
t = result.timing
print(json.dumps({"steps": result.global_step, "seconds": t.total, "rollout": t.rollout, "update": t.update}))
"""
KEYS = ("workers", "max_staleness", "ranks")
SETUPS = ((0, 0, 1), (1, 0, 1), (2, 0, 1), (2, 1, 1), (0, 0, 2))


class Heavy(gym.Wrapper):
    """Each step costs 0.5 ms of a core's time, however many processes share the core."""

    def step(self, action: Any) -> Any:
        until = time.thread_time() + 5e-4
        while time.thread_time() < until:
            pass
        return self.env.step(action)


if "Heavy-v0" not in gym.registry:  # a worker imports this module, and this module is also __main__
    gym.register("Heavy-v0", entry_point=lambda: Heavy(gym.make("CartPole-v1", disable_env_checker=True)))


@dataclass(frozen=True)
class ScalingConfig:
    """Interleaved runs; medians are told."""

    envs: tuple[str, ...] = ("CartPole-v1", "bench.scaling:Heavy-v0")
    """Gymnasium environments. Heavy-v0 is CartPole with 0.5 ms of computation in every step, as a simulator has."""
    num_envs: int = 16
    """Environments of a run, over all its processes."""
    iterations: int = 8
    """Iterations of 128 steps in each environment."""
    runs: int = 3
    """Runs of each setup."""
    out: Path = Path("bench/results/scaling")
    """The CSV goes to OUT/<machine>.csv."""


def fields_of(env_id: str, config: ScalingConfig) -> dict[str, Any]:
    steps = config.iterations * config.num_envs * 128
    return {"env_id": env_id, "num_envs": config.num_envs, "num_steps": 128, "total_timesteps": steps, "run_dir": "run",
            "tensorboard": False, "plot": False, "progress": False}  # fmt: skip


def measure(fields: dict[str, Any], workers: int, staleness: int, ranks: int) -> dict[str, float]:
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(ranks):
            of_rank = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            started.append(subprocess.Popen(
                [sys.executable, "-c", TRAIN, json.dumps(fields), str(workers), str(staleness)], cwd=folder, text=True,
                stdout=subprocess.PIPE, env={**environment, **({k: str(v) for k, v in of_rank.items()} if ranks > 1 else {})},
            ))  # fmt: skip
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"bench.scaling: {workers} workers, {ranks} ranks failed")
    found = json.loads(outputs[0].splitlines()[-1])
    return {"steps_per_second": found.pop("steps") / found.pop("seconds"), **found}


def sizes(fields: dict[str, Any]) -> dict[str, int]:
    """Bytes of an iteration: what a worker is sent and sends, and what ranks add up in each gradient step."""
    from ppo_fast.trainer import ray
    from ppo_fast.trainer.config import from_dict

    config, worker = from_dict(fields, "bench"), ray.Worker()
    worker.start(config, None, 0, 1)
    parameters = {name: x.numpy() for name, x in worker.net.state_dict().items()}
    moments = worker.collector.normalizer and worker.collector.normalizer.moments.state_dict()
    request = ray.Request(0, None, moments, torch.Generator().get_state())
    rollout = worker.collect(request, parameters)
    worker.envs.close()
    return {
        "parameter_bytes": len(pickle.dumps((request, parameters))), "rollout_bytes": len(pickle.dumps(rollout)),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in worker.net.parameters()),
        "gradient_steps": config.num_minibatches * config.update_epochs,
    }  # fmt: skip


def run(config: ScalingConfig) -> int:
    rows = []
    for env_id in config.envs:
        fields = fields_of(env_id, config)
        size = sizes(fields)
        for number in range(config.runs):
            for workers, staleness, ranks in SETUPS:
                load = os.getloadavg()[0]
                found = measure({**fields, "seed": number + 1}, workers, staleness, ranks)
                rows.append({"env_id": env_id, "workers": workers, "max_staleness": staleness, "ranks": ranks, "run": number,
                             "num_envs": config.num_envs, "num_steps": 128, **found, **size, "load_before": load})  # fmt: skip
                print(f"{env_id:<16} {workers} workers, staleness {staleness}, {ranks} ranks  "
                      f"{found['steps_per_second']:>9,.0f} steps/s", flush=True)  # fmt: skip
    for env_id in config.envs:
        for setup in SETUPS:
            mine = [r for r in rows if r["env_id"] == env_id and tuple(r[key] for key in KEYS) == setup]
            median = statistics.median(r["steps_per_second"] for r in mine)
            print(f"median {env_id} {dict(zip(KEYS, setup, strict=True))}: {median:,.0f} steps/s")
    facts = machine.facts()
    path = config.out / f"{machine.slug()}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} | facts)
    print("wrote", path)
    return 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(ScalingConfig)))
