"""One seed is one run, and a run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from rich.console import Console
from trainer_worlds import Guess, Push, Walk

from ppo_fast.trainer import checkpoint
from ppo_fast.trainer.control import ControlConfig, Trainer, train
from ppo_fast.trainer.envs import ReplayEnv

QUIET = {"tensorboard": False, "plot": False, "progress": False}
SMALL = {"num_envs": 3, "num_steps": 20, "total_timesteps": 480, "hidden_sizes": (8,), "learning_rate": 1e-2, **QUIET}


def masked_guess():
    return Guess((3, 2), masked=True)


def assert_equal_states(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"timing"}:
            assert_equal_states(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_states(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


VARIANTS = [
    (Walk, {}),
    (Walk, {"autoreset": "next_step", "target_kl": 0.01}),
    (Walk, {"autoreset": "next_step", "vectorization": "async"}),
    (Push, {"vectorization": "async", "normalize_observations": True, "normalize_rewards": True}),
    (Push, {"autoreset": "next_step", "normalize_observations": True, "normalize_rewards": True}),
    (masked_guess, {"autoreset": "next_step"}),
    (masked_guess, {"vectorization": "async"}),
    (Walk, {"recurrent": "lstm", "num_minibatches": 3}),
    (Walk, {"recurrent": "gru", "autoreset": "next_step", "sequence_length": 7}),
    (Push, {"recurrent": "lstm", "vectorization": "async", "num_minibatches": 2, "normalize_observations": True}),
]


@pytest.mark.parametrize(("make_env", "changes"), VARIANTS)
def test_state_of_a_trainer_goes_into_a_fresh_one_at_every_iteration(make_env, changes, tmp_path):
    config = ControlConfig(**{**SMALL, **changes})
    straight = Trainer(config, make_env)
    logs, states = [], []
    for _ in range(6):
        episodes, row = straight.iterate()
        logs.append((episodes, {k: v for k, v in row.items() if k != "steps_per_second"}))
        checkpoint.save(tmp_path / f"{len(states)}.pt", straight.state_dict())
        states.append(straight.state_dict())
    straight.close()
    for at in (0, 2, 4):
        resumed = Trainer(config, make_env)
        resumed.iterate()  # a used one: everything must be put back
        assert resumed.load_state_dict(checkpoint.load(tmp_path / f"{at}.pt"))
        for i in range(at + 1, 6):
            episodes, row = resumed.iterate()
            del row["steps_per_second"]
            assert (episodes, row) == logs[i] or np.isnan(row["explained_variance"])
            assert_equal_states(resumed.state_dict(), states[i])
        resumed.close()


def test_one_seed_is_one_run_and_another_seed_another(tmp_path):
    results = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = ControlConfig(run_dir=str(tmp_path / name), seed=seed, **SMALL)
        train(config, make_env=Walk, console=Console(quiet=True))
        state = checkpoint.load(tmp_path / name / "checkpoint.pt")
        results[name] = (state["parameters"], (tmp_path / name / "episodes.csv").read_text())
    assert results["a"][1] == results["b"][1] != results["c"][1]
    assert_equal_states(results["a"][0], results["b"][0])
    assert not torch.equal(results["a"][0]["actor.0.weight"], results["c"][0]["actor.0.weight"])


def test_the_global_generators_are_put_back():
    state = None
    draws = []
    for _ in range(2):
        if state is None:
            state = checkpoint.global_rng_state()
        else:
            checkpoint.set_global_rng_state(state)
        np.random.normal()  # leaves a cached second normal behind
        draws.append((random.random(), float(np.random.normal()), float(torch.rand(()))))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "Hopper-v5"])
def test_replay_brings_back_gymnasium_environments_bit_for_bit(env_id):
    if env_id == "Hopper-v5":
        pytest.importorskip("mujoco")
    a = ReplayEnv(gym.make(env_id), 7, 3)
    a.action_space.seed(0)
    a.reset()
    steps = 0
    while steps < 60 or not a.replay_state()[1].size:  # several episodes, and not right after a reset
        _, _, terminated, truncated, _ = a.step(a.action_space.sample())
        steps += 1
        if terminated or truncated:
            a.reset()
    b = ReplayEnv(gym.make(env_id), 7, 3)
    b.reset()
    b.arm_restore([None, None, None, a.replay_state()])
    b.step(b.action_space.sample())
    for _ in range(30):
        action = a.action_space.sample()
        (obs_a, *rest_a), (obs_b, *rest_b) = a.step(action), b.step(action)
        np.testing.assert_array_equal(obs_a, obs_b)
        assert rest_a[:3] == rest_b[:3]
        if rest_a[1] or rest_a[2]:
            np.testing.assert_array_equal(a.reset()[0], b.reset()[0])


def test_replay_uses_the_actions_that_were_given_not_what_became_of_them():
    class Scribbler(Push):
        def step(self, action):
            transition = super().step(action)
            action *= 0.0
            return transition

    env = ReplayEnv(Scribbler(limit=50), 7, 0)
    env.reset()
    buffer = np.zeros(2, np.float32)
    for value in (0.1, 0.2, 0.3):
        buffer[:] = value  # one buffer for all steps
        last = env.step(buffer)[0]
    np.testing.assert_allclose(env.replay_state()[1], [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]], rtol=1e-6)
    env.arm_restore([env.replay_state()])
    np.testing.assert_array_equal(env.step(buffer)[0], last)


COMMAND = [
    sys.executable, "-m", "ppo_fast.cli", "train", "control", "--env-id", "CartPole-v1", "--total-timesteps", "40960",
    "--hidden-sizes", "16", "--checkpoint-seconds", "0", "--no-plot", "--num-minibatches", "2", "--update-epochs", "2",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [*COMMAND, "--run-dir", str(folder), "--resume", *flags]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def step_of(folder: Path) -> int:
    path = folder / "checkpoint.pt"
    return checkpoint.load(path)["now"]["global_step"] if path.exists() else 0


def wait_for_checkpoint(process: subprocess.Popen, folder: Path, after: int) -> None:
    for _ in range(3000):
        if step_of(folder) > after or process.poll() is not None:
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint in a minute")


def test_killed_at_random_moments_and_resumed_is_as_if_never_killed(tmp_path):
    chance = random.Random(os.getpid())
    reference = start(tmp_path / "straight")
    killed, kills = tmp_path / "killed", 0
    for _ in range(3):
        before = step_of(killed)
        process = start(killed, "--no-tensorboard")
        wait_for_checkpoint(process, killed, before)
        time.sleep(chance.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert before < step_of(killed)  # also: what a kill leaves is always a whole checkpoint
    assert kills >= 2
    output, _ = start(killed, "--no-tensorboard").communicate(timeout=120)
    assert "resuming" in output
    assert reference.communicate(timeout=120) and reference.returncode == 0
    a, b = (checkpoint.load(folder / "checkpoint.pt") for folder in (tmp_path / "straight", killed))
    for state in (a, b):
        del state["logs"]["progress"]  # has a column of speeds
        for name in ("run_dir", "tensorboard"):
            del state["config"][name]
    assert a["now"]["global_step"] == 40960
    assert_equal_states(a, b)
    assert (tmp_path / "straight" / "episodes.csv").read_bytes() == (killed / "episodes.csv").read_bytes()
    assert not list(killed.glob(".*.tmp"))
    rows = [(folder / "progress.csv").read_text().splitlines() for folder in (tmp_path / "straight", killed)]
    assert [r.rsplit(",", 1)[0] for r in rows[0]] == [r.rsplit(",", 1)[0] for r in rows[1]]


def test_ctrl_c_saves_says_how_to_resume_and_exits_with_130(tmp_path):
    folder = tmp_path / "run with space"
    process = start(folder, "--no-tensorboard", "--checkpoint-seconds", "1e9", "--total-timesteps", "400000")
    for _ in range(1500):
        if (
            (folder / "progress.csv").exists() and (folder / "progress.csv").stat().st_size
        ) or process.poll() is not None:
            break
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert f"--run-dir '{folder}' --resume" in output
    assert 0 < step_of(folder) < 400000
