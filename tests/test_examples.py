"""Every example runs, as its first lines say. Each compares its results with what it replaces and fails where they differ."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
#: What an example prints when it went through.
SAYS = {
    "compiled": "96 rows, clip 0.1: loss",
    "cuda_graph": "update 4: approx_kl",
    "data_parallel": "rank 1: the gradient of the whole batch",
    "drop_in_loss": "loss, approx_kl and all gradients agree",
    "jax_cartpole": "episodes: 500.0, solved",
    "language_loss": "gradients of hidden states and head agree",
    "micro_batches": "pieces of 8: the same gradient",
    "train_your_own": "of at most 48",
}


LEARNS = {"jax_cartpole"}  # to a goal


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in LEARNS else ()) for x in SAYS])
def test_example(name, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"examples/{name}.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


def test_every_example_is_run_and_named_in_the_docs():
    assert set(EXAMPLES) - set(SAYS) == {"cleanrl_ppo"}  # tests/integrations/test_cleanrl.py
    linked = set(re.findall(r"\]\(\.\./examples/(\w+)\.py\)", (ROOT / "docs/embedding.md").read_text()))
    linked |= set(re.findall(r"\]\(\.\./examples/(\w+)\.py\)", (ROOT / "docs/jax.md").read_text()))
    assert set(EXAMPLES) - linked == {"train_your_own"}  # README
