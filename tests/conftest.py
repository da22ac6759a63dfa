"""Shared by all tests: one fixture per thing a result must not depend on, and the rule by which a result passes."""

from __future__ import annotations

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, torch.compile included

import hypothesis
import pytest
import torch

import ppo_fast as pf
from ppo_fast import _C

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.register_profile("short", derandomize=True, deadline=None, max_examples=12)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def supported_isas() -> list[str]:
    best = _C.isa()
    found = []
    for name in ("base", "v3", "v4"):
        try:
            _C.set_isa(name)
        except ValueError:
            continue
        found.append(name)
    _C.set_isa(best)
    return found


ISAS = supported_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once per instruction set that this processor has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def clean_state():
    """A test leaves threads, default dtype and instruction set as they were; outputs start poisoned with NaN."""
    threads, isa_before = torch.get_num_threads(), _C.isa()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty is NaN: what a kernel forgets shows
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    _C.set_isa(isa_before)


@pytest.fixture
def late(monkeypatch):
    """Triton's interpreter says of labels out of range as late as a GPU does; by the end of the test it has."""
    from ppo_fast.kernels import _reports

    monkeypatch.setattr(_reports, "raise_early", lambda device: None)
    yield
    _reports.raise_reported()


def as_double(x):
    """The same tensor in float64, a leaf if it required grad; everything else as it is."""
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def assert_as_good(actual, eager, truth, what="", ulps=8.0):
    """The rule of the design: error against float64 at most twice that of eager torch in the same dtype, plus a few ulp.

    `ulps` are of the tensor's largest magnitude, so that sums which cancel are judged by what was summed.
    """
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    same = (actual.double() == truth) | (actual.isnan() & truth.isnan())
    if bool(same.all()):
        return
    finite = truth.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{what}: not finite where the truth is, or the other way round"
    assert bool(same[~finite].all()), f"{what}: wrong infinity"
    scale = truth[finite].abs().max().item() if bool(finite.any()) else 0.0
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - truth)[finite].abs().max().item()
    eager_error = (eager.double() - truth)[finite].abs().max().item() if eager is not None else 0.0
    if eager_error != eager_error:
        eager_error = 0.0
    bound = 2.0 * eager_error + ulps * eps * scale
    assert error <= bound, f"{what}: error {error:.3e} > {bound:.3e} (eager's {eager_error:.3e}, scale {scale:.3e})"


def same_bits(a, b) -> bool:
    """Equal tensor for tensor, NaN for NaN."""
    pairs = list(zip(a, b, strict=True))
    return all(x.dtype == y.dtype and torch.equal(x.nan_to_num(1e30), y.nan_to_num(1e30)) for x, y in pairs) and all(
        torch.equal(x.isnan(), y.isnan()) for x, y in pairs
    )


__all__ = ["ISAS", "as_double", "assert_as_good", "pf", "same_bits"]
