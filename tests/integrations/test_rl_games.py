"""rl_games: its function against ours, as its agents call it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rl_games")
pytest.importorskip("rl_games.common.a2c_common")
from rl_games.common.a2c_common import A2CBase, ContinuousA2CBase, DiscreteA2CBase

from ppo_fast.integrations import rl_games as ours


def inputs(steps, envs, values=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    agent = SimpleNamespace(horizon_length=steps, gamma=0.99, tau=0.95)
    value, reward = torch.randn(2, steps, envs, values, generator=generator, dtype=dtype)
    last = torch.randn(envs, values, generator=generator, dtype=dtype)
    dones = (torch.rand(steps + 1, envs, generator=generator) < 0.2).float()
    return [agent, dones[-1], last, dones[:-1], value, reward]


@pytest.mark.parametrize("steps, envs, values", [(16, 5, 1), (1, 3, 1), (33, 1, 1), (8, 4, 3), (24, 64, 2)])
@pytest.mark.parametrize("gamma, tau", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_advantages(steps, envs, values, gamma, tau):
    x = inputs(steps, envs, values)
    x[0].gamma, x[0].tau = gamma, tau
    expected, got = A2CBase.discount_values(*x), ours.discount_values(*x)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_views():
    agent, done, last, dones, value, reward = inputs(20, 12, 2)
    x = [agent, done[::2], last[::2], dones[:, ::2], value[:, ::2], reward[:, ::2]]
    torch.testing.assert_close(ours.discount_values(*x), A2CBase.discount_values(*x), rtol=1e-5, atol=2e-5)


def test_behind_the_end_of_an_episode_nothing_is_read():
    x = inputs(10, 3)
    x[3].zero_()[5] = 1
    expected = ours.discount_values(*x)
    x[4][5:] = x[2][:] = torch.nan
    assert torch.equal(ours.discount_values(*x)[:5], expected[:5])


@pytest.mark.parametrize("case", ["double", "bfloat16", "horizon", "dimensions"])
def test_the_rest_is_theirs(case, monkeypatch):
    called = []
    monkeypatch.setattr(ours, "_theirs", lambda *x: called.append(x))
    dtype = {"double": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    x = inputs(6, 2, dtype=dtype)
    if case == "horizon":
        x[0].horizon_length = 4
    if case == "dimensions":
        x[4], x[5] = x[4][..., 0], x[5][..., 0]
    ours.discount_values(*x)
    assert len(called) == 1


def test_every_agent_has_it():
    with ours.enabled():
        for agent in (A2CBase, DiscreteA2CBase, ContinuousA2CBase):
            assert agent.discount_values is ours.discount_values
    assert A2CBase.discount_values is ours._theirs
