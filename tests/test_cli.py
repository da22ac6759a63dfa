"""The command line: help teaches, mistakes are one line and exit code 2, nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from ppo_fast import cli
from ppo_fast.trainer.config import ControlConfig, dumps, from_dict, load_fields, to_dict
from ppo_fast.trainer.presets import PRESETS, preset

TINY = [
    "--num-envs", "2", "--num-steps", "16", "--total-timesteps", "128", "--hidden-sizes", "4", "--no-tensorboard",
]  # fmt: skip


def run(capsys, *args: str) -> tuple[int, str, str]:
    try:
        code = cli.main(list(args))
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def assert_one_line(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2
    assert err.startswith("ppo-fast: error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_training_leaves_what_it_promises(capsys, tmp_path):
    code, out, err = run(capsys, "train", "control", "--env-id", "CartPole-v1", "--run-dir", "out/run", *TINY)
    assert (code, err) == (0, "")
    names = {p.name for p in (tmp_path / "out" / "run").iterdir()}
    assert names == {"checkpoint.pt", "config.json", "curve.png", "episodes.csv", "progress.csv", ".lock"}
    assert (tmp_path / "out/run/curve.png").read_bytes().startswith(b"\x89PNG")
    assert "no (gymnasium asks for 475)" in out
    for word in ("steps per second", "rollout", "advantage", "update", "mean return", "checkpoint.pt"):
        assert word in out
    assert "\x1b" not in out  # not a terminal: no control codes
    assert "step 128/128 (100%)" in out
    rows = (tmp_path / "out/run/progress.csv").read_text().splitlines()
    assert rows[0].startswith("global_step,iteration,episodes,mean_return,learning_rate,policy_loss")
    assert len(rows) == 1 + 4

    before = {p.name: p.read_bytes() for p in (tmp_path / "out" / "run").iterdir()}
    code, out, _ = run(capsys, "train", "control", "--env-id", "CartPole-v1", "--run-dir", "out/run", *TINY)
    assert code == 0
    assert "run is taken" in out
    assert "out/run-2" in out
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out" / "run").iterdir()}

    code, out, _ = run(
        capsys, "train", "control", "--run-dir", "out/run", "--resume"
    )  # the config comes from the folder
    assert code == 0
    assert "resuming out/run at step 128" in out


def test_tensorboard_has_the_scalars(capsys, tmp_path):
    args = [a for a in TINY if a != "--no-tensorboard"]
    assert run(capsys, "train", "control", "--run-dir", "run", "--no-plot", *args)[0] == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"charts/mean_return", "losses/approx_kl", "losses/entropy"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("losses/entropy")] == [32, 64, 96, 128]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--env-id", "Nowhere-v0"], ["--env-id", "Nowhere-v0"]),
        (["--env-id", "no_such_module:Env-v0"], ["--env-id", "no_such_module"]),
        (["--env-id", ""], ["--env-id"]),
        (["--learning-rate", "nan"], ["--learning-rate", "finite number > 0", "nan"]),
        (["--learning-rate", "-1"], ["--learning-rate", "-1"]),
        (["--learning-rate", "abc"], ["--learning-rate", "abc"]),
        (["--gamma", "1.5"], ["--gamma", ">= 0 and <= 1", "1.5"]),
        (["--gae-lambda", "inf"], ["--gae-lambda", "inf"]),
        (["--clip-coef", "0"], ["--clip-coef", "> 0"]),
        (["--num-envs", "0"], ["--num-envs", ">= 1", "0"]),
        (["--num-envs", "2.5"], ["--num-envs", "2.5"]),
        (["--num-minibatches", "1000"], ["--num-minibatches", "at most", "512"]),
        (["--total-timesteps", "100"], ["--total-timesteps", "512", "100"]),
        (["--hidden-sizes", "8", "-1"], ["--hidden-sizes", "-1"]),
        (["--target-kl", "0"], ["--target-kl"]),
        (["--autoreset", "never"], ["--autoreset", "never", "same_step", "next_step"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--lerning-rate", "1"], ["--lerning-rate", "--learning-rate"]),
        (["--config", "missing.json"], ["missing.json"]),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(capsys, tmp_path, flags, parts):
    assert_one_line(run(capsys, "train", "control", *flags), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["fly"], ["train"], ["train", "rockets"], ["doctor", "--deeper"]])
def test_unknown_commands(capsys, args):
    assert_one_line(run(capsys, *args), "expected", args[-1])


@pytest.mark.skipif(util.find_spec("mujoco") is not None, reason="mujoco is installed here")
def test_mujoco_missing(capsys):
    assert_one_line(run(capsys, "train", "control", "--env-id", "Hopper-v5"), "ppo_fast[mujoco]")


def test_mujoco_missing_is_named_where_it_is_installed_too(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)  # import raises ImportError
    for name in [n for n in sys.modules if n.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    assert_one_line(run(capsys, "train", "control", "--env-id", "Hopper-v5"), "ppo_fast[mujoco]", "Hopper-v5")


@pytest.mark.parametrize("package", ["tyro", "tensorboard", "matplotlib"])
def test_a_missing_package_is_named_before_training(capsys, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert_one_line(
        run(capsys, "train", "control", "--run-dir", "run"), f"{package} is not installed", "ppo_fast[control]"
    )
    assert list(tmp_path.iterdir()) == []


def test_run_dir_that_is_a_file_or_inside_one(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in ("file", "file/below"):
        assert_one_line(run(capsys, "train", "control", "--run-dir", path, *TINY), "--run-dir", "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_is_named_and_leaves_no_half_checkpoint(tmp_path):
    """Files may grow to 20 kB: the logs fit, the checkpoint does not."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from ppo_fast.cli import main; sys.exit(main())"
    )
    args = ["train", "control", "--run-dir", "run", "--no-tensorboard", "--total-timesteps", "1024"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, *args], env=environment, capture_output=True, text=True)
    assert_one_line((done.returncode, done.stdout, done.stderr), "--run-dir", "File too large")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", ".lock", "episodes.csv", "progress.csv"}


def test_broken_environment_is_one_line_in_a_real_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    args = [sys.executable, "-m", "ppo_fast.cli", "train", "control", "--env-id", "trainer_worlds:BrokenRaise-v0"]
    flags = ["--vectorization", "async", "--run-dir", "run", "--no-tensorboard", "--num-envs", "2", "--no-progress"]
    done = subprocess.run([*args, *flags], env=environment, capture_output=True, text=True)
    assert_one_line((done.returncode, done.stdout, done.stderr), "the motor is on fire", "BrokenRaise-v0")


def test_presets_fill_in_and_flags_and_files_win(tmp_path):
    assert cli._defaults(["--env-id", "Pendulum-v1"]) == preset("Pendulum-v1")
    assert cli._defaults(["--env-id=Hopper-v5"]).normalize_observations
    (tmp_path / "c.json").write_text(json.dumps({"env_id": "Pendulum-v1", "gamma": 0.5}))
    config = cli._defaults(["--config", "c.json"])
    assert config == dataclasses.replace(preset("Pendulum-v1"), gamma=0.5)
    assert cli._without_config(["--seed", "3", "--config", "c.json", "--gamma", "1"]) == ["--seed", "3", "--gamma", "1"]
    for env_id in PRESETS:
        assert preset(env_id).env_id == env_id


def test_config_files_go_round_and_bad_ones_are_named(capsys, tmp_path):
    config = dataclasses.replace(preset("Pendulum-v1"), hidden_sizes=(3, 4), target_kl=0.02)
    path = tmp_path / "c.json"
    path.write_text(dumps(config))
    assert from_dict(load_fields(path), "c.json") == config
    assert from_dict(to_dict(config), "c.json") == config
    for text, part in (
        ("{", "JSON"),
        ("[]", "list"),
        ('{"format": "else"}', "else"),
        ('{"gama": 1}', "gama"),
        ('{"gamma": "high"}', "high"),
        ('{"gamma": null}', "None"),
        ('{"env_id": 3}', "3"),
        ('{"anneal_lr": 1}', "--anneal-lr"),
    ):
        path.write_text(text)
        assert_one_line(run(capsys, "train", "control", "--config", "c.json"), "c.json", part)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json"]


def test_help_explains_every_flag(capsys):
    code, out, _ = run(capsys, "train", "control", "--help")
    assert code == 0
    text = "".join(out.split())
    for field in dataclasses.fields(ControlConfig):
        assert "--" + field.name.replace("_", "-") in text
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert {"train control", "bench", "doctor"} <= {line.strip().split("  ")[0] for line in out.splitlines()}
    assert run(capsys, "train", "--help")[0] == 0


def test_doctor_says_what_is_here(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in ("python", "torch", "numpy", "gymnasium", "threads", "reference"):
        assert word in out


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m ppo_fast.cli train language --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.startswith("usage:") and "Traceback" not in done.stderr, done.stderr
