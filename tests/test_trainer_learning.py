"""Every kind of action learns, masks are never broken, and bad environments are named."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from rich.console import Console
from trainer_worlds import Aim, Broken, Guess, Moody

from ppo_fast.trainer.control import ControlConfig, UserError, train

EASY = {
    "num_envs": 8, "num_steps": 32, "total_timesteps": 256 * 30, "learning_rate": 1e-2, "hidden_sizes": (16,),
    "gamma": 0.0, "entropy_coef": 0.0, "tensorboard": False, "plot": False, "progress": False,
}  # fmt: skip


def learn(tmp_path, make_env, **changes):
    config = ControlConfig(**{**EASY, "run_dir": str(tmp_path / "run"), **changes})
    return train(config, make_env=make_env, console=Console(quiet=True))


@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
@pytest.mark.parametrize("heads", [(), (3, 2)])
def test_discrete_and_multi_discrete_learn(tmp_path, heads, autoreset):
    result = learn(tmp_path, functools.partial(Guess, heads), autoreset=autoreset)
    assert result.mean_return > 0.95


@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
def test_box_learns(tmp_path, autoreset):
    result = learn(tmp_path, Aim, autoreset=autoreset, initial_log_std=-1.0, total_timesteps=256 * 60)
    assert result.mean_return > -0.1  # acting at random inside the box: -1.3


@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
@pytest.mark.parametrize(
    ("heads", "where"),
    [((), "info"), ((), "observation"), ((3, 2), "info"), ((3, 2), "tuple"), ((3, 2), "observation")],
)
def test_masked_actions_are_never_taken(tmp_path, heads, where, autoreset):
    """`Guess` raises when a forbidden action is taken."""
    make = functools.partial(Guess, heads, masked=True, where=where)
    result = learn(tmp_path, make, autoreset=autoreset, total_timesteps=256 * 20)
    assert result.mean_return > 0.9


def test_masks_matter(tmp_path):
    """The same world without telling the masks: a forbidden action is taken at once, so the test above can fail."""

    class Silent(Guess):
        def _next(self):
            return super()._next()[0], {}

    with pytest.raises(UserError, match="a forbidden action was taken"):
        learn(tmp_path, lambda: Silent(masked=True))


@pytest.mark.parametrize(
    ("how", "message", "vectorization"),
    [
        ("raise", "failed in a step: RuntimeError: the motor is on fire", "sync"),
        ("raise", "failed in a step: RuntimeError: the motor is on fire", "async"),
        ("observation", "returned a non-finite observation", "sync"),
        ("reward", "returned a non-finite reward", "sync"),
    ],
)
def test_a_broken_environment_is_named_and_the_last_checkpoint_stays(tmp_path, how, message, vectorization):
    make = functools.partial(Broken, how, 200)
    with pytest.raises(UserError, match=message):
        learn(tmp_path, make, checkpoint_seconds=0.0, vectorization=vectorization, num_envs=2, num_steps=64)
    from ppo_fast.trainer import checkpoint

    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert state["now"]["global_step"] == 2 * 64 * 3  # the fourth rollout meets the fault
    assert all(bool(np.isfinite(v.numpy()).all()) for v in state["parameters"].values())


def test_divergence_is_named(tmp_path):
    class Huge(Aim):
        def step(self, action):
            obs, _, terminated, truncated, info = super().step(action)
            return obs, 1e30, terminated, truncated, info

    with pytest.raises(UserError, match="training diverged"):
        learn(tmp_path, Huge)


def test_an_environment_that_is_not_a_function_of_its_seed_is_reported_on_resume(tmp_path):
    learn(tmp_path, Moody)
    console = Console(record=True, quiet=False, width=300, file=open("/dev/null", "w"))  # noqa: SIM115
    config = ControlConfig(**{**EASY, "run_dir": str(tmp_path / "run"), "resume": True})
    train(config, make_env=Moody, console=console)
    assert "is not deterministic" in console.export_text()
