"""`ppo-fast tune`: spaces are checked, samplers and pruners do what they say, and a study outlives whatever happens."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import assert_one_line, run
from test_trainer_resume import assert_equal_states

from ppo_fast.trainer import checkpoint, trial
from ppo_fast.trainer.config import ControlConfig
from ppo_fast.trainer.control import train
from ppo_fast.trainer.ddpg_config import DDPGConfig
from ppo_fast.trainer.errors import UserError
from ppo_fast.trainer.language.config import LanguageConfig
from ppo_fast.trainer.search import parse

optuna = pytest.importorskip("optuna")

BASE = [
    "--env-id", "trainer_worlds:Walk-v0", "--num-envs", "2", "--total-timesteps", "640", "--hidden-sizes", "4",
    "--no-tensorboard",
]  # fmt: skip
SPACE = ["--search", "learning_rate=log:1e-3:1e-1", "num_steps=16,32"]
TUNE = ["tune", "control", *BASE, "--study", "s"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table(folder="s"):
    with open(Path(folder) / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def small(folder, **changes):
    """A run like those of BASE."""
    fields = {"env_id": "trainer_worlds:Walk-v0", "num_envs": 2, "num_steps": 16, "total_timesteps": 640}
    quiet = {"hidden_sizes": (4,), "tensorboard": False, "plot": False, "progress": False}
    return ControlConfig(run_dir=str(folder), **{**fields, **quiet, **changes})


# The space.


@pytest.mark.parametrize(
    ("spec", "config", "expected"),
    [
        ("learning_rate=log:1e-4:1e-2", ControlConfig(), (float, (), 1e-4, 1e-2, True)),
        ("--clip-coef=0.1:0.3", ControlConfig(), (float, (), 0.1, 0.3, False)),
        ("num_steps=64:1e3", ControlConfig(), (int, (), 64, 1000, False)),
        ("num_steps=64,128", ControlConfig(), (int, (64, 128), 0, 0, False)),
        ("target_kl=none,0.01", ControlConfig(), (type(None), (None, 0.01), 0, 0, False)),
        ("target_kl=0.01:0.02", ControlConfig(), (float, (), 0.01, 0.02, False)),
        ("anneal_lr=true,False", ControlConfig(), (bool, (True, False), 0, 0, False)),
        ("hidden_sizes=8,64x64", ControlConfig(), (tuple, ("8", "64x64"), 0, 0, False)),
        ("noise=ou,gaussian", DDPGConfig(), (str, ("ou", "gaussian"), 0, 0, False)),
        ("algorithm=ppo,grpo", LanguageConfig(), (str, ("ppo", "grpo"), 0, 0, False)),
    ],
)
def test_specs_are_read_by_the_type_of_the_field(spec, config, expected):
    (dim,) = parse([spec], config)
    assert (dim.kind, dim.choices, dim.low, dim.high, dim.log) == expected
    assert type(dim.low) is type(expected[2])
    for choice in dim.choices:
        value = dim.field_value(choice)
        assert value == ((tuple(map(int, choice.split("x")))) if dim.kind is tuple else choice)
        dataclasses.replace(config, **{dim.name: value})  # the configuration takes it


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("lerning_rate=1:2", ["ControlConfig", "'lerning_rate'", "the nearest is learning_rate"]),
        ("config.clip_low=0.1:0.3", ["'config.clip_low'", "the nearest is clip_coef"]),
        ("learning_rate", ["field=a,b,c"]),
        ("learning_rate=", ["field=a,b,c"]),
        ("learning_rate=0:0.1", ["--learning-rate: expected a finite number > 0, got 0"]),
        ("learning_rate=log:1e-2:1e-4", ["low < high"]),
        ("learning_rate=log:1e-2", ["low:high"]),
        ("learning_rate=1e-4:1e-3:1e-2", ["low:high"]),
        ("learning_rate=a:b", ["a number", "'a'"]),
        ("learning_rate=nan:1", ["nan"]),
        ("entropy_coef=log:-1:1", ["low > 0", "logarithmic"]),
        ("num_steps=16.5,32", ["an integer", "'16.5'"]),
        ("num_steps=0,32", ["--num-steps", ">= 1"]),
        ("num_steps=32", ["two or more different values"]),
        ("num_steps=32,32", ["two or more different values"]),
        ("anneal_lr=0,1", ["true or false", "'0'"]),
        ("anneal_lr=log:0:1", ["values a,b,c", "not a number"]),
        ("autoreset=same_step,never", ["--autoreset", "never"]),
        ("hidden_sizes=8,x8", ["64x64", "'x8'"]),
        ("hidden_sizes=8,0x8", ["--hidden-sizes"]),
        ("gamma=0.9:1.5", ["--gamma", "1.5"]),
        ("seed=1,2", ["what is learned", "seed"]),
        ("plot=true,false", ["what is learned", "plot"]),
    ],
)
def test_bad_specs_are_one_line(spec, parts):
    with pytest.raises(UserError) as caught:
        parse([spec], ControlConfig())
    message = str(caught.value)
    assert message.startswith("--search") and "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([], ["--search", "at least one field"]),
        (["--search", "gamma=0.9,0.99", "gamma=0.5,0.6"], ["gamma twice"]),
        (["--search", "lerning_rate=1:2"], ["'lerning_rate'", "the nearest is learning_rate"]),
        (["--search", "gamma=0.9:1.5"], ["--search gamma=0.9:1.5: --gamma: expected", "1.5"]),
        (["--search", "gamma=0.9:0.99", "--sampler", "grid"], ["gamma=0.9:0.99", "a,b,c", "grid"]),
        (["--search", "gamma=0.9,0.99", "--sampler", "cma"], ["--sampler", "cma", "tpe"]),
        (["--search", "gamma=0.9,0.99", "--trials", "0"], ["--trials", ">= 1"]),
        (["--search", "gamma=0.9,0.99", "--jobs", "x"], ["--jobs", "x"]),
        (["--search", "gamma=0.9,0.99", "--run-dir", "r"], ["--run-dir", "--study"]),
        (["--search", "gamma=0.9,0.99", "--resume"], ["--resume", "--study"]),
        (["--search", "gamma=0.9,0.99", "--lerning-rate", "1"], ["--lerning-rate", "--learning-rate"]),
        (["--search", "gamma=0.9,0.99", "--gamma", "2"], ["--gamma", "2"]),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(capsys, tmp_path, flags, parts):
    assert_one_line(run(capsys, "tune", "control", *flags), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["optuna", "matplotlib"])
def test_a_missing_package_is_named(capsys, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert_one_line(run(capsys, *TUNE, *SPACE), f"{package} is not installed", 'pip install "ppo_fast[tune]"')
    assert list(tmp_path.iterdir()) == []


def test_help_teaches(capsys):
    for trainer in ("control", "language"):
        code, out, _ = run(capsys, "tune", trainer, "--help")
        assert code == 0
        for word in ("--search", "--trials", "--sampler", "--pruner", "--seeds", "--jobs", "--study", "log:low:high"):
            assert word in out


# A study.


def test_a_study_leaves_what_it_promises_goes_on_and_its_best_can_be_trained(capsys, tmp_path):
    code, out, _ = run(capsys, *TUNE, *SPACE, "--trials", "3", "--jobs", "2")
    assert code == 0
    names = {"study.db", "trials.csv", "best.json", "parallel.png", "importances.png"}
    assert {p.name for p in (tmp_path / "s").iterdir()} - {".lock"} == names
    assert (tmp_path / "s/parallel.png").read_bytes().startswith(b"\x89PNG")
    rows = table()
    assert [r["state"] for r in rows] == ["complete"] * 3
    values = [float(r["mean_return"]) for r in rows]
    assert values == sorted(values, reverse=True)
    assert len({r["learning_rate"] for r in rows}) == 3
    for row in rows:
        assert 1e-3 <= float(row["learning_rate"]) <= 1e-1 and row["num_steps"] in ("16", "32")
    best = json.loads((tmp_path / "s/best.json").read_text())
    assert f"{best['learning_rate']:.6g}" == rows[0]["learning_rate"] and str(best["num_steps"]) == rows[0]["num_steps"]
    assert best["env_id"] == "trainer_worlds:Walk-v0" and best["seed"] == 1
    assert f"best: trial {rows[0]['trial']}" in out and "3 trials: 3 complete, 0 pruned, 0 failed" in out

    # the same study goes on, with trials that are not those again
    code, out, _ = run(capsys, *TUNE, *SPACE, "--trials", "5", "--sampler", "random")
    assert code == 0 and "s has 3 of 5 trials" in out
    assert len({r["learning_rate"] for r in table()}) == 5
    before = (tmp_path / "s/trials.csv").read_bytes()
    assert run(capsys, *TUNE, *SPACE, "--trials", "5")[0] == 0  # nothing left to do
    assert (tmp_path / "s/trials.csv").read_bytes() == before

    # another space, environment, trainer or number of seeds is refused, and nothing of the study changes
    for flags, part in (
        ([*TUNE, "--search", "learning_rate=log:1e-3:1e-2", "num_steps=16,32"], "log:1e-3:1e-1 -> log:1e-3:1e-2"),
        ([*TUNE, *SPACE, "gamma=0.9,0.99"], "--search gamma: none -> 0.9,0.99"),
        ([*TUNE, *SPACE, "--env-id", "CartPole-v1"], "env_id: trainer_worlds:Walk-v0 -> CartPole-v1"),
        ([*TUNE, *SPACE, "--gamma", "0.5"], "gamma: 0.99 -> 0.5"),
        ([*TUNE, *SPACE, "--seeds", "2"], "seeds: 1 -> 2"),
        (
            ["tune", "language", "--study", "s", "--search", "gamma=0.9,1.0"],
            "trainer: ppo_fast.control -> ppo_fast.language",
        ),
    ):
        assert_one_line(run(capsys, *flags), "--study: s holds a study of something else", part, "another --study")
    assert (tmp_path / "s/trials.csv").read_bytes() == before

    # what the table says is what training with best.json gives
    rows = table()
    assert run(capsys, "train", "control", "--config", "s/best.json", "--run-dir", "r", "--no-plot")[0] == 0
    with open(tmp_path / "r/progress.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["mean_return"]) == pytest.approx(float(rows[0]["mean_return"]), rel=1e-5)


def test_a_grid_is_every_combination_once_and_failures_are_rows(capsys, tmp_path):
    """512 minibatches do not fit into the 32 steps of a rollout, which only the combination shows."""
    grid = ["--search", "num_steps=16,32", "num_minibatches=4,64", "--sampler", "grid"]
    code, out, _ = run(capsys, *TUNE, *grid, "--trials", "3")
    assert code == 0 and len(table()) == 3
    code, out, _ = run(capsys, *TUNE, *grid)
    assert code == 0
    rows = table()
    pairs = sorted((int(r["num_steps"]), int(r["num_minibatches"])) for r in rows)
    assert pairs == [(16, 4), (16, 64), (32, 4), (32, 64)]
    failed = [r for r in rows if r["state"] == "failed"]
    assert [(r["num_steps"], r["num_minibatches"]) for r in failed] == [("16", "64")]
    assert "--num-minibatches: expected at most" in failed[0]["error"]
    assert rows[-1] == failed[0] and "1 failed" in out
    code, out, _ = run(capsys, *TUNE, *grid, "--trials", "50")  # there are no more than four
    assert code == 0 and len(table()) == 4
    study = optuna.load_study(study_name="ppo_fast", storage="sqlite:///s/study.db")
    assert len(study.trials) == 4  # nor are any waiting


def test_several_seeds_are_averaged(capsys, tmp_path):
    space = ["--search", "learning_rate=0.01,0.02", "--sampler", "grid"]
    assert run(capsys, *TUNE, *space, "--num-steps", "16", "--seeds", "2", "--seed", "3")[0] == 0
    for row in table():
        means = []
        for seed in (3, 4):
            config = small(
                tmp_path / f"{row['learning_rate']}-{seed}", learning_rate=float(row["learning_rate"]), seed=seed
            )
            means.append(train(config, console=Console(quiet=True)).mean_return)
        assert float(row["mean_return"]) == pytest.approx(sum(means) / 2, rel=1e-5) and means[0] != means[1]


def test_ddpg_and_its_fields(capsys):
    flags = ["--env-id", "Pendulum-v1", "--algorithm", "ddpg", "--total-timesteps", "450", "--learning-starts", "100"]
    space = [
        "--search",
        "tau=0.005:0.05",
        "noise=ou,gaussian",
        "--trials",
        "2",
        "--hidden-sizes",
        "4",
        "--batch-size",
        "8",
    ]
    assert run(capsys, "tune", "control", *flags, *space)[0] == 0
    rows = table("runs/tune-Pendulum-v1-ddpg")
    assert len(rows) == 2 and all(float(r["mean_return"]) < -500 for r in rows)
    assert json.loads(Path("runs/tune-Pendulum-v1-ddpg/best.json").read_text())["algorithm"] == "ddpg"


@pytest.mark.slow
def test_language(capsys):
    pytest.importorskip("transformers")
    flags = ["--warm-start-accuracy", "0", "--iterations", "4", "--eval-every", "2", "--num-responses", "8"]
    space = ["--search", "learning_rate=log:1e-5:1e-3", "algorithm=ppo,grpo", "--trials", "2", "--group-size", "4"]
    code, out, _ = run(capsys, "tune", "language", *flags, *space, "--study", "s")
    assert code == 0, out
    assert {r["state"] for r in table()} == {"complete"} and "eval_reward" in table()[0]
    assert "ppo-fast train language --config" in out


def test_trials_whose_environment_breaks_are_recorded(capsys):
    flags = ["--env-id", "trainer_worlds:BrokenRaise-v0", "--num-envs", "2", "--total-timesteps", "640"]
    space = ["--search", "num_steps=16,320", "--sampler", "grid", "--study", "s"]
    assert_one_line(run(capsys, "tune", "control", *flags, *space), "a trial that completes", "the motor is on fire")
    assert all("the motor is on fire" in r["error"] and r["state"] == "failed" for r in table())


def test_a_trial_whose_process_dies_is_recorded(capsys):
    flags = [
        "--env-id",
        "trainer_worlds:Suicidal-v0",
        "--num-envs",
        "1",
        "--total-timesteps",
        "64",
        "--num-steps",
        "16",
    ]
    space = ["--search", "gamma=0.9,0.99", "--sampler", "grid", "--study", "s"]
    assert_one_line(run(capsys, "tune", "control", *flags, *space), "its process ended with exit code -9")
    assert len(table()) == 2


# Pruning.


def reports(pruner, curves):
    """How many values of each curve a study takes before it prunes, trial after trial."""
    from ppo_fast.trainer.rundir import RunDir
    from ppo_fast.trainer.study import Study, TuneConfig, optuna_quietly

    config, base = TuneConfig(pruner=pruner), ControlConfig()
    Path("s").mkdir()
    taken = []
    with optuna_quietly() as module, RunDir(Path("s")) as owned:
        study = Study(module, config, base, parse(["gamma=0.9:0.99"], base), owned)
        for curve in curves:
            asked = study.study.ask(study.distributions)
            for step, value in enumerate(curve, 1):
                asked.report(value, step)
                if asked.should_prune():
                    break
            taken.append(step)
            states = module.trial.TrialState
            study.study.tell(asked, *((curve[-1],) if step == len(curve) else (None, states.PRUNED)))
    return taken


def test_pruners_end_bad_trials_and_spare_good_ones():
    good, bad = [[float(100 + i) for i in range(20)]] * 5, [0.0] * 20
    assert reports("median", [*good, bad, good[0]]) == [20] * 5 + [5, 20]


def test_asha_keeps_the_better_half():
    curves = [[float(k)] * 20 for k in (8, 7, 1, 9)]
    taken = reports("asha", curves)
    assert taken[0] == 20 and taken[-1] == 20 and taken[2] < 20


def test_no_pruner_prunes_nothing():
    assert reports("none", [[float(-k)] * 20 for k in range(8)]) == [20] * 8


class Pipe:
    """A study at the other end, which prunes after `patience` reports."""

    def __init__(self, patience: int = 10**6) -> None:
        self.sent, self.patience = [], patience

    def send(self, message) -> None:
        self.sent.append(message)

    def poll(self) -> bool:
        return False

    def recv(self) -> bool:
        return len(self.sent) < self.patience


def test_reports_come_at_the_same_share_of_every_run():
    points = []
    for num_steps in (8, 64):  # 80 and 10 iterations
        pipe = Pipe()
        config = ControlConfig(env_id="trainer_worlds:Walk-v0", num_envs=1, num_steps=num_steps, total_timesteps=640)
        reporter = trial.Reporter(pipe, config, [5.0])
        for i in range(config.num_iterations):
            reporter({"global_step": (i + 1) * num_steps, "mean_return": math.nan if i == 0 else float(i)})
        points.append([step for _, step, _ in pipe.sent])
        assert pipe.sent[-1] == ("report", 40, (5.0 + config.num_iterations - 1) / 2)
    assert points[0] == list(range(21, 41)) and points[1] == list(range(24, 41, 2))


def test_a_pruned_trial_stops_at_once_and_leaves_no_folder(tmp_path):
    pipe = Pipe(patience=3)
    config = small(tmp_path / "t", total_timesteps=6400)
    assert trial._outcome(pipe, [config, config]) == ("pruned",)
    assert len(pipe.sent) == 3 and not (tmp_path / "t").exists()


def test_no_episode_is_a_failure_not_a_number(tmp_path):
    config = small(tmp_path / "t", env_id="CartPole-v1", num_envs=1, num_steps=4, total_timesteps=4)
    kind, message = trial._outcome(Pipe(), [config])
    assert kind == "failed" and "no episode has ended" in message


# Interruptions.

SLOW = [*BASE, "--total-timesteps", "100000000", "--num-steps", "16", "--search", "learning_rate=1e-3,1e-2,1e-1"]


def start(*flags):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ppo_fast.cli", "tune", "control", *SLOW, "--study", "s", *flags]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_until_two_trials_run():
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        running = [p for p in Path("s/.trials").glob("*/0/progress.csv") if p.stat().st_size > 1000]
        if len(running) == 2:
            return
        time.sleep(0.05)
    raise AssertionError("no two trials within two minutes")


def members(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_study_stays_and_runs_its_trials_again(capsys, how):
    process = start("--sampler", "grid", "--jobs", "2")
    try:
        wait_until_two_trials_run()
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        output = process.communicate(timeout=60)[0]
        deadline = time.monotonic() + 60
        while members(process.pid) and time.monotonic() < deadline:  # nobody is left behind
            time.sleep(0.05)
        assert members(process.pid) == []
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), output
    assert "Traceback" not in output, output
    if how == signal.SIGINT:
        assert "stopped after 0 of 3 trials; the same command goes on" in output
        assert not Path("s/.trials").exists()
    # the same study with a budget that ends: the study file belongs to it, so its base is changed in the file
    with sqlite3.connect("s/study.db") as database:
        (text,) = database.execute("select value_json from study_user_attributes where key = 'ppo_fast'").fetchone()
        database.execute(
            "update study_user_attributes set value_json = ? where key = 'ppo_fast'",
            (json.dumps({**json.loads(text), "total_timesteps": 640}),),
        )
    database.close()
    code, out, _ = run(
        capsys, "tune", "control", *SLOW, "--total-timesteps", "640", "--study", "s", "--sampler", "grid", "--jobs", "2"
    )
    assert code == 0, out
    assert sorted(float(r["learning_rate"]) for r in table()) == [1e-3, 1e-2, 1e-1]
    assert not Path("s/.trials").exists()


def test_foreign_and_damaged_files_are_named_and_stay(capsys, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    database = folder / "study.db"
    database.write_bytes(b"not a database at all" * 100)
    assert_one_line(run(capsys, *TUNE, *SPACE), "--study: expected a study in s/study.db, got another file")
    assert database.read_bytes() == b"not a database at all" * 100
    database.unlink()
    with sqlite3.connect(database) as mine:
        mine.execute("create table recipes (name text)")
    mine.close()
    before = database.read_bytes()
    assert_one_line(run(capsys, *TUNE, *SPACE), "--study: expected a study in s/study.db, got a database of something")
    assert database.read_bytes() == before
    database.unlink()
    study = optuna.create_study(study_name="ppo_fast", storage=f"sqlite:///{database}", direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    assert_one_line(run(capsys, *TUNE, *SPACE), "expected a study of ppo-fast tune in s/study.db")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    flags = ["tune", "control", *BASE, *SPACE, "--study", "other"]
    assert_one_line(run(capsys, *flags), "--study: expected the folder of a study or a new one, got other")
    (tmp_path / "file").write_text("mine")
    assert_one_line(run(capsys, *flags[:-1], "file"), "--study: expected a folder that can be written, got file")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_share_a_study(capsys):
    from ppo_fast.trainer.rundir import RunDir

    Path("s").mkdir()
    with RunDir(Path("s")):
        assert_one_line(run(capsys, *TUNE, *SPACE), "--study: s is in use by another running process")


def test_a_trial_is_the_run_that_train_makes(tmp_path):
    """The hook of a trial changes nothing: the same bits with and without."""
    ends, rows = [], []
    for hook in (None, rows.append):
        config = small(tmp_path / str(len(ends)))
        train(config, console=Console(quiet=True), on_iteration=hook)
        ends.append(checkpoint.load(Path(config.run_dir) / "checkpoint.pt")["parameters"])
    assert_equal_states(*ends)
    assert [r["global_step"] for r in rows] == [32 * (i + 1) for i in range(20)]


@pytest.mark.slow
def test_tpe_finds_a_learning_rate_that_learns(capsys):
    flags = ["--env-id", "CartPole-v1", "--total-timesteps", "30000", "--trials", "14", "--jobs", "2", "--study", "s"]
    assert run(capsys, "tune", "control", *flags, "--search", "learning_rate=log:1e-6:1e-1")[0] == 0
    best = table()[0]
    assert float(best["mean_return"]) > 100 and 3e-4 < float(best["learning_rate"]) < 3e-2


def test_the_nearest_field_is_one_of_the_trainer_at_hand():
    with pytest.raises(UserError, match="the nearest is actor_learning_rate"):
        parse(["actor_lr=1:2"], DDPGConfig())
