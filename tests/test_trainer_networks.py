"""The agent's networks: initial weights, outputs, and what a checkpoint puts back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ppo_fast.trainer.config import ControlConfig
from ppo_fast.trainer.learner import Learner
from ppo_fast.trainer.networks import ActorCritic, without_modules


def make(hidden=(64, 64), outputs=3, log_std=0):
    return ActorCritic(5, outputs, log_std, hidden, -0.5, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("hidden", [(), (8,), (64, 64), (7, 5, 3)])
def test_outputs_are_those_of_tanh_layers(hidden):
    net, x = make(hidden), torch.randn(33, 5)
    params, values = net(x)
    for mlp, out in ((net.actor, params), (net.critic, values[:, None])):
        linear = [layer for layer in mlp if isinstance(layer, nn.Linear)]
        assert [layer.out_features for layer in linear] == [*hidden, out.shape[1]]
        y = x
        for i, layer in enumerate(linear):
            y = y @ layer.weight.t() + layer.bias
            y = y.tanh() if i < len(hidden) else y
        torch.testing.assert_close(out, y)
        torch.testing.assert_close(without_modules(mlp)(x), mlp(x))


def test_initial_weights_are_orthogonal_with_the_gains_of_cleanrl():
    net = make(log_std=3)
    for mlp, last in ((net.actor, 0.01), (net.critic, 1.0)):
        linear = [layer for layer in mlp if isinstance(layer, nn.Linear)]
        for layer, gain in zip(linear, (math.sqrt(2), math.sqrt(2), last), strict=True):
            weight = layer.weight.detach()
            small = weight if weight.shape[0] <= weight.shape[1] else weight.t()
            torch.testing.assert_close(small @ small.t(), gain**2 * torch.eye(len(small)), atol=1e-5, rtol=1e-4)
            assert not layer.bias.any()
    assert net.log_std.tolist() == [-0.5] * 3


def test_one_seed_makes_one_agent_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b = make(), make()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_state_goes_round_and_foreign_shapes_are_refused():
    a, b = make(), make((8,))
    with pytest.raises(RuntimeError, match="size mismatch"):
        b.load_state_dict(a.state_dict())
    learners = [Learner(ControlConfig(), None, net, torch.Generator()) for net in (a, b)]
    for learner in learners:
        sum(y.sum() for y in learner.net(torch.randn(2, 5))).backward()
        learner.optimizer.step()
    with pytest.raises(ValueError, match=r"exp_avg of shape \(64, 5\) for parameter 1"):
        learners[1].load_optimizer(learners[0].optimizer.state_dict())
