"""Two ranks are one run: the same parameters and statistics as one process, in float64, and checkpoints of either.

One pair of processes does everything of rank_worlds.py; the tests look at what it came to.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_worlds import CONTROL, LANGUAGE, QUIET

from ppo_fast import cli
from ppo_fast.trainer import control, distributed
from ppo_fast.trainer.config import ControlConfig
from ppo_fast.trainer.ddpg_config import DDPGConfig
from ppo_fast.trainer.distributed import Ranks
from ppo_fast.trainer.errors import UserError
from ppo_fast.trainer.language.config import LanguageConfig

HERE = Path(__file__).parent
CASES = [f"control {name}" for name in CONTROL] + [f"language {name}" for name in LANGUAGE]
CASES += [f"{trainer} resumed {how}" for trainer in ("control", "language") for how in ("alone", "together")]
CASES.append("observation statistics")


def environment(**changes: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name not in distributed.VARIABLES}
    return {**ours, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1", **changes}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start(args: list[str], rank: int, size: int, port: str, **changes: str) -> subprocess.Popen:
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(**variables, MASTER_PORT=port, **changes),
    )  # fmt: skip


def together(args: list[str], size: int = 2, **changes: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each rank."""
    port = free_port()
    ranks = [start(args, rank, size, port, **changes) for rank in range(size)]
    try:
        outputs = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


of_ranks = pytest.mark.xdist_group("ranks")  # the pair of processes runs once


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for code, out, errors in together([str(HERE / "rank_worlds.py"), str(folder)]):
        assert code == 0, out + errors[-3000:]
    return torch.load(folder / "found.pt", weights_only=False)


def assert_close(one, two, where, tolerance=1e-11):
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_close(one[key], two[key], f"{where} {key}", tolerance)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_close(a, b, f"{where} {i}", tolerance)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(two, one, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")
    else:
        assert math.isclose(one, two, rel_tol=tolerance, abs_tol=tolerance) or (one != one and two != two), (
            where,
            one,
            two,
        )


@of_ranks
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_run(found, case):
    one, two = found[case]
    assert_close(one, two, case)


@of_ranks
def test_every_case_ran(found):
    assert found.keys() == set(CASES)


# --- the command line -------------------------------------------------------------------------------------------------

TRAIN = [
    "-m",
    "ppo_fast.cli",
    "train",
    "control",
    "--no-tensorboard",
    "--no-plot",
    "--no-progress",
    "--num-steps",
    "16",
]


def test_a_dead_rank_stops_the_others_and_the_run_resumes(tmp_path):
    """Rank 1 is killed in its 40th step. The other ends with one line, and one process finishes what is there."""
    run = str(tmp_path / "run")
    args = [*TRAIN, "--env-id", "rank_worlds:Deadly-v0", "--num-envs", "4", "--total-timesteps", "640", "--run-dir", run,
            "--checkpoint-seconds", "0"]  # fmt: skip
    (code, _, errors), (dead, _, _) = together(args, DEADLY_RANK="1")
    assert dead == -9 and code == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("ppo-fast")]
    assert "rank 0 lost the others" in line and "--resume" in line
    done = subprocess.run(
        [sys.executable, *args, "--resume"], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout and "at step 128" in done.stdout  # 2 iterations of 4 x 16 were whole
    rows = (tmp_path / "run" / "progress.csv").read_text().splitlines()
    assert [int(row.split(",")[1]) for row in rows[1:]] == list(range(1, 11))


@pytest.mark.slow
def test_torchrun_restarts_a_run_at_its_checkpoint(tmp_path):
    """A rank dies in every 40th step; each restart goes on where the last checkpoint stood, to the end."""
    run, torchrun = tmp_path / "run", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [*TRAIN[2:], "--env-id", "rank_worlds:Deadly-v0", "--num-envs", "4", "--total-timesteps", "320", "--resume"]
    done = subprocess.run(
        [sys.executable, *torchrun, "--max-restarts", "4", "-m", "ppo_fast.cli", *args, "--run-dir", str(run),
         "--checkpoint-seconds", "0"],
        env=environment(DEADLY_RANK="1"), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("rank 0 lost the others") >= 2 and "at step 128" in done.stdout
    rows = (run / "progress.csv").read_text().splitlines()
    assert [int(row.split(",")[1]) for row in rows[1:]] == list(range(1, 6))


def test_an_error_of_one_rank_is_printed_once(tmp_path):
    args = [*TRAIN, "--env-id", "rank_worlds:Deadly-v0", "--num-envs", "4", "--run-dir", str(tmp_path / "run")]
    results = together(args, DEADLY_RANK="0", DEADLY_HOW="raise")
    assert [code for code, _, _ in results] == [2, 2]
    lines = [line for _, _, errors in results for line in errors.splitlines() if line.startswith("ppo-fast")]
    assert len(lines) == 1 and "rank 0: environment rank_worlds:Deadly-v0 failed in a step" in lines[0], lines


def test_ranks_started_differently(tmp_path):
    port = free_port()
    runs = [
        start([*TRAIN, "--run-dir", str(tmp_path / "run"), "--seed", str(rank)], rank, 2, port) for rank in range(2)
    ]
    errors = "".join(run.communicate(timeout=120)[1] for run in runs)
    assert "configuration: expected the same on every rank" in errors
    assert [run.returncode for run in runs] == [2, 2] and not (tmp_path / "run").exists()


# --- in one process ---------------------------------------------------------------------------------------------------


def test_half_of_torchruns_variables(tmp_path, monkeypatch, capsys):
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([*TRAIN[2:], "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "WORLD_SIZE without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in line
    assert "torchrun --nproc-per-node" in line and "unset WORLD_SIZE" in line


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, "RANK: expected an integer >= 0"),
        ({"RANK": "2"}, "RANK: expected less than WORLD_SIZE = 2, got 2"),
        ({"MASTER_PORT": ""}, "WORLD_SIZE without MASTER_PORT"),
    ],
)
def test_wrong_variables(monkeypatch, variables, message):
    right = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**right, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), distributed.joined(ControlConfig(**QUIET)):
        pass


def test_what_does_not_divide_names_its_field():
    ranks = distributed.Ranks(1, 3)
    with pytest.raises(UserError, match=r"^--num-envs: expected a multiple of the 3 ranks, got 4$"):
        ranks.local(ControlConfig(), "num_envs")
    config = LanguageConfig(algorithm="grpo", num_responses=512)
    message = r"^--num-responses: expected a multiple of the 3 ranks times 4 to a prompt, got 512$"
    with pytest.raises(UserError, match=message):
        ranks.local(config, "num_responses", config.group)
    assert ranks.local(ControlConfig(num_envs=6), "num_envs").num_envs == 2


def test_devices_of_ranks(monkeypatch):
    ranks = distributed.Ranks(3, 4, local_rank=3)
    with pytest.raises(UserError, match=r"--device: expected cuda with 4 ranks, of which each takes one, got cuda:1"):
        ranks.local(ControlConfig(device="cuda:1"), "num_envs")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"--device: expected a GPU for each rank .* found 2 .* --nproc-per-node 2"):
        ranks.local(ControlConfig(device="cuda"), "num_envs")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert ranks.local(ControlConfig(device="cuda"), "num_envs").device == "cuda:3"


def test_other_versions_on_another_node():
    distributed.check_versions("WORLD_SIZE", "far", distributed.versions())
    here = distributed.versions()["numpy"]
    message = (
        rf"^WORLD_SIZE: expected numpy {here} as here on every node, got 0.1 on far; there: pip install numpy=={here}$"
    )
    with pytest.raises(UserError, match=message):
        distributed.check_versions("WORLD_SIZE", "far", {**distributed.versions(), "numpy": "0.1"})


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_a_partition(size):
    """The parts of the ranks are the minibatch, each in its own numbering of [T, N]."""
    steps, envs = 5, 6
    order = torch.randperm(steps * envs)
    for part, whole in enumerate(order.tensor_split(4)):
        rebuilt = []
        for rank in range(size):
            ranks = distributed.Ranks(rank, size)
            mine, shares = ranks.shares(order, 4, envs)
            block = torch.arange(steps * envs).view(steps, envs)[:, ranks.block(envs)].reshape(-1)
            rebuilt += block[mine[part]].tolist()
            assert shares[part] == len(mine[part]) / len(whole)
            assert len(mine[part]) <= ranks.most(whole % envs, envs)
        assert sorted(rebuilt) == sorted(whole.tolist())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ControlConfig(recurrent="gru"), "--recurrent: expected none on 2 ranks, got gru"),
        (ControlConfig(rollout_policy="pruned"), "--rollout-policy: expected full on 2 ranks, got pruned"),
        (DDPGConfig(env_id="Pendulum-v1"), "--algorithm: expected ppo on 2 ranks, got ddpg"),
    ],
)
def test_what_one_process_trains_is_refused_on_more(config, message):
    with pytest.raises(UserError, match=message):
        control.Trainer(config, None, Ranks(0, 2))
