"""Sequences longer than any tile that a scan walks in: what crosses from tile to tile, on every backend."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_as_good, same_bits

import ppo_fast as pf
from ppo_fast import reference

#: Steps: around the borders of a GPU's tiles (128 and 512 of float32, half as many of float64) and beyond several.
LENGTHS = [127, 129, 511, 520, 1100]


def trajectories(steps, columns, dtype=torch.float32, mask="stretches", seed=0):
    """Episodes of about a hundred steps, and masks that leave out whole tiles."""
    g = torch.Generator().manual_seed(seed)
    shape = (steps, columns)

    def randn(*size):
        return torch.randn(*size, generator=g).to(dtype)

    case = {
        "rewards": randn(*shape), "values": randn(*shape), "last_values": randn(columns),
        "terminated": torch.rand(shape, generator=g) < 0.01, "truncated": torch.rand(shape, generator=g) < 0.01,
    }  # fmt: skip
    case["final_values"] = torch.where(case["truncated"] & ~case["terminated"], randn(*shape), torch.nan)
    if mask == "stretches":
        keep = torch.rand(shape, generator=g) < 0.7
        for n in range(columns):
            start = int(torch.randint(max(steps, 1), (), generator=g))
            keep[start : start + steps // 2, n] = False
        case["mask"] = keep
    return case


def hidden(case, carry=True):
    """NaN wherever nothing may be read."""
    out = dict(case)
    if case.get("mask") is not None:
        for name in ("rewards", "values", "log_rhos", *(["final_values"] if carry else [])):
            if name in case:
                out[name] = torch.where(case["mask"], case[name], torch.nan)
    return out


def double(case):
    return {k: v.double() if v.is_floating_point() else v for k, v in case.items()}


def transposed(case):
    return {k: v.t() if v.ndim == 2 else v for k, v in case.items()} | {"time_dim": 1}


@pytest.mark.parametrize("mask", ["stretches", None])
@pytest.mark.parametrize(("steps", "columns"), [(n, c) for n in LENGTHS for c in (1, 3)] + [(260, 35)])
def test_gae(steps, columns, mask):
    case = trajectories(steps, columns, mask=mask)
    for mode in ("carry", "zero"):
        given = hidden(case, carry=mode == "carry")
        rates = {"gamma": torch.linspace(0.9, 0.99, columns), "lam": 0.95, "mask_mode": mode}
        truth = reference.gae(**double(given), **rates)
        plain = reference.gae(**given, **rates)
        for layout in (given, transposed(given)):
            result = pf.gae(**layout, **rates)
            for name, x, e, t in zip(("advantages", "returns"), result, plain, truth, strict=True):
                x = x.t() if "time_dim" in layout else x
                assert_as_good(x, e, t, f"{name} {mode} {list(layout['rewards'].shape)}", ulps=64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gae_of_other_dtypes(dtype):
    case = trajectories(700, 3, dtype)
    truth, plain = reference.gae(**double(case)), reference.gae(**case)
    for layout in (case, transposed(case)):
        for x, e, t in zip(pf.gae(**layout), plain, truth, strict=True):
            assert_as_good(x.t() if "time_dim" in layout else x, e, t, ulps=64)


def test_layouts_have_the_same_bits():
    case = hidden(trajectories(1100, 5))
    assert same_bits([x.t() for x in pf.gae(**transposed(case))], pf.gae(**case))


def test_packed_sequences_have_the_bits_of_their_own():
    lengths = [700, 0, 3, 512, 513, 1, 1024]
    cases = [hidden(trajectories(n, 1, seed=n)) for n in lengths]
    streams = {k: torch.cat([c[k][:, 0] for c in cases]) for k in cases[0] if k != "last_values"}
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    last = torch.cat([c["last_values"] for c in cases])
    packed = pf.gae(**streams, last_values=last, cu_seqlens=bounds)
    alone = [pf.gae(**{k: v[:, 0] if v.ndim == 2 else v for k, v in c.items()}) for c in cases]
    assert same_bits(packed, [torch.cat(x) for x in zip(*alone, strict=True)])


@pytest.mark.parametrize("c_clip", [1.0, 1.5, float("inf")])
@pytest.mark.parametrize(("steps", "columns"), [(130, 3), (600, 2)])
def test_vtrace(steps, columns, c_clip):
    case = trajectories(steps, columns)
    case["log_rhos"] = 0.3 * torch.randn(steps, columns)
    case = hidden(case)
    options = {"c_clip": c_clip, "rho_clip": 1.2, "lam": 0.9, "gamma": 0.97}
    truth, plain = reference.vtrace(**double(case), **options), reference.vtrace(**case, **options)
    for layout in (case, transposed(case)):
        for x, e, t in zip(pf.vtrace(**layout, **options), plain, truth, strict=True):
            assert_as_good(x.t() if "time_dim" in layout else x, e, t, f"c {c_clip}", ulps=256)


@pytest.mark.parametrize("time_dim", [0, 1])
def test_products_of_ratios_that_overflow_meet_a_zero(time_dim):
    """Step by step every trace is 0 but the first; a product of the factors between would be infinite."""
    rewards = torch.zeros(200, 2)
    rewards[0] = 1.0
    inputs = (torch.full((200, 2), 60.0), rewards, torch.zeros(200, 2))
    options = {"c_clip": float("inf"), "rho_clip": float("inf"), "gamma": 1.0}
    if time_dim == 1:
        inputs = tuple(x.t() for x in inputs)
    targets, _ = pf.vtrace(*inputs, time_dim=time_dim, **options)
    expected = reference.vtrace(*inputs, time_dim=time_dim, **options)[0]
    assert bool(targets.isfinite().all())
    torch.testing.assert_close(targets, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("steps", "columns"), [(129, 3), (1100, 2)])
def test_discounted_returns(steps, columns):
    case = trajectories(steps, columns)
    del case["values"]
    case = hidden(case)
    truth, plain = reference.discounted_returns(**double(case)), reference.discounted_returns(**case)
    for layout in (case, transposed(case)):
        x = pf.discounted_returns(**layout)
        assert_as_good(x.t() if "time_dim" in layout else x, plain, truth, ulps=64)
