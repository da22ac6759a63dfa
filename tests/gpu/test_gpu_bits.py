"""What bits must not depend on: the run, the batch that a row is in, memory around and behind, and what a mask excludes."""

from __future__ import annotations

import pytest
import torch
from scan_cases import assert_moments

import ppo_fast as pf

from . import cases
from .conftest import BACKENDS, DEVICE

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize(("op", "i"), cases.SMALL)
def test_same_bits_over_runs(backend, op, i):
    """Other calls in between leave other things in scratch memory and in the caches."""
    call = cases.there(cases.small(op)[i], DEVICE)
    with pf.use_backend(backend):
        first = cases.outcome(call, getattr(pf, op))
        for other in (0, 1, 2):
            cases.outcome(cases.there(cases.small("ppo_loss", seed=other)[3], DEVICE), pf.ppo_loss)
            again = cases.outcome(call, getattr(pf, op))
            assert not cases.same(first, again)


@each_backend
@pytest.mark.parametrize("n", [300_000, 4_000_001])
def test_reductions_over_many_blocks_repeat(backend, n):
    """Blocks finish in any order; their sums are joined in one."""
    n = n if DEVICE != "cpu" else 5000
    x = {k: torch.randn(n, device=DEVICE) for k in ("old_log_prob", "advantages", "values", "old_values", "returns")}
    log_prob = (x["old_log_prob"] + 0.1 * torch.randn(n, device=DEVICE)).requires_grad_()
    mask = torch.rand(n, device=DEVICE) < 0.9
    found = []
    with pf.use_backend(backend):
        for _ in range(10):
            out = pf.ppo_loss(log_prob, **x, config=cases.pf.LossConfig.preset("cleanrl"), mask=mask)
            white = pf.whiten(x["advantages"], mask=mask)
            found.append({"loss": out.loss.detach(), "stats": out.stats.vector, "white": white})
    assert not any(cases.same(found[0], other) for other in found[1:])


def _rows(x, rows):
    return x[rows] if isinstance(x, torch.Tensor) and x.ndim else x


ROWWISE = {
    "categorical_log_prob": ((53, 6), (53, 65), (9, 2100), (5, 50_001)),
    "multi_categorical_log_prob": ((53, 12),),
    "bernoulli_log_prob": ((53, 7), (9, 200)),
    "normal_log_prob": ((53, 7), (9, 200)),
    "beta_log_prob": ((53, 7),),
}


@each_backend
@pytest.mark.parametrize(("op", "shape"), [(op, s) for op, shapes in ROWWISE.items() for s in shapes])
def test_rows_stand_alone(backend, op, shape):
    """A row has the same log-prob, entropy and gradient alone, among few and in the whole batch: rollout and training
    agree."""
    rows, width = shape
    x = torch.randn(shape, device=DEVICE)
    positive = [torch.rand(shape, device=DEVICE) * 4 + 0.3 for _ in range(2)]
    labels = torch.randint(width, (rows,), device=DEVICE)
    shared = 0.2 * torch.randn(width, device=DEVICE)  # of all rows: its gradient is a sum over them, and not compared
    inputs, rest = {
        "categorical_log_prob": ([x], [labels]),
        "multi_categorical_log_prob": ([x], [torch.stack([labels % 5, labels % (width - 5)], 1)]),
        "bernoulli_log_prob": ([x], [(x > 0.3).float()]),
        "normal_log_prob": ([x], [x.flip(0)]),
        "beta_log_prob": (positive, [torch.rand(shape, device=DEVICE) * 0.98 + 0.01]),
    }[op]
    given = [torch.randn(rows, device=DEVICE) for _ in range(2)]

    def run(part):
        leaves = [_rows(v, part).clone().requires_grad_() for v in inputs]
        others = [_rows(v, part) for v in rest]
        if op == "multi_categorical_log_prob":
            out = pf.multi_categorical_log_prob(*leaves, *others, (5, width - 5))
        elif op == "normal_log_prob":
            out = pf.normal_log_prob(*leaves, shared, *others)
        else:
            out = getattr(pf, op)(*leaves, *others)
        return [*out, *torch.autograd.grad(out, leaves, [_rows(g, part) for g in given])]

    with pf.use_backend(backend):
        whole = run(slice(None))
        for part in (slice(0, 1), slice(1, 2), slice(rows - 1, rows), slice(3, min(20, rows)), slice(rows // 2, rows)):
            for got, want in zip(run(part), whole, strict=True):
                assert torch.equal(got, want[part]), part


@each_backend
@pytest.mark.parametrize("shape", [(1, 1), (257, 3), (67, 33), (9, 2050), (2100, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_stand_alone(backend, shape, dtype):
    """Whatever the layout, and whatever runs beside: packed, by row, by column, one alone."""
    steps, columns = shape
    x = {"rewards": torch.randn(shape, dtype=dtype), "values": torch.randn(shape, dtype=dtype),
         "last_values": torch.randn(columns, dtype=dtype), "terminated": torch.rand(shape) < 0.05,
         "truncated": torch.rand(shape) < 0.05, "final_values": torch.randn(shape, dtype=dtype)}  # fmt: skip
    x = {k: v.to(DEVICE) for k, v in x.items()}
    with pf.use_backend(backend):
        whole = pf.gae(**x)
        by_row = pf.gae(**{k: v.t() if v.ndim == 2 else v for k, v in x.items()}, time_dim=1)
        n = columns - 1
        alone = pf.gae(**{k: v[:, n] if v.ndim == 2 else v[n] for k, v in x.items()})
        flat = {k: v.t().reshape(-1) if v.ndim == 2 else v for k, v in x.items()}
        packed = pf.gae(**flat, cu_seqlens=torch.arange(columns + 1, device=DEVICE) * steps)
    for w, r, a, p in zip(whole, by_row, alone, packed, strict=True):
        assert torch.equal(r.t(), w) and torch.equal(a, w[:, n]) and torch.equal(p.view(columns, steps).t(), w)


@each_backend
@pytest.mark.parametrize("shape", [(1, 1), (257, 3), (2100, 5), (300, 3000), (7, 70_001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_advantages_repeat(backend, shape, dtype):
    """Tiles finish in any order; their sums are joined in one."""
    shape = shape if DEVICE != "cpu" else (shape[0] % 29 + 1, shape[1] % 31 + 1)
    mask = torch.rand(shape, device=DEVICE) < 0.7
    r = torch.where(mask, torch.randn(shape, dtype=dtype, device=DEVICE) + 9.0, torch.nan)
    v = torch.randn(shape, dtype=dtype, device=DEVICE)
    bounds = torch.arange(shape[1] + 1, device=DEVICE) * shape[0]
    flat = {
        "rewards": r.t().reshape(-1),
        "values": v.t().reshape(-1),
        "mask": mask.t().reshape(-1),
        "cu_seqlens": bounds,
    }
    layouts = [{"rewards": r, "values": v, "mask": mask}, flat]
    layouts += [{"rewards": r.t(), "values": v.t(), "mask": mask.t(), "time_dim": 1}]
    with pf.use_backend(backend):
        for layout in layouts:
            advantages, returns = pf.gae(**layout)
            found = [pf.gae(**layout, moments=True) for _ in range(5)]
            assert all(torch.equal(x[0], advantages) and torch.equal(x[1], returns) for x in found)
            assert all(torch.equal(x[2], found[0][2]) for x in found)
            assert_moments(found[0][2], advantages, layout["mask"])


@each_backend
@pytest.mark.parametrize("shape", [(1, 1), (130, 33), (9, 2050)])
@pytest.mark.parametrize("time_dim", [0, 1])
def test_nothing_is_written_beside_the_outputs(backend, shape, time_dim):
    """Where the caller gives the memory, what lies around it stays as it is."""
    pad, n, seen = 1000, shape[0] * shape[1], -7.25
    around = [torch.full((n + 2 * pad,), seen, device=DEVICE) for _ in range(2)]
    out = tuple(x[pad : pad + n].view(shape) for x in around)
    rewards, values = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    with pf.use_backend(backend):
        pf.gae(rewards, values, out=out, time_dim=time_dim)
        wanted = pf.gae(rewards, values, time_dim=time_dim)
    for x, got, want in zip(around, out, wanted, strict=True):
        assert torch.equal(got, want)
        assert bool((x[:pad] == seen).all()) and bool((x[pad + n :] == seen).all())


@each_backend
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("op", cases.LOSSES)
def test_nothing_behind_the_mask_reaches_anything(backend, op, poison):
    call = cases.there(cases.small(op)[0], DEVICE)
    keep = call.rest["mask"]
    assert not bool(keep.all())

    def behind(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.shape[:1] != keep.shape:
            return x
        return torch.where(keep.view(-1, *[1] * (x.ndim - 1)), x, poison)

    dirty = cases.Call(op, {k: behind(v) for k, v in call.inputs.items()}, {k: behind(v) for k, v in call.rest.items()})
    with pf.use_backend(backend):
        assert not cases.same(cases.outcome(call, getattr(pf, op)), cases.outcome(dirty, getattr(pf, op)))


@each_backend
def test_a_retained_graph_gives_the_same_gradients_again(backend):
    """The first backward hands out what the forward wrote, the second computes it; a factor scales both."""
    call = cases.there(cases.small("ppo_loss")[0], DEVICE)
    leaves = [v.requires_grad_() for v in call.inputs.values()]
    with pf.use_backend(backend):
        loss = pf.ppo_loss(**call.arguments).loss
        first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
        scaled = torch.autograd.grad(loss * 4.0, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, again, scaled, strict=True):
        assert torch.equal(a, b) and torch.equal(4.0 * a, c)


@each_backend
@pytest.mark.parametrize("width", [6, 80, 3000, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward(backend, width, dtype):
    leaf, labels = torch.randn(21, width, device=DEVICE).to(dtype), torch.randint(width, (21,), device=DEVICE)

    def run(inplace):
        x = leaf.clone().requires_grad_()
        logits = x * 1.0
        log_prob, entropy = pf.categorical_log_prob(logits, labels, inplace_backward=inplace)
        seen = []
        logits.register_hook(lambda g: seen.append(g.data_ptr()))
        (log_prob.sum() + 0.3 * entropy.sum()).backward()
        assert (seen[0] == logits.data_ptr()) is inplace
        return x.grad

    with pf.use_backend(backend):
        assert torch.equal(run(True), run(False))
