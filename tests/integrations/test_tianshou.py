"""Tianshou: its function against ours, and returns of a buffer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("tianshou")
pytest.importorskip("tianshou.algorithm.algorithm_base")
from tianshou.algorithm import algorithm_base
from tianshou.data import Batch, ReplayBuffer

from ppo_fast.integrations import tianshou as ours


def inputs(size, dtype=np.float32, ends=np.bool_):
    rng = np.random.default_rng(0)
    v, after, reward = rng.normal(size=(3, size))
    return [v.astype(dtype), after.astype(dtype), reward, (rng.random(size) < 0.1).astype(ends), 0.99, 0.95]


@pytest.mark.parametrize("size", [1, 2, 100, 2048])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ends", [np.bool_, np.float64])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_advantages(size, dtype, ends, gamma, lam):
    x = [*inputs(size, dtype, ends)[:4], gamma, lam]
    expected, got = algorithm_base._gae(*x), ours._gae(*x)
    assert isinstance(got, np.ndarray) and got.dtype == expected.dtype == np.float64 and got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_views():
    x = [y[::3] if isinstance(y, np.ndarray) else y for y in inputs(300)]
    np.testing.assert_allclose(ours._gae(*x), algorithm_base._gae(*x), rtol=1e-12, atol=1e-12)
    x = [y[::-1] if isinstance(y, np.ndarray) else y for y in inputs(300, np.float64)]
    np.testing.assert_allclose(ours._gae(*x), algorithm_base._gae(*x), rtol=1e-12, atol=1e-12)


def test_single_precision_rewards():
    x = inputs(50)
    x[2] = x[2].astype(np.float32)
    got, expected = ours._gae(*x), algorithm_base._gae(*x)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_behind_the_end_of_an_episode_nothing_is_read():
    x = inputs(20)
    x[3][:] = 0
    x[3][9] = 1
    expected = ours._gae(*x)
    x[2][10:] = np.nan
    np.testing.assert_array_equal(ours._gae(*x)[:10], expected[:10])


@pytest.mark.parametrize("case", ["columns", "large"])
def test_the_rest_is_theirs(case, monkeypatch):
    called = []
    monkeypatch.setattr(ours, "_theirs", lambda *x: called.append(x))
    x = inputs(6)
    if case == "columns":
        x[2] = x[2][:, None]
    else:
        x[4] = 1.5
    ours._gae(*x)
    assert len(called) == 1


def test_returns_of_a_buffer(monkeypatch):
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(60)
    for i in range(60):
        ends = rng.random(2) < 0.1
        buffer.add(
            Batch(obs=i, act=0, rew=rng.normal(), terminated=ends[0], truncated=ends[1], obs_next=i + 1, info={})
        )
    batch, indices = buffer.sample(0)
    v, after = torch.randn(2, 60)
    call = lambda: algorithm_base.Algorithm.compute_episodic_return(batch, buffer, indices, after, v, 0.99, 0.9)  # noqa: E731
    expected, called = call(), []
    monkeypatch.setattr(
        ours, "discounted_returns", lambda *a, f=ours.discounted_returns, **k: called.append(a) or f(*a, **k)
    )
    with ours.enabled():
        got = call()
    assert called
    for x, y in zip(expected, got, strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-10, atol=1e-10)
