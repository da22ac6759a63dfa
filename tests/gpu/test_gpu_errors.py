"""Bad input on a GPU: one line that names the argument, nothing left on the stream, and no error of CUDA's in a later call."""

from __future__ import annotations

import math

import pytest
import torch

import ppo_fast as pf

from . import cases
from .conftest import BACKENDS, DEVICE, needs_cuda

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def works(backend):
    """The device takes calls, and gives right results."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    x = torch.arange(5.0, device=DEVICE)
    with pf.use_backend(backend):
        y = pf.whiten(x)
    torch.testing.assert_close(y, (x - 2) / x.std())


@needs_cuda
@each_backend
@pytest.mark.parametrize("op", cases.OPS)
def test_a_cpu_tensor_among_the_rest(backend, op):
    """Every argument but the first, which decides the device."""
    seen = 0
    for call in cases.small(op)[:3]:
        there = cases.there(call, DEVICE)
        tensors = [k for k, v in call.arguments.items() if isinstance(v, torch.Tensor)]
        for name in tensors[1:]:
            wrong = {**there.arguments, name: call.arguments[name]}
            with pf.use_backend(backend), pytest.raises(TypeError, match=rf"{op}: {name} .*must be on cuda:0"):
                getattr(pf, op)(**wrong)
            seen += 1
    assert seen or op == "whiten"
    works(backend)


@needs_cuda
@each_backend
@pytest.mark.parametrize("op", cases.OPS)
def test_the_first_on_the_cpu(backend, op):
    """Then a forced backend says what it takes, and without force the CPU's kernels say what they miss."""
    call = cases.small(op)[0]
    there = cases.there(call, DEVICE)
    first = next(iter(call.inputs))
    wrong = {**there.arguments, first: call.inputs[first]}
    with pf.use_backend(backend), pytest.raises(ValueError, match=f"{op}: backend '{backend}' takes tensors on"):
        getattr(pf, op)(**wrong)
    if len([v for v in call.arguments.values() if isinstance(v, torch.Tensor)]) > 1:
        with pytest.raises(TypeError, match=rf"{op}: \w+.* must be on"):
            getattr(pf, op)(**wrong)
    works(backend)


@needs_cuda
@each_backend
def test_two_devices(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x = [torch.zeros(5, device="cuda:0"), torch.zeros(5, device="cuda:0"), torch.zeros(5, device="cuda:1")]
    with pf.use_backend(backend), pytest.raises(TypeError, match="ppo_loss: advantages must be on cuda:0"):
        pf.ppo_loss(*x)
    works(backend)


@each_backend
def test_shapes_and_dtypes_are_named(backend):
    x, n = torch.zeros(10, device=DEVICE), torch.zeros(10, 1, device=DEVICE)
    wrong = (
        (ValueError, r"ppo_loss: old_log_prob must be .*\[10\], got \[10, 1\]", lambda: pf.ppo_loss(x, n, x)),
        (TypeError, "ppo_loss: advantages must be float32", lambda: pf.ppo_loss(x, x, x.long())),
        (ValueError, r"gae: values must be \[T, N\] = \[10, 1\], got \[10\]", lambda: pf.gae(n, x)),
        (ValueError, r"categorical_log_prob: actions must be .*\[10\], got \[10, 1\]",
         lambda: pf.categorical_log_prob(torch.zeros(10, 3, device=DEVICE), n.long())),
        (ValueError, r"normal_log_prob: actions must be .*\[10, 1\], got \[10\]", lambda: pf.normal_log_prob(n, n[0], x)),
        (ValueError, r"whiten: mask must be .*\[10\], got \[10, 1\]", lambda: pf.whiten(x, mask=n)),
    )  # fmt: skip
    for error, message, call in wrong:
        with pf.use_backend(backend), pytest.raises(error, match=message):
            call()
    works(backend)


def labelled(op, bad):
    """(the call with one label out of range, its place among the labels, the same call with a good one there)."""
    n, width, row = 70, 6, 41
    labels = torch.randint(width, (n,), device=DEVICE)
    logits = torch.randn(n, width, device=DEVICE)
    ones = torch.ones(n, device=DEVICE)
    wrong = labels.clone()
    wrong[row] = bad

    def run(actions):
        if op == "categorical_log_prob":
            return pf.categorical_log_prob(logits, actions)[0]
        if op == "multi_categorical_log_prob":
            return pf.multi_categorical_log_prob(logits, torch.stack([actions, labels * 0], 1), (width - 1, 1))[0]
        return pf.categorical_ppo_loss(logits, actions, ones, ones).loss

    if op != "multi_categorical_log_prob":
        return lambda: run(wrong), row, lambda: run(labels)
    labels.clamp_(max=width - 2)
    return lambda: run(wrong), 2 * row, lambda: run(labels)  # the first of two heads


@needs_cuda
@each_backend
@pytest.mark.parametrize("bad", [-1, 6, 2**40, -(2**62)])
@pytest.mark.parametrize("op", ["categorical_log_prob", "multi_categorical_log_prob", "categorical_ppo_loss"])
def test_labels_out_of_range_are_said_by_a_later_call(backend, op, bad):
    """Nothing is read out of bounds, the call itself does not wait, and the next one raises, once."""
    wrong, row, right = labelled(op, bad)
    with pf.use_backend(backend):
        wanted = right()
        wrong()
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=rf"{op}: actions must be .*got {bad} at {row} in an earlier call"):
            pf.whiten(torch.randn(5, device=DEVICE))
        assert torch.equal(right(), wanted)
    works(backend)


@needs_cuda
@each_backend
def test_what_is_ignored_or_masked_out_is_not_said(backend):
    n = 300
    logits, actions, x = (
        torch.randn(n, 6, device=DEVICE),
        torch.zeros(n, device=DEVICE).long(),
        torch.ones(n, device=DEVICE),
    )
    actions[50:90] = -100
    mask = actions >= 0
    with pf.use_backend(backend):
        log_prob, _ = pf.categorical_log_prob(logits, actions, ignore_index=-100)
        out = pf.categorical_ppo_loss(logits, actions, x, x, mask=mask)
        torch.cuda.synchronize()
        assert not log_prob[50:90].any() and log_prob[mask].all()
        assert math.isfinite(out.stats.to_dict()["policy_loss"])
    works(backend)


@needs_cuda
@each_backend
def test_a_captured_call_says_it_too(backend):
    """The graph notes what its replay meets, in memory that outlives it."""
    wrong, row, right = labelled("categorical_log_prob", 9)
    with pf.use_backend(backend):
        right()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            wrong()
        for _ in range(2):
            graph.replay()
            torch.cuda.synchronize()
            with pytest.raises(ValueError, match=rf"got 9 at {row} in an earlier call"):
                right()
    works(backend)


@needs_cuda
@each_backend
def test_statistics_that_are_read_say_it_too(backend):
    """Whoever reads the statistics waits for the kernel anyway."""
    ones = torch.ones(9, device=DEVICE)
    with pf.use_backend(backend):
        out = pf.categorical_ppo_loss(torch.zeros(9, 3, device=DEVICE), ones.long() * 5, ones, ones)
        with pytest.raises(ValueError, match=r"categorical_ppo_loss: actions must be .*got 5 at"):
            out.stats.to_dict()
    works(backend)


@each_backend
@pytest.mark.parametrize("bad", [-1, 6, 2**40, -(2**62)])
def test_rows_beside_a_bad_label_are_as_ever(backend, bad):
    if DEVICE == "cpu":
        pytest.skip("a CPU raises at once")
    wrong, row, right = labelled("categorical_log_prob", bad)
    with pf.use_backend(backend):
        wanted, got = right(), wrong()
        torch.cuda.synchronize()
        others = torch.arange(len(got), device=DEVICE) != row
        assert torch.equal(got[others], wanted[others])
        with pytest.raises(ValueError, match="in an earlier call"):
            right()
    works(backend)


@needs_cuda
@each_backend
@pytest.mark.parametrize("op", ["categorical_ppo_loss", "normal_ppo_loss"])
def test_an_index_out_of_range(backend, op):
    """Of the minibatch's gather: the same late error, by its own name."""
    n, stored = 50, 200
    logits, x = torch.randn(n, 6, device=DEVICE), torch.ones(stored, device=DEVICE)
    index = torch.randint(stored, (n,), device=DEVICE)
    index[7] = stored
    actions = torch.zeros(stored, dtype=torch.long, device=DEVICE)
    with pf.use_backend(backend):
        if op == "normal_ppo_loss":
            pf.normal_ppo_loss(logits, logits[0], torch.randn(stored, 6, device=DEVICE), x, x, index=index)
        else:
            pf.categorical_ppo_loss(logits, actions, x, x, index=index)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match=rf"{op}: index must be .*got {stored} at 7 in an earlier call"):
            pf.whiten(x)
    works(backend)


@each_backend
def test_empty(backend):
    """Nothing to do is nothing launched, or at least nothing wrong."""
    z = torch.empty(0, 5, device=DEVICE, requires_grad=True)
    none = torch.empty(0, device=DEVICE)
    with pf.use_backend(backend):
        log_prob, entropy = pf.categorical_log_prob(z, none.long())
        (log_prob.sum() + entropy.sum()).backward()
        assert z.grad.shape == (0, 5)
        leaf = none.clone().requires_grad_()
        out = pf.ppo_loss(leaf, none, none)
        out.loss.backward()
        assert out.loss.item() == 0.0
        for shape in ((0, 3), (3, 0), (0,)):
            x = torch.empty(shape, device=DEVICE)
            assert pf.gae(x, x)[0].shape == shape
        assert pf.whiten(none).shape == (0,)
    works(backend)
