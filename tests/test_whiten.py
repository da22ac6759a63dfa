"""whiten: values against float64, and what it must not depend on."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ISAS, as_double, assert_as_good
from hypothesis import given
from hypothesis import strategies as st

import ppo_fast as pf
from ppo_fast import _C, reference
from ppo_fast.ops.whiten import _op

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@given(
    n=st.integers(0, 3000),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    ddof=st.sampled_from([0, 1]),
    shift_mean=st.booleans(),
    eps_in_variance=st.booleans(),
    step=st.integers(1, 3),
    offset=st.sampled_from([0.0, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_matches_float64(n, dtype, masked, ddof, shift_mean, eps_in_variance, step, offset, seed):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(n * step, generator=g) + offset).to(dtype)[::step]
    mask = torch.rand(n, generator=g) < 0.6 if masked else None
    options = dict(ddof=ddof, shift_mean=shift_mean, eps_in_variance=eps_in_variance)
    actual = pf.whiten(x, mask=mask, **options)
    truth = reference.whiten(as_double(x), mask=mask, **options)
    eager = reference.whiten(x, mask=mask, **options)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # an element near the mean is a difference of two numbers of the input's size
    assert_as_good(actual, eager, truth, ulps=8.0 * (1.0 + offset))


def test_two_dimensional_views_and_broadcasts():
    x = torch.randn(40, 30)
    for view in (x, x.t(), x[::2, 3:17], x[:, :1].expand(40, 30), x[:1, :], x[5:6, 7:8]):
        assert_as_good(pf.whiten(view), reference.whiten(view), reference.whiten(view.double()))


def test_mean_zero_and_unit_deviation():
    y = pf.whiten(torch.randn(10_000, dtype=torch.float64) * 7 + 3)
    torch.testing.assert_close(y.mean(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.std(), torch.ones((), dtype=torch.float64), atol=1e-7, rtol=0)


def test_affine_maps_of_the_input_change_nothing():
    x = torch.randn(5000, dtype=torch.float64)
    torch.testing.assert_close(pf.whiten(x), pf.whiten(3.0 * x + 11.0), atol=1e-7, rtol=1e-7)


def test_nothing_behind_the_mask_is_read():
    x, mask = torch.randn(700), torch.rand(700) < 0.5
    poisoned = torch.where(mask, x, torch.tensor(float("nan")))
    assert torch.equal(pf.whiten(poisoned, mask=mask), pf.whiten(x, mask=mask))
    assert torch.equal(pf.whiten(x, mask=mask)[~mask], torch.zeros(int((~mask).sum())))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_masks_of_any_type(mask_dtype):
    x, mask = torch.randn(100), torch.rand(100) < 0.5
    assert torch.equal(pf.whiten(x, mask=mask.to(mask_dtype)), pf.whiten(x, mask=mask))


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_elements_are_left_alone(n):
    x = torch.full((n,), 5.0)
    assert torch.equal(pf.whiten(x), x)
    assert torch.equal(pf.whiten(torch.randn(4), mask=torch.zeros(4)), torch.zeros(4))


def test_a_constant_becomes_zero():
    assert torch.equal(pf.whiten(torch.full((1000,), 0.1)), torch.zeros(1000))


def test_nan_spreads_as_in_torch():
    x = torch.randn(50)
    x[7] = float("nan")
    assert pf.whiten(x).isnan().all()


def test_same_bits_over_instruction_sets_and_threads():
    x, mask = torch.randn(100_003), torch.rand(100_003) < 0.9
    results = []
    for isa in ISAS:
        _C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(pf.whiten(x, mask=mask))
    assert all(torch.equal(results[0], r) for r in results)


def test_constants_and_differentiable():
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert not pf.whiten(x).requires_grad
    assert torch.autograd.gradcheck(lambda x: pf.whiten(x, differentiable=True), x)


def test_compile_and_opcheck():
    x, mask = torch.randn(300), torch.rand(300) < 0.5
    compiled = torch.compile(lambda x, m: pf.whiten(x * 1.0, mask=m), fullgraph=True)
    assert torch.equal(compiled(x, mask), pf.whiten(x, mask=mask))
    torch.library.opcheck(_op, (x, mask, 1, 1e-8, True, False))
    torch.library.opcheck(_op, (x.double().view(10, 30).t(), None, 0, 1e-8, False, True))
    torch.library.opcheck(_op, (x, mask, 1, 1e-8, True, False, reference.moments_of(x, mask)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_known_moments_are_not_taken_again(dtype, backend):
    x, mask = (torch.randn(3000) + 2.0).to(dtype), torch.rand(3000) < 0.6
    moments = reference.moments_of(x, mask)
    gaps = torch.stack([moments, torch.full_like(moments, torch.nan)], -1)[:, 0]
    with pf.use_backend(backend):
        for options in ({}, {"ddof": 0, "shift_mean": False}, {"eps_in_variance": True}):
            truth = reference.whiten(as_double(x), mask=mask, **options)
            for known in (moments, gaps):
                ours = pf.whiten(x, mask=mask, moments=known, **options)
                assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert_as_good(ours, pf.whiten(x, mask=mask, **options), truth, ulps=32)
        # they are what is taken: of other numbers they give something else
        doubled = moments * torch.tensor([1.0, 1.0, 4.0])
        torch.testing.assert_close(
            2 * pf.whiten(x, moments=doubled), pf.whiten(x, moments=moments), rtol=1e-5, atol=1e-6
        )


def test_moments_of_too_few_leave_x_alone():
    x = torch.randn(5)
    for count in (0.0, 1.0):
        assert torch.equal(pf.whiten(x, moments=torch.tensor([count, 3.0, 0.0], dtype=torch.float64)), x)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("moments", "error", "message"),
    [
        (torch.zeros(3), TypeError, r"whiten: moments must be \[3\] float64, got \[3\] float32"),
        (torch.zeros(4).double(), ValueError, r"whiten: moments must be \[3\] float64, got \[4\] float64"),
        (torch.zeros(3, 1).double(), ValueError, r"whiten: moments must be \[3\] float64, got \[3, 1\] float64"),
        ([1.0, 2.0, 3.0], TypeError, r"whiten: moments must be \[3\] float64, got list"),
        (torch.zeros(3, device="meta").double(), TypeError, "whiten: moments must be on cpu as the rest, got meta"),
    ],
)
def test_errors_of_moments(moments, error, message, backend):
    with pf.use_backend(backend), pytest.raises(error, match=message):
        pf.whiten(torch.randn(5), moments=moments)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(x=torch.zeros(3, dtype=torch.int64)), TypeError, "x must be float32, float64, bfloat16 or float16"),
        (dict(x=[1.0]), TypeError, "expected a torch.Tensor, got list"),
        (
            dict(x=torch.zeros(3, 1), mask=torch.zeros(3)),
            ValueError,
            r"mask must be the shape of x = \[3, 1\], got \[3\]",
        ),
        (dict(x=torch.zeros(3), ddof=2), ValueError, "ddof must be 0 or 1, got 2"),
        (dict(x=torch.zeros(3), eps=float("nan")), ValueError, "eps must be finite"),
    ],
)
def test_errors_name_the_argument(kwargs, error, message):
    x = kwargs.pop("x")
    with pytest.raises(error, match=message):
        pf.whiten(x, **kwargs)


def test_over_a_process_group(tmp_path):
    """Two ranks with unequal shares give the rows of the whitened whole."""
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch, torch.distributed as dist, ppo_fast as pf
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
        x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
        mask = torch.rand(1000, generator=torch.Generator().manual_seed(1)) < 0.7
        part = slice(0, 300) if rank == 0 else slice(300, None)
        mine = pf.whiten(x[part], mask=mask[part], group=dist.group.WORLD)
        torch.testing.assert_close(mine, pf.whiten(x, mask=mask)[part], atol=1e-12, rtol=1e-12)
        known = pf.reference.moments_of(x[part], mask[part])
        known = pf.whiten(x[part], mask=mask[part], moments=known, group=dist.group.WORLD)
        torch.testing.assert_close(mine, known, atol=1e-12, rtol=1e-12)
        empty = pf.whiten(x[part], mask=mask[part] & (rank == 1), group=dist.group.WORLD)
        assert torch.isfinite(empty).all()
        with pf.use_backend("reference"):
            again = pf.whiten(x[part], mask=mask[part], group=dist.group.WORLD)
        torch.testing.assert_close(mine, again, atol=1e-12, rtol=1e-12)
        print("rank", rank, "agrees")
        # Gloo's threads outlive the interpreter otherwise, and one of them may end the process with an abort.
        dist.barrier()
        dist.destroy_process_group()
    """)
    )
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(r), str(tmp_path / "store")], stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
        for r in range(2)
    ]  # fmt: skip
    outputs = [p.communicate(timeout=120)[0] for p in ranks]
    assert all(p.returncode == 0 for p in ranks), outputs
    assert all("agrees" in text for text in outputs)
