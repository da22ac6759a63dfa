"""CUDA and Triton against the reference in float64 on the CPU: values, gradients, statistics.

The CPU kernels are held to the same truth by the same rule (tests/test_<op>.py, and tests/test_gpu_tools.py for the calls
here), so the backends agree with each other too; where they differ by more than rounding, the pairwise test says which.
"""

from __future__ import annotations

import pytest
import test_beta_log_prob as beta_laws
import test_categorical_log_prob as categorical_laws
import test_normal_log_prob as normal_laws
import torch
from conftest import assert_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from log_prob_laws import assert_parity
from loss_cases import CENTER, compare, log_probs, streams
from scan_cases import carried_cases, double, transposed
from scan_cases import cases as scan_cases

import ppo_fast as pf
from ppo_fast import reference

from . import cases
from .conftest import BACKENDS, DEVICE

each_backend = pytest.mark.parametrize("backend", BACKENDS)
few = settings(max_examples=25)  # each example may compile a Triton kernel


@each_backend
@pytest.mark.parametrize(("op", "i"), cases.SMALL)
def test_small(backend, op, i):
    cases.assert_parity_of(cases.small(op)[i], cases.on(backend, DEVICE, op))


@pytest.mark.parametrize(("op", "i"), cases.SMALL)
def test_reference_on_the_gpu(op, i):
    """Where no kernel runs, the specification does."""
    cases.assert_parity_of(cases.small(op)[i], cases.on("reference", DEVICE, op), kernel=False)


@each_backend
@pytest.mark.parametrize(("op", "i"), cases.SMALL)
def test_agrees_with_the_cpu(backend, op, i):
    """Named apart because it needs no reference: a few ulp of the largest magnitude, in whatever dtype a result has."""
    call = cases.small(op)[i]
    here = cases.outcome(call, getattr(pf, op))
    there = cases.outcome(call, cases.on(backend, DEVICE, op))
    size = 200.0 * call.size_of_log_prob  # sums in another order, exp of another library
    for name in here:
        if name in ("stats", "loss"):  # differences of terms: judged by test_small
            torch.testing.assert_close(there[name], here[name], rtol=1e-3, atol=1e-4, equal_nan=True)
            continue
        assert_as_good(there[name], None, here[name].double(), name, ulps=size)


# --- random calls, from the strategies of the CPU tests ---------------------------------------------------------------


def _scan(backend, op, case):
    names = {
        "gae": ("log_rhos",),
        "vtrace": ("mask_mode",),
        "discounted_returns": ("log_rhos", "values", "lam", "mask_mode"),
    }
    call = lambda f, c: f(**{k: v for k, v in c.items() if k not in names[op]})  # noqa: E731
    truth, eager = call(getattr(reference, op), double(case)), call(getattr(reference, op), case)
    for name, given_case in (("time-major", case), ("batch-major", transposed(case))):
        got = call(cases.on(backend, DEVICE, op), given_case)
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, eager, truth)), strict=True)
        for i, (a, e, t) in enumerate(pairs):
            a = a.t() if "time_dim" in given_case else a
            assert_as_good(a, e, t, f"{name} {i}")


@each_backend
@few
@given(case=scan_cases())
def test_gae(backend, case):
    _scan(backend, "gae", case)


@each_backend
@few
@given(case=carried_cases())
def test_vtrace(backend, case):
    _scan(backend, "vtrace", case)


@each_backend
@few
@given(case=carried_cases())
def test_discounted_returns(backend, case):
    _scan(backend, "discounted_returns", case)


@each_backend
@few
@given(case=categorical_laws.cases())
def test_categorical_log_prob(backend, case):
    logits, actions, options = case
    wide = {k: v.double() if k == "temperature" and isinstance(v, torch.Tensor) else v for k, v in options.items()}
    op = cases.on(backend, DEVICE, "categorical_log_prob")
    assert_parity(
        lambda z: op(z, actions, **options),
        lambda z: reference.categorical_log_prob(z, actions, **options),
        [logits],
        double=lambda z: reference.categorical_log_prob(z, actions, **wide),
        ulps=32.0 if logits.dtype == torch.float64 else 8.0,
    )


@each_backend
@few
@given(case=normal_laws.cases())
def test_normal_log_prob(backend, case):
    mean, log_std, actions, squash = case
    op = cases.on(backend, DEVICE, "normal_log_prob")
    wide = torch.float64 in (mean.dtype, log_std.dtype, actions.dtype)
    assert_parity(
        lambda m, s: op(m, s, actions, squash=squash),
        lambda m, s: reference.normal_log_prob(m, s, actions, squash=squash),
        [mean, log_std],
        double=lambda m, s: reference.normal_log_prob(m, s, actions.double(), squash=squash),
        ulps=32.0 if wide else 8.0,
    )


@each_backend
@few
@given(case=beta_laws.cases())
def test_beta_log_prob(backend, case):
    alpha, beta, actions, low, high = case
    op = cases.on(backend, DEVICE, "beta_log_prob")
    wide = torch.float64 in (alpha.dtype, actions.dtype)
    assert_parity(
        lambda a, b: op(a, b, actions, low=low, high=high),
        lambda a, b: reference.beta_log_prob(a, b, actions, low=low, high=high),
        [alpha, beta],
        double=lambda a, b: reference.beta_log_prob(a, b, actions.double(), low=low, high=high),
        ulps=2e7 if wide else 8.0,  # as in test_beta_log_prob.py: torch's trigamma is no better
    )


SHAPES = st.sampled_from([(1,), (5,), (300,), (7, 33)])
DTYPE = st.sampled_from(cases.DTYPES)


@each_backend
@few
@given(data=st.data(), shape=SHAPES, dtype=DTYPE, seed=st.integers(0, 2**31))
def test_ppo_loss(backend, data, shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    s = data.draw(streams(shape, g, dtype, CENTER))
    inputs = {"log_prob": log_probs(shape, g, dtype)}
    if data.draw(st.booleans()):
        inputs["entropy"] = torch.rand(shape, generator=g).to(dtype)
    if "returns" in s.stored:
        inputs["values"] = torch.randn(shape, generator=g).to(dtype)
    compare(cases.on(backend, DEVICE, "ppo_loss"), reference.ppo_loss, inputs, s)


@each_backend
@few
@given(
    data=st.data(), shape=SHAPES, width=st.sampled_from([1, 2, 18, 65, 1500]), dtype=DTYPE, seed=st.integers(0, 2**31)
)
def test_categorical_ppo_loss(backend, data, shape, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    s = data.draw(streams(shape, g, dtype))
    s.stored["actions"] = torch.randint(0, width, shape, generator=g)
    s.stored["old_log_prob"] = s.stored["old_log_prob"] - torch.tensor(float(width)).log().item()
    if data.draw(st.booleans()):
        allowed = torch.rand(*shape, width, generator=g) < 0.7
        s.stored["action_mask"] = allowed.scatter_(-1, s.stored["actions"][..., None], True)
    inputs = {"logits": torch.randn(*shape, width, generator=g).to(dtype)}
    if "returns" in s.stored:
        inputs["values"] = torch.randn(shape, generator=g).to(dtype)
    compare(cases.on(backend, DEVICE, "categorical_ppo_loss"), reference.categorical_ppo_loss, inputs, s)


@each_backend
@few
@given(data=st.data(), shape=SHAPES, width=st.sampled_from([1, 2, 6, 17, 70]), dtype=DTYPE, squash=st.booleans(),
       shared=st.booleans(), seed=st.integers(0, 2**31))  # fmt: skip
def test_normal_ppo_loss(backend, data, shape, width, dtype, squash, shared, seed):
    g = torch.Generator().manual_seed(seed)
    s = data.draw(streams(shape, g, dtype))
    mean = torch.randn(*shape, width, generator=g).to(dtype)
    log_std = (0.2 * torch.randn((width,) if shared else mean.shape, generator=g)).to(dtype)
    s.stored["actions"] = (mean + torch.randn(*shape, width, generator=g)).to(dtype)
    near = reference.normal_log_prob(mean.float(), log_std.float(), s.stored["actions"].float(), squash=squash)[0]
    for name in ("old_log_prob", "ref_log_prob", "rollout_log_prob"):
        if name in s.stored:
            s.stored[name] = (near + s.stored[name].float()).to(dtype)
    inputs = {"mean": mean, "log_std": log_std}
    if "returns" in s.stored:
        inputs["values"] = torch.randn(shape, generator=g).to(dtype)
    compare(cases.on(backend, DEVICE, "normal_ppo_loss"), reference.normal_ppo_loss, inputs, s, near.abs().max().item(),
            squash=squash)  # fmt: skip
