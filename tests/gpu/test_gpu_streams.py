"""Streams, devices and waiting: work goes to the current stream of the tensors' device, and nobody waits for it."""

from __future__ import annotations

import pytest
import torch
from ppo_fast.bench.gpu_timing import counted
from torch.profiler import ProfilerActivity, profile, record_function

import ppo_fast as pf
from ppo_fast import _workspace

from . import cases
from .conftest import BACKENDS, DEVICE, needs_cuda

pytestmark = needs_cuda
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_op = pytest.mark.parametrize("op", cases.OPS)


@each_backend
@each_op
def test_current_stream(backend, op):
    """Inputs are filled on a side stream long after the call has returned: only work on that stream sees them."""
    target, stale = (cases.there(cases.small(op, seed=seed)[0], DEVICE) for seed in (1, 0))
    with pf.use_backend(backend):
        wanted = cases.outcome(target, getattr(pf, op))  # also compiles whatever there is to compile
        given = None
        if op in cases.LOG_PROBS:
            given = cases.upstream(getattr(pf, op)(**target.arguments))
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(300_000_000)  # a sixth of a second or so
            for mine, other in ((stale.inputs, target.inputs), (stale.rest, target.rest)):
                for name, x in mine.items():
                    if isinstance(x, torch.Tensor):
                        x.copy_(other[name])
            got = cases.outcome(stale, getattr(pf, op), given)
        assert not side.query(), "the call waited for its stream"
        side.synchronize()
    assert not cases.same(got, wanted)


@each_backend
def test_first_call_on_a_busy_stream(backend):
    """What the first call of a process prepares on its stream, behind other work, is not there yet for a second stream."""
    call = cases.there(cases.small("ppo_loss")[3], DEVICE)
    with pf.use_backend(backend):
        wanted = cases.outcome(call, pf.ppo_loss)
        torch.cuda.synchronize()
        _workspace._of_stream.clear()
        busy, idle = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(busy):
            torch.cuda._sleep(200_000_000)
            first = cases.outcome(call, pf.ppo_loss)
        with torch.cuda.stream(idle):
            second = cases.outcome(call, pf.ppo_loss)
        torch.cuda.synchronize()
    assert not cases.same(second, wanted) and not cases.same(first, wanted)


@each_backend
@each_op
def test_second_device(backend, op):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    call = cases.small(op)[0]
    with pf.use_backend(backend):
        here = cases.outcome(cases.there(call, "cuda:0"), getattr(pf, op))
        there = cases.outcome(cases.there(call, "cuda:1"), getattr(pf, op))
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda:1") for x in there.values())
    assert not cases.same({k: v.cpu() for k, v in here.items()}, {k: v.cpu() for k, v in there.items()})


@each_backend
@each_op
def test_no_waiting_by_torch(backend, op):
    """torch's own alarm: copies to the host, .item(), nonzero and the like."""
    for call in cases.small(op):
        call = cases.there(call, DEVICE)
        with pf.use_backend(backend):
            given = cases.upstream(getattr(pf, op)(**call.arguments)) if op in cases.LOG_PROBS else None
            cases.outcome(call, getattr(pf, op), given)
            torch.cuda.set_sync_debug_mode("error")
            try:
                cases.outcome(call, getattr(pf, op), given)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@each_backend
@each_op
def test_no_waiting_by_the_driver(backend, op, plain_memory):
    """What torch does not see: synchronisations and allocations inside the kernels' launchers, as CUPTI reports them."""
    call = cases.there(cases.small(op)[0], DEVICE)
    with pf.use_backend(backend):
        given = cases.upstream(getattr(pf, op)(**call.arguments)) if op in cases.LOG_PROBS else None
        for _ in range(2):
            cases.outcome(call, getattr(pf, op), given)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            with record_function("the call"):
                cases.outcome(call, getattr(pf, op), given)
            torch.cuda.synchronize()
    events = seen.events()
    counts = counted(events, "the call")
    assert counts.launches > 0, "the profiler saw no kernel: nothing is proven"
    assert counts.syncs == 0
    span = next(e.time_range for e in events if e.name == "the call")
    inside = {e.name for e in events if span.start <= e.time_range.start <= span.end}
    assert not {
        name for name in inside if name.startswith(("cudaMalloc", "cudaFree", "cuMemAlloc", "cuMemFree", "cuMemCreate"))
    }


@each_backend
def test_launches_of_a_loss(backend, plain_memory):
    """CUDA: one kernel for loss, gradients and statistics, one that looks whether the gradient of the loss is 1. Triton has
    no last block that finishes, so partial sums are joined by kernels of their own."""
    call = cases.there(cases.small("ppo_loss")[3], DEVICE)
    leaves = [v.requires_grad_() for v in call.inputs.values()]
    with pf.use_backend(backend):
        for _ in range(3):
            torch.autograd.grad(pf.ppo_loss(**call.arguments).loss, leaves)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            with record_function("the call"):
                torch.autograd.grad(pf.ppo_loss(**call.arguments).loss, leaves)
            torch.cuda.synchronize()
    counts = counted(seen.events(), "the call")
    most = 2 if backend == "cuda" else 4
    assert 1 <= counts.launches - counts.foreign <= most, [e.name for e in seen.events()]
    assert counts.foreign <= 1 and counts.syncs == 0


@each_backend
def test_threads_share_a_device(backend):
    """Python threads with a stream each: tickets and scratch memory are not shared between streams."""
    import threading

    calls = [cases.there(cases.small("ppo_loss", seed=seed)[3], DEVICE) for seed in range(4)]
    with pf.use_backend(backend):
        wanted = [cases.outcome(call, pf.ppo_loss) for call in calls]
        torch.cuda.synchronize()
        wrong = []

        def work(i):
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    got = cases.outcome(calls[i], pf.ppo_loss)
                torch.cuda.current_stream().synchronize()
                wrong.extend(cases.same(got, wanted[i]))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong
