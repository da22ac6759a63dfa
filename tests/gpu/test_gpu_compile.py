"""Under torch.compile on a GPU: registered ops that torch's own checks accept, whole graphs, and one run of max-autotune."""

from __future__ import annotations

import math

import pytest
import torch

import ppo_fast as pf
from ppo_fast.ops.gae import _op as gae_op
from ppo_fast.ops.ppo_loss import _op as ppo_loss_op

from . import cases
from .conftest import BACKENDS, DEVICE

pytestmark = pytest.mark.usefixtures("plain_memory")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def on_device(*values):
    return tuple(cases.moved(v, DEVICE) for v in values)


def opcheck_arguments():
    """Name → (op, arguments), on the CPU."""
    ops, z, labels = torch.ops.ppo_fast, torch.randn(5, 7, requires_grad=True), torch.randint(0, 7, (5,))
    mask, rows = torch.rand(5, 7) > 0.2, torch.rand(5) + 0.5
    steps = {k: torch.randn(6, 3) for k in ("rewards", "values")}
    ends = torch.rand(6, 3) < 0.1
    loss = cases.small("ppo_loss")[0]
    config = pf.LossConfig.preset("cleanrl")
    inputs = [loss.inputs[k].requires_grad_() for k in ("log_prob", "values", "entropy")]
    stored = [loss.rest[k] for k in ("old_log_prob", "advantages", "old_values", "returns")]
    positive = [(torch.rand(5, 3) + 0.5).requires_grad_() for _ in range(2)]
    return {
        "categorical_log_prob": (ops.categorical_log_prob.default, (z, labels, mask, rows, 1.0, None, True)),
        "normal_log_prob": (ops.normal_log_prob.default, (z, torch.randn(7, requires_grad=True), torch.randn(5, 7), False, True)),
        "bernoulli_log_prob": (ops.bernoulli_log_prob.default, (z, (torch.rand(5, 7) < 0.5).float(), True)),
        "beta_log_prob": (ops.beta_log_prob.default, (*positive, torch.rand(5, 3), 0.0, 1.0, True)),
        "whiten": (ops.whiten.default, (torch.randn(50), torch.rand(50) < 0.7, 1, 1e-8, True, False)),
        "gae": (gae_op, (steps["rewards"], steps["values"], torch.randn(3), ends, None, None, None, None, "carry", None, 0.9,
                         None, 0.0, torch.rand(3), 0)),
        "ppo_loss": (ppo_loss_op.op, (*inputs, *stored, None, None, loss.rest["mask"], None, math.nan, False,
                                      *(config.numbers_vector, *config.choices()))),
    }  # fmt: skip


@each_backend
@pytest.mark.parametrize("name", opcheck_arguments())
def test_opcheck(backend, name):
    op, arguments = opcheck_arguments()[name]
    numbers = pf.LossConfig.preset("cleanrl").numbers_vector
    there = tuple(x if x is numbers else on_device(x)[0] for x in arguments)  # a config's numbers stay on the host
    if name == "ppo_loss":
        there = (*there[: -1 - len(pf.LossConfig().choices())], numbers, *pf.LossConfig.preset("cleanrl").choices())
    with pf.use_backend(backend):
        torch.library.opcheck(op, there)


@each_backend
@pytest.mark.parametrize("op", cases.OPS)
def test_whole_graph(backend, op):
    """No graph break, and the results of the same call without torch.compile, bit for bit: the kernel is one node."""
    torch._dynamo.reset()
    call = cases.there(cases.small(op)[0], DEVICE)
    function = getattr(pf, op)
    with pf.use_backend(backend):
        plain = cases.outcome(call, function)
        given = cases.upstream(function(**call.arguments)) if op in cases.LOG_PROBS else None
        got = cases.outcome(call, torch.compile(function, fullgraph=True, backend="aot_eager"), given)
    for name in plain:
        if name.startswith("d "):  # autograd of a registered op multiplies by the gradient that comes in
            torch.testing.assert_close(got[name], plain[name], equal_nan=True)
        else:
            assert not cases.same({name: got[name]}, {name: plain[name]}), name


@each_backend
@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_inductor(backend, mode):
    """In the middle of other operations, forward and backward, several calls; max-autotune captures CUDA graphs."""
    if DEVICE == "cpu" and mode != "default":
        pytest.skip("of CUDA graphs")
    torch._dynamo.reset()
    width, n, config = 6, 300, pf.LossConfig.preset("cleanrl")
    weight = (0.3 * torch.randn(8, width, device=DEVICE)).requires_grad_()
    features, labels = torch.randn(n, 8, device=DEVICE), torch.randint(width, (n,), device=DEVICE)
    old, advantages = torch.full((n,), -1.8, device=DEVICE), torch.randn(n, device=DEVICE)

    def step(features, advantages):
        log_prob, entropy = pf.categorical_log_prob(features @ weight, labels)
        return pf.ppo_loss(log_prob, old, pf.whiten(advantages), config, entropy=entropy).loss * 2.0

    with pf.use_backend(backend):
        fast = torch.compile(step, fullgraph=True, mode=mode)
        for scale in (1.0, 2.0, 0.5, 1.5):
            loss = fast(features * scale, advantages)
            (grad,) = torch.autograd.grad(loss, weight)
            wanted = step(features * scale, advantages)
            torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(grad, torch.autograd.grad(wanted, weight)[0], rtol=1e-3, atol=1e-5)
