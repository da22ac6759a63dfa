"""CUDA graphs: every op is captured, forward and backward, and replayed with other inputs in the same memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import ppo_fast as pf
from ppo_fast import _workspace

from . import cases
from .conftest import BACKENDS, DEVICE, needs_cuda

pytestmark = needs_cuda
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def captured(run, warm_up=2):
    """(graph, what `run` returned while it was captured)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def put_into(to, source):
    """Other numbers into the same memory, argument by argument."""
    for mine, other in ((to.inputs, source.inputs), (to.rest, source.rest)):
        for name, x in mine.items():
            if isinstance(x, torch.Tensor):
                x.copy_(other[name])


@each_backend
@pytest.mark.parametrize(("op", "i"), cases.SMALL)
def test_replay_with_changed_inputs(backend, op, i):
    static = cases.there(cases.small(op, seed=0)[i], DEVICE)
    given = None
    with pf.use_backend(backend):
        if op in cases.LOG_PROBS:
            given = cases.upstream(getattr(pf, op)(**static.arguments))
        graph, result = captured(lambda: cases.outcome(static, getattr(pf, op), given))
        for seed in (1, 2, 0):
            fresh = cases.there(cases.small(op, seed=seed)[i], DEVICE)
            put_into(static, fresh)
            graph.replay()
            graph.replay()  # a ticket that the first had not given back would show
            assert not cases.same(result, cases.outcome(fresh, getattr(pf, op), given))


@each_backend
def test_two_captured_calls_side_by_side(backend):
    """Each captured call counts its blocks in a ticket of its own: graphs may run at once."""
    calls = [cases.there(cases.small("ppo_loss", seed=seed)[3], DEVICE) for seed in (1, 2)]
    with pf.use_backend(backend):
        wanted = [cases.outcome(call, pf.ppo_loss) for call in calls]
        graphs = [captured(lambda call=call: cases.outcome(call, pf.ppo_loss)) for call in calls]
        streams = [torch.cuda.Stream() for _ in calls]
        torch.cuda.synchronize()
        for _ in range(20):
            for (graph, _), stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
    for (_, result), want in zip(graphs, wanted, strict=True):
        assert not cases.same(result, want)


@each_backend
def test_first_calls_of_all_are_captured(backend):
    """What a call needs once (tickets that start at 0) must not be made by the graph: it runs later, or never, or again."""
    call = cases.there(cases.small("ppo_loss")[3], DEVICE)
    with pf.use_backend(backend):
        wanted = cases.outcome(call, pf.ppo_loss)
        _workspace._of_stream.clear()
        junk = torch.full((1 << 20,), 7, dtype=torch.int32, device=DEVICE)  # what fresh memory may hold
        del junk
        graph, result = captured(lambda: cases.outcome(call, pf.ppo_loss), warm_up=0)
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            assert not cases.same(cases.outcome(call, pf.ppo_loss), wanted)  # before the graph has run at all
        for _ in range(2):
            graph.replay()
            assert not cases.same(result, wanted)
            assert not cases.same(cases.outcome(call, pf.ppo_loss), wanted)


@each_backend
@pytest.mark.parametrize("shape", [(20, 6), (1040, 70), (5, 40_000)])
@pytest.mark.parametrize("time_dim", [0, 1])
def test_advantages_and_their_moments(backend, shape, time_dim):
    """Whitened by sums that the scan took."""
    rewards, values = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)

    def white():
        advantages, returns, moments = pf.gae(rewards, values, time_dim=time_dim, moments=True)
        return torch.cat([pf.whiten(advantages, moments=moments).flatten(), returns.flatten(), moments.float()])

    with pf.use_backend(backend):
        graph, result = captured(white)
        for _ in range(3):
            rewards.normal_()
            graph.replay()
            graph.replay()
            assert torch.equal(result, white())


@each_backend
def test_a_whole_update(backend):
    """Advantages, a network, the loss, its backward and an optimizer's step in one graph: the same parameters as without."""
    torch.manual_seed(1)
    steps, envs, width, actions = 16, 8, 5, 4
    obs = torch.randn(steps, envs, width, device=DEVICE)
    rewards, values = torch.randn(steps, envs, device=DEVICE), torch.randn(steps, envs, device=DEVICE)
    taken = torch.randint(actions, (steps * envs,), device=DEVICE)
    old = torch.full((steps * envs,), -1.4, device=DEVICE)
    config = pf.LossConfig.preset("cleanrl")

    def learner():
        torch.manual_seed(2)
        net = torch.nn.Linear(width, actions + 1).to(DEVICE)
        return net, torch.optim.Adam(net.parameters(), lr=1e-2, capturable=True)

    def update(net, optimizer):
        advantages, returns = pf.gae(rewards, values, gamma=0.99)
        out = net(obs.view(-1, width))
        loss = pf.categorical_ppo_loss(out[:, :actions], taken, old, advantages.flatten(), config, values=out[:, actions],
                                       old_values=values.flatten(), returns=returns.flatten())  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.loss.backward()
        optimizer.step()
        return loss.stats.vector

    with pf.use_backend(backend):
        plain = learner()
        for _ in range(6):
            wanted = update(*plain)
        net, optimizer = learner()
        graph, stats = captured(
            lambda: update(net, optimizer), warm_up=3
        )  # three steps are taken here, none by capturing
        for _ in range(3):
            graph.replay()
    assert torch.allclose(stats, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(net.parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@each_backend
@pytest.mark.parametrize("op", cases.LOSSES)
def test_annealed_numbers_change_between_replays(backend, op):
    """`config.on(device)`: a captured graph reads at each replay what was set last."""
    if not hasattr(pf.LossConfig, "on"):
        pytest.skip("the numbers of a LossConfig cannot lie on the device yet")
    plain = pf.LossConfig.preset("cleanrl")
    static = cases.there(cases.small(op)[1], DEVICE)
    static.rest["config"] = config = plain.on(DEVICE)
    with pf.use_backend(backend):
        graph, result = captured(lambda: cases.outcome(static, getattr(pf, op)))
        for clip, entropy_coef in ((0.2, 0.01), (0.1, 0.0), (0.05, 0.3)):
            config.set(clip_low=clip, clip_high=clip, entropy_coef=entropy_coef)
            graph.replay()
            numbers = {"clip_low": clip, "clip_high": clip, "entropy_coef": entropy_coef}
            static.rest["config"] = dataclasses.replace(plain, **numbers)
            assert not cases.same(result, cases.outcome(static, getattr(pf, op)))
