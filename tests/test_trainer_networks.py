"""The hand-written forward and backward, clipping and optimiser against plain torch modules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from ppo_fast.trainer.networks import ActorCritic
from ppo_fast.trainer.optimizer import Adam


def make(hidden=(64, 64), outputs=3, log_std=0):
    return ActorCritic(5, outputs, log_std, hidden, -0.5, torch.Generator().manual_seed(3))


def twin(net: ActorCritic, hidden, outputs):
    """The same agent as two nn.Sequential."""

    def sequential(mlp, out):
        layers, sizes = [], [5, *hidden, out]
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            layer = nn.Linear(a, b)
            layer.weight.data.copy_(mlp.weights[i])
            layer.bias.data.copy_(mlp.biases[i])
            layers += [layer, nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return nn.ModuleList([sequential(net.actor, outputs), sequential(net.critic, 1)])


@pytest.mark.parametrize("hidden", [(), (8,), (64, 64), (7, 5, 3)])
@pytest.mark.parametrize("rows", [1, 33])
def test_forward_and_backward_are_those_of_modules(hidden, rows):
    net = make(hidden)
    modules = twin(net, hidden, 3)
    x = torch.randn(rows, 5)
    net.grad.fill_(torch.nan)  # the backward replaces, it does not add
    out = net.forward(x)
    params, values = out.params, out.values
    ((params.square().sum()) + (values * params[:, 0].detach()).sum()).backward()
    net.backward(out)
    expected_params, expected_values = modules[0](x), modules[1](x).view(-1)
    ((expected_params.square().sum()) + (expected_values * expected_params[:, 0].detach()).sum()).backward()
    torch.testing.assert_close(params, expected_params)
    torch.testing.assert_close(values, expected_values)
    expected = torch.cat([p.grad.flatten() for p in modules.parameters()])
    torch.testing.assert_close(net.grad, expected)
    torch.testing.assert_close(net.actor(x), expected_params.detach())


def test_steps_of_clipped_adam_are_those_of_modules():
    net = make()
    modules = twin(net, (64, 64), 3)
    ours = Adam(net.flat, net.grad, 1e-5)
    theirs = torch.optim.Adam(modules.parameters(), lr=1e-2, eps=1e-5)
    x, y = torch.randn(20, 5), torch.randn(20, 3)
    for scale in (100.0, 1e-3, 1.0):  # clipped and not
        out = net.forward(x)
        (scale * ((out.params - y).square().sum() + out.values.square().sum())).backward()
        net.backward(out)
        norm = net.clip_grad_norm(0.5)
        ours.step(1e-2)
        theirs.zero_grad()
        (scale * ((modules[0](x) - y).square().sum() + modules[1](x).square().sum())).backward()
        expected = nn.utils.clip_grad_norm_(modules.parameters(), 0.5)
        theirs.step()
        torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(net.flat, torch.cat([p.detach().flatten() for p in modules.parameters()]))


def test_log_std_gets_its_gradient():
    net = make(outputs=2, log_std=2)
    out = net.forward(torch.randn(4, 5))
    assert out.log_std.tolist() == [-0.5, -0.5]
    (out.params.sum() + out.values.sum() + (out.log_std * torch.tensor([2.0, -3.0])).sum()).backward()
    net.backward(out)
    assert net.log_std_grad.tolist() == [2.0, -3.0]
    assert net.grad[-2:].tolist() == [2.0, -3.0]


def test_initial_weights_are_orthogonal_with_the_gains_of_cleanrl():
    net = make()
    for mlp, last in ((net.actor, 0.01), (net.critic, 1.0)):
        for weight, bias, gain in zip(mlp.weights, mlp.biases, (math.sqrt(2), math.sqrt(2), last), strict=True):
            small = weight if weight.shape[0] <= weight.shape[1] else weight.t()
            torch.testing.assert_close(small @ small.t(), gain**2 * torch.eye(len(small)), atol=1e-5, rtol=1e-4)
            assert not bias.any()


def test_state_goes_round_and_foreign_shapes_are_refused():
    a, b = make(), make()
    b.flat.normal_()
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.flat, b.flat)
    with pytest.raises(ValueError, match="shapes"):
        b.load_state_dict(make((8,)).state_dict())
