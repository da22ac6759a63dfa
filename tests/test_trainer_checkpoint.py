"""Files that are whole or absent, and checkpoints that cannot run code."""

from __future__ import annotations

import builtins
import errno
import os
import pickle

import pytest
import torch
from trainer_worlds import Walk

from ppo_fast.trainer import checkpoint
from ppo_fast.trainer.control import ControlConfig, UserError, train
from ppo_fast.trainer.rundir import CsvLog, claim

QUICK = {
    "num_envs": 2, "num_steps": 16, "total_timesteps": 160, "hidden_sizes": (4,), "tensorboard": False, "plot": False,
    "progress": False, "checkpoint_seconds": 0.0,
}  # fmt: skip


@pytest.fixture
def finished(tmp_path, quiet):
    config = ControlConfig(run_dir=str(tmp_path / "run"), **QUICK)
    train(config, make_env=Walk, console=quiet)
    return tmp_path / "run"


@pytest.fixture
def quiet():
    from rich.console import Console

    return Console(quiet=True)


def resume(folder, quiet, **changes):
    config = ControlConfig(**{**QUICK, "run_dir": str(folder), "resume": True, **changes})
    return train(config, make_env=Walk, console=quiet)


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_is_saved_is_plain_data(finished):
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    allowed = (dict, list, tuple, str, int, float, bool, type(None), torch.Tensor)

    def walk(x):
        assert type(x) in allowed, type(x)
        for y in x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ():
            walk(y)

    walk(state)
    assert state["now"]["global_step"] == 160


def test_every_truncation_and_every_flipped_byte_is_noticed(finished, quiet):
    path = finished / "checkpoint.pt"
    whole = path.read_bytes()
    before = files(finished)
    generator = torch.Generator().manual_seed(0)
    cuts = [0, 1, 100, len(whole) // 2, len(whole) - 1]
    damaged = [whole[:cut] for cut in cuts]
    for _ in range(25):
        at = int(torch.randint(len(whole), (), generator=generator))
        damaged.append(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            state = checkpoint.load(path)
        except UserError as error:
            assert "expected a checkpoint" in str(error)
            assert "\n" not in str(error)
            refused += 1
        else:  # padding between the members of the archive carries nothing
            assert_same(state, torch_load(whole))
    assert refused > len(cuts) + 10
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"checkpoint\.pt: expected a checkpoint of ppo_fast, got a damaged"):
        resume(finished, quiet)
    path.write_bytes(whole)
    assert files(finished) == before


def torch_load(data):
    import io

    return torch.load(io.BytesIO(data), weights_only=True)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


class Bomb:
    def __reduce__(self):
        return builtins.exec, ("import pathlib; pathlib.Path('exploded').write_text('')",)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_code_in_a_checkpoint_does_not_run(finished, quiet, how, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = finished / "checkpoint.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"format": "ppo_fast.control", "version": 2, "config": Bomb()}, path)
    with pytest.raises(UserError, match="damaged or foreign"):
        resume(finished, quiet)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "state",
    [
        {"weights": torch.zeros(3)},
        torch.zeros(3),
        {"format": "ppo_fast.control", "version": 99},
        {"format": "ppo_fast.control", "version": 2},
    ],
)
def test_foreign_checkpoints_are_named(finished, quiet, state):
    torch.save(state, finished / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt: expected"):
        resume(finished, quiet)


@pytest.mark.parametrize("missing", ["parameters", "optimizer", "generator", "envs", "logs", "now", "collector"])
def test_incomplete_checkpoints_are_named(finished, quiet, missing):
    path = finished / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state[missing]
    torch.save(state, path)
    with pytest.raises(UserError, match=rf"checkpoint\.pt: expected .*{missing}"):
        resume(finished, quiet)


def test_resume_refuses_a_changed_configuration_and_touches_nothing(finished, quiet):
    before = files(finished)
    with pytest.raises(
        UserError, match=r"--resume: .*--learning-rate: 0.00025 -> 0.1; --hidden-sizes: \(4,\) -> \(5,\)"
    ):
        resume(finished, quiet, learning_rate=0.1, hidden_sizes=(5,))
    assert files(finished) == before
    assert resume(finished, quiet, plot=True).finished  # what does not change learning may change


def test_logs_shorter_than_the_checkpoint_are_named(finished, quiet):
    (finished / "episodes.csv").write_text("global_step\n")
    with pytest.raises(UserError, match=r"episodes\.csv: expected the \d+ bytes"):
        resume(finished, quiet)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.write_atomic(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomic(path, b"new")
    assert files(tmp_path) == {"checkpoint.pt": b"old"}


def test_a_log_reopened_at_an_offset_drops_what_came_after_it(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, ("a", "b"))
    log.rows([(1, 0.1)])
    offset = log.sync()
    log.rows([(2, float("nan")), (3, 1e-9)])
    log.sync()
    log.close()
    assert path.read_text() == "a,b\n1,0.1\n2,nan\n3,1e-09\n"
    log = CsvLog(path, ("a", "b"), offset)
    log.rows([(4, 2.0)])
    log.close()
    assert path.read_text() == "a,b\n1,0.1\n4,2\n"
    log = CsvLog(path, ("a", "b"))  # no checkpoint: from the beginning
    log.close()
    assert path.read_text() == "a,b\n"


def test_a_second_run_takes_a_new_folder_and_a_running_one_is_locked(finished, quiet):
    before = files(finished)
    for number in (2, 3):
        result = train(ControlConfig(run_dir=str(finished), **QUICK), make_env=Walk, console=quiet)
        assert result.run_dir == finished.with_name(f"run-{number}")
    assert files(finished) == before
    config = ControlConfig(run_dir=str(finished), resume=True, **QUICK)
    with claim(config), pytest.raises(UserError, match="in use by another running process"), claim(config):
        pass


def test_resume_without_a_checkpoint_starts_over_but_never_in_a_foreign_folder(finished, quiet, tmp_path):
    (finished / "checkpoint.pt").unlink()  # as if killed before the first one
    (finished / "progress.csv").write_text("half a li")
    assert resume(finished, quiet).global_step == 160
    assert resume(tmp_path / "new", quiet).global_step == 160
    assert (tmp_path / "new" / "config.json").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "episodes.csv").write_text("mine")
    with pytest.raises(UserError, match="--resume: expected the folder of a run"):
        resume(foreign, quiet)
    assert files(foreign) == {"episodes.csv": b"mine"}
