"""Rollout workers and ranks on a Ray cluster of this machine: nothing is lost, and nothing depends on who was when where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_worlds import Broken, Guess, Walk

from ppo_fast import cli, reference
from ppo_fast.trainer import control, distributed
from ppo_fast.trainer.config import ControlConfig
from ppo_fast.trainer.errors import UserError

pytest.importorskip("ray")
from ppo_fast.trainer import ray as ours

HERE = Path(__file__).parent
QUIET = {"tensorboard": False, "plot": False, "progress": False}
SMALL = {
    "num_envs": 4,
    "num_steps": 16,
    "total_timesteps": 4 * 16 * 5,
    "hidden_sizes": (8,),
    "learning_rate": 1e-2,
    **QUIET,
}


def config_in(folder: Path, **changes) -> ControlConfig:
    return ControlConfig(**{**SMALL, "run_dir": str(folder), **changes})


class Mortal(Walk):
    """Kills its process in its 40th step, as often as there are files to take away."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.steps = folder, 0

    def step(self, action):
        self.steps += 1
        lives = sorted(self.folder.iterdir())
        if self.steps == 40 and lives:
            lives[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def masked_guess():
    return Guess((3, 2), masked=True)


def parameters(folder: Path):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["parameters"]


def assert_close(a, b):
    """To the rounding of float32, over a few dozen steps: a network's last bits depend on how many rows it sees."""
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def assert_same_run(one: Path, two: Path):
    a, b = parameters(one), parameters(two)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (one / "episodes.csv").read_bytes() == (two / "episodes.csv").read_bytes()


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{HERE.parent}{os.pathsep}{HERE}")  # of the workers
        with ours.cluster(None):
            yield


VARIANTS = {
    "same_step": (Walk, {}),
    "next_step": (Walk, {"autoreset": "next_step", "normalize_rewards": True}),
    "masked": (masked_guess, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_workers_are_the_run_of_one_process(cluster, tmp_path, name):
    make_env, changes = VARIANTS[name]
    one, two = tmp_path / "one", tmp_path / "two"
    control.train(config_in(one, **changes), make_env=make_env)
    ours.train(config_in(two, **changes), workers=2, make_env=make_env)
    assert (one / "episodes.csv").read_bytes() == (two / "episodes.csv").read_bytes()
    assert_close(parameters(one), parameters(two))


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_killed_worker_changes_nothing(cluster, tmp_path, staleness):
    """Both workers die in the middle of a rollout; the run goes on and ends with the bits of one without deaths."""
    lives = tmp_path / "lives"
    lives.mkdir()
    ours.train(config_in(tmp_path / "calm"), workers=2, max_staleness=staleness, make_env=lambda: Mortal(lives))
    for i in range(2):
        (lives / str(i)).touch()
    ours.train(config_in(tmp_path / "hard"), workers=2, max_staleness=staleness, make_env=lambda: Mortal(lives))
    assert not list(lives.iterdir())
    assert_same_run(tmp_path / "calm", tmp_path / "hard")


@pytest.mark.slow
def test_a_worker_that_always_dies(cluster, tmp_path):
    lives = tmp_path / "lives"
    lives.mkdir()
    for i in range(40):
        (lives / f"{i:02}").touch()
    config = config_in(tmp_path / "run", num_steps=64, total_timesteps=4 * 64)
    with pytest.raises(UserError, match=r"--workers: rollout worker 0 died 4 times in one rollout"):
        ours.train(config, workers=1, make_env=lambda: Mortal(lives))


@pytest.mark.slow
def test_late_rollouts_are_as_late_as_said_and_none_is_lost(cluster, tmp_path):
    trainer = ours.Trainer(config_in(tmp_path), Walk, control.ALONE, workers=2, max_staleness=2)
    try:
        before = trainer.envs.states
        seen = []
        for _ in range(4):
            trainer.iterate()
            seen.append(trainer.collector.staleness)
            assert len(trainer.envs.pending) == 2
        assert seen == [0, 1, 2, 2]
        assert trainer.now.global_step == 4 * 64
        assert before is not trainer.envs.states
    finally:
        trainer.close()


@pytest.mark.slow
def test_checkpoints_are_those_of_one_process(cluster, tmp_path):
    """Half with workers, half without, in both orders."""
    straight = control.Trainer(config_in(tmp_path), Walk)
    for _ in range(4):
        straight.iterate()
    expected = straight.net.state_dict()
    straight.close()

    def made(with_workers):
        if with_workers:
            return ours.Trainer(config_in(tmp_path), Walk, control.ALONE, workers=2, max_staleness=0)
        return control.Trainer(config_in(tmp_path), Walk)

    for first in (True, False):
        trainer, state = made(first), None
        for _ in range(2):
            trainer.iterate()
        state = trainer.state_dict()
        trainer.close()
        trainer = made(not first)
        assert trainer.load_state_dict(state)
        for _ in range(2):
            trainer.iterate()
        assert_close(trainer.net.state_dict(), expected)
        trainer.close()


@pytest.mark.slow
def test_running_statistics_of_observations(cluster, tmp_path):
    """Those of all observations up to the last rollout; what the networks saw was brought to them before."""
    trainer = ours.Trainer(
        config_in(tmp_path, normalize_observations=True), Walk, control.ALONE, workers=2, max_staleness=1
    )
    try:
        raw, rollout = [], trainer.collector
        for _ in range(3):
            trainer.iterate()
            raw.append(rollout.raw_obs[:-1].reshape(-1, 3).numpy().astype(float))
        moments = trainer.obs_normalizer.moments
        np.testing.assert_allclose(moments.mean, np.concatenate(raw).mean(0), rtol=1e-6)
        np.testing.assert_allclose(moments.var, np.concatenate(raw).var(0), rtol=1e-6)
        known = raw[0]  # the third rollout was asked for after the first
        seen = (raw[2] - known.mean(0)) / np.sqrt(known.var(0) + 1e-8)
        np.testing.assert_allclose(rollout.seen.host[:-1].reshape(-1, 3), seen.clip(-10, 10), rtol=1e-4, atol=1e-4)
    finally:
        trainer.close()


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_errors_of_workers_are_one_line(cluster, tmp_path, monkeypatch):
    def fails(message, workers=2, make_env=Walk, **changes):
        with pytest.raises(UserError, match=message) as caught:
            ours.train(config_in(tmp_path / "run", **changes), workers=workers, make_env=make_env)
        assert "\n" not in str(caught.value)

    fails("^--num-envs: expected a multiple of the 2 rollout workers, got 3$", num_envs=3)
    fails(r"^--workers or --ranks: expected at most the .* CPUs of the cluster, got 4096; .*ray start", workers=4096)
    fails("failed in a step: RuntimeError: the motor is on fire$", make_env=lambda: Broken(good=5))
    fails("^--env-id: expected the id of an environment that gymnasium knows", make_env=None, env_id="Nowhere-v0")
    here = {**distributed.versions(), "torch": "1.0"}
    monkeypatch.setattr(distributed, "versions", lambda: here)
    fails(r"^--workers: expected torch 1.0 as here on every node, got .* there: pip install torch==1.0$")


def run(code: str, timeout: int = 300) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_an_address_that_does_not_answer():
    done = run("from ppo_fast.cli import main; raise SystemExit(main(['ray', 'control', '--address', '127.0.0.1:1']))")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ppo-fast")]
    assert "--address: expected a Ray cluster, none answers at 127.0.0.1:1" in line and "ray start --head" in line


def test_without_ray(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ppo_fast.trainer.ray")
    monkeypatch.delattr(sys.modules["ppo_fast.trainer"], "ray")
    assert cli.main(["ray", "control"]) == 2
    assert 'pip install "ppo_fast[ray]"' in capsys.readouterr().err


def test_options():
    with pytest.raises(UserError, match=r"^--workers: expected at least 1, or --ranks, got 0 of both"):
        ours.RayOptions(workers=0)
    with pytest.raises(UserError, match=r"^--max-staleness: expected an integer >= 0, got -1"):
        ours.RayOptions(max_staleness=-1)


# --- the correction ---------------------------------------------------------------------------------------------------


def test_v_trace_corrects_for_parameters_that_changed():
    """With the parameters that acted, its targets are GAE's; with others, those of the reference, weighted by the ratios."""
    config = ControlConfig(**SMALL, autoreset="next_step")
    trainer = control.Trainer(config, Walk)
    trainer.collector.collect()
    trainer.collector.staleness = 1
    learner = ours.Learner(config, trainer.learner.policy, trainer.net, trainer.generator)
    unchanged, expected = learner.batch(trainer.collector, None), trainer.learner.batch(trainer.collector, None)
    valid = torch.from_numpy(trainer.collector.valid.reshape(-1))
    torch.testing.assert_close(unchanged.returns[valid], expected.returns[valid])
    torch.testing.assert_close(unchanged.log_prob, expected.log_prob)

    with torch.no_grad():
        for p in trainer.net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    changed, rollout = learner.batch(trainer.collector, None), trainer.collector
    logits = trainer.net.actor(rollout.obs[:-1])
    current = torch.log_softmax(logits, -1).gather(-1, rollout.actions[..., None]).squeeze(-1)
    acted = torch.log_softmax(rollout.params, -1).gather(-1, rollout.actions[..., None]).squeeze(-1)
    assert bool(((current - acted).abs() > 0.1).any())
    values = trainer.net.critic(rollout.obs).squeeze(-1)
    targets, advantages = reference.vtrace(
        (current - acted).detach(), torch.from_numpy(rollout.rewards).float(), values[:-1].detach(), values[-1].detach(),
        terminated=torch.from_numpy(rollout.terminated),
        truncated=torch.from_numpy(rollout.truncated & ~rollout.terminated), final_values=values[1:].detach(),
        mask=torch.from_numpy(rollout.valid), gamma=config.gamma, lam=config.gae_lambda,
    )  # fmt: skip
    torch.testing.assert_close(changed.returns[valid], targets.reshape(-1)[valid])
    torch.testing.assert_close(changed.advantages[valid], advantages.reshape(-1)[valid])
    torch.testing.assert_close(changed.log_prob, current.reshape(-1).detach())
    trainer.close()


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_train_starts_a_run_again_at_its_checkpoint(tmp_path):
    """A rank dies in every 40th step, twice in this run."""
    code = """
        import os
        os.environ["DEADLY_RANK"] = "1"
        from ppo_fast.cli import main
        raise SystemExit(main(["ray", "control", "--ranks", "2", "--env-id", "rank_worlds:Deadly-v0", "--num-envs", "4",
            "--num-steps", "16", "--total-timesteps", "320", "--run-dir", RUN, "--checkpoint-seconds", "0", "--no-tensorboard",
            "--no-plot", "--no-progress"]))
    """
    done = run("\n".join(x[8:] for x in code.replace("RUN", repr(str(tmp_path / "run"))).splitlines()), timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = (tmp_path / "run" / "progress.csv").read_text().splitlines()
    assert [int(row.split(",")[1]) for row in rows[1:]] == list(range(1, 6))
    assert "resuming" in done.stdout and "at step 128" in done.stdout and "at step 256" in done.stdout
