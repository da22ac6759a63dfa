"""Every example runs, as its first lines say. Each compares its results with what it replaces and fails where they differ."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
#: What an example prints when it went through.
SAYS = {
    "compiled": "96 rows, clip 0.1: loss",
    "cuda_graph": "update 4: approx_kl",
    "data_parallel": "rank 1: the gradient of the whole batch",
    "drop_in_loss": "loss, approx_kl and all gradients agree",
    "first_ppo": "stopped after 20 episodes",
    "jax_cartpole": "episodes: 500.0, solved",
    "language_loss": "gradients of hidden states and head agree",
    "micro_batches": "pieces of 8: the same gradient",
    "recommend": "popularity      click-through of the last 1 iterations",
    "train_your_own": "of at most 48",
}
#: Flags that make a run short.
SHORT = {
    "first_ppo": ("--episodes", "20"),
    "recommend": ("--items", "500", "--iterations", "3", "--seeds", "1"),
}


def run(name, folder, flags=()):
    command = [sys.executable, ROOT / f"examples/{name}.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


LEARNS = {"jax_cartpole"}  # to a goal


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in LEARNS else ()) for x in SAYS])
def test_example(name, tmp_path):
    assert SAYS[name] in run(name, tmp_path, SHORT.get(name, ()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_the_first_example_converges(seed, tmp_path):
    assert "converged after" in run("first_ppo", tmp_path, ["--seed", seed])
    assert (tmp_path / "first_ppo.png").stat().st_size > 10_000


def test_the_recommender_shows_nothing_twice_and_scores_a_slate_as_its_slots():
    """Its streams: every item was allowed when it was shown, once in a session; a mask lacks what came before it in the slate."""
    spec = importlib.util.spec_from_file_location("recommend", ROOT / "examples/recommend.py")
    recommend = sys.modules["recommend"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recommend)
    config = recommend.Config(items=200, users=4, slates=6)
    shop = recommend.Shop(config, 1)
    seen = recommend.session(shop, lambda obs, mask: torch.rand(mask.shape).masked_fill(~mask, -1.0).topk(3).indices)
    actions, masks = seen["actions"], seen["action_mask"]  # [T, N, K], [T, N, K, A]
    assert masks.gather(-1, actions[..., None]).all()
    for user in range(4):
        assert len(set(actions[:, user].flatten().tolist())) == actions[:, user].numel()
    shown = masks.flatten(0, 1).sum(-1)  # one item less with each slot
    assert torch.equal(shown[:, :1] - shown, torch.arange(3).expand_as(shown))
    assert torch.equal(masks[1:, :, 0].sum(-1), masks[:-1, :, 2].sum(-1) - 1)
    assert seen["obs"].isfinite().all()
    assert set(seen["clicks"].unique().tolist()) <= {0.0, 1.0}


def test_every_example_is_run_and_named_in_the_docs():
    assert set(EXAMPLES) - set(SAYS) == {"cleanrl_ppo"}  # tests/integrations/test_cleanrl.py
    linked = set(re.findall(r"\]\(\.\./examples/(\w+)\.py\)", (ROOT / "docs/embedding.md").read_text()))
    linked |= set(re.findall(r"\]\(\.\./examples/(\w+)\.py\)", (ROOT / "docs/jax.md").read_text()))
    assert set(EXAMPLES) - linked == {"train_your_own"}  # README
