"""TorchRL: its two functions against ours, and its modules with ours in their place."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchrl")
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.objectives.value import GAE, functional

from ppo_fast.integrations import torchrl as ours

PAIRS = {
    "loop": (functional.generalized_advantage_estimate, ours.generalized_advantage_estimate),
    "convolution": (functional.vec_generalized_advantage_estimate, ours.vec_generalized_advantage_estimate),
}


def inputs(*shape, dtype=torch.float32, ends=0.1):
    generator = torch.Generator().manual_seed(0)
    value, after, reward = torch.randn(3, *shape, generator=generator, dtype=dtype)
    done = torch.rand(shape, generator=generator) < ends
    terminated = done & (torch.rand(shape, generator=generator) < 0.5)
    return {"state_value": value, "next_state_value": after, "reward": reward, "done": done, "terminated": terminated}


def same(expected, got, tolerance=2e-5):
    for x, y in zip(expected, got, strict=True):
        assert y.shape == x.shape and y.dtype == x.dtype
        torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape, time_dim", [
    ((7, 2), -2), ((3, 50, 1), -2), ((3, 50, 1), 1), ((2, 3, 20, 2), -2), ((2, 20, 3, 1), 1), ((20, 4, 2), 0), ((1, 1), 0),
    ((2, 20, 3), -2), ((4, 30), -1), ((0, 5, 1), -2),
])  # fmt: skip
@pytest.mark.parametrize("gamma, lmbda", [(0.99, 0.95), (1.0, 1.0), (torch.tensor(0.9), torch.tensor([0.5]))])
@pytest.mark.parametrize("ends", [0.0, 0.1, 1.0])
def test_functions(kind, dtype, shape, time_dim, gamma, lmbda, ends):
    theirs, mine = PAIRS[kind]
    x = inputs(*shape, dtype=dtype, ends=ends)
    if 0 in shape:
        theirs = functional.generalized_advantage_estimate
    same(theirs(gamma, lmbda, **x, time_dim=time_dim), mine(gamma, lmbda, **x, time_dim=time_dim))


@pytest.mark.parametrize("kind", PAIRS)
def test_without_terminated_and_views(kind):
    theirs, mine = PAIRS[kind]
    x = {name: tensor.transpose(0, 1)[::2] for name, tensor in inputs(30, 8, 2).items()}
    del x["terminated"]
    same(theirs(0.9, 0.9, **x), mine(0.9, 0.9, **x))


def test_lambda_zero():
    x = inputs(3, 20, 1)
    same(
        functional.generalized_advantage_estimate(0.9, 0.0, **x), ours.vec_generalized_advantage_estimate(0.9, 0.0, **x)
    )


def test_behind_the_end_of_an_episode_nothing_is_read():
    x = inputs(2, 10, 1, ends=0.0)
    x["done"][:, 4] = x["terminated"][:, 4] = True
    expected = ours.vec_generalized_advantage_estimate(0.9, 0.9, **x)
    x["reward"][:, 5:] = torch.nan
    got = ours.vec_generalized_advantage_estimate(0.9, 0.9, **x)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a[:, :5], b[:, :5])


ELSEWHERE = {
    "rates of every step": {"gamma": torch.rand(3, 20, 1)},
    "flags as integers": {"done": torch.zeros(3, 20, 1, dtype=torch.int8)},
    "half": {name: x.bfloat16() for name, x in inputs(3, 20, 1).items() if x.is_floating_point()},
    "mixed": {"reward": torch.randn(3, 20, 1).double()},
    "large": {"gamma": 1.2},
    "requires grad": {"state_value": torch.randn(3, 20, 1, requires_grad=True)},
    "a rate that requires grad": {"lmbda": torch.tensor(0.5, requires_grad=True)},
    "shapes": {"reward": torch.randn(3, 20, 2)},
    "time": {"time_dim": 5},
    "one dimension": {name: x[0, :, 0] for name, x in inputs(3, 20, 1).items()} | {"time_dim": -1},
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_the_rest_is_theirs(case, monkeypatch):
    called = []
    mine = ours.in_place_of(lambda *a, **k: called.append((a, k)))
    mine(**({"gamma": 0.9, "lmbda": 0.9} | inputs(3, 20, 1) | ELSEWHERE[case]))
    assert len(called) == 1


def test_gradients_are_theirs():
    theirs, mine = PAIRS["loop"]
    grads = []
    for function in (theirs, mine):
        x = inputs(3, 20, 1)
        x["state_value"].requires_grad_()
        function(0.9, 0.9, **x)[0].square().sum().backward()
        grads.append(x["state_value"].grad)
    assert torch.equal(*grads)


def test_vmap_is_theirs():
    mine = ours.in_place_of(lambda *x, **_: (x[4] + 1, x[4]))
    x = inputs(4, 3, 20, 1)
    names = list(x)
    got, _ = torch.vmap(lambda *tensors: mine(0.9, 0.9, **dict(zip(names, tensors, strict=True))))(*x.values())
    assert torch.equal(got, x["reward"] + 1)


def test_compiled():
    mine = torch.compile(
        lambda **x: ours.generalized_advantage_estimate(0.9, 0.9, **x), backend="eager", fullgraph=True
    )
    x = inputs(3, 20, 1)
    same(PAIRS["loop"][0](0.9, 0.9, **x), mine(**x))


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("options", [{}, {"average_gae": True}, {"auto_reset_env": True}])
def test_the_module(vectorized, options, monkeypatch):
    torch.manual_seed(0)
    network = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["obs"], out_keys=["state_value"])
    x = inputs(4, 25, 1)
    after = {"obs": torch.randn(4, 25, 3), "reward": x["reward"], "done": x["done"], "terminated": x["terminated"],
             "truncated": x["done"] & ~x["terminated"]}  # fmt: skip
    data = TensorDict({"obs": torch.randn(4, 25, 3), "next": after}, [4, 25])
    module = GAE(gamma=0.98, lmbda=0.94, value_network=network, vectorized=vectorized, **options)
    expected = module(data.clone())
    calls = []
    monkeypatch.setattr(
        ours, "discounted_returns", lambda *a, f=ours.discounted_returns, **k: calls.append(a) or f(*a, **k)
    )
    with ours.enabled():
        got = module(data.clone())
    assert len(calls) == 1
    for name in ("advantage", "value_target"):
        torch.testing.assert_close(got[name], expected[name], rtol=2e-5, atol=2e-5)
