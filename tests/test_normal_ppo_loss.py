"""normal_ppo_loss: the fused op against the specification, against its own two halves, and its edges."""

import math

import pytest
import torch
from conftest import ISAS, same_bits
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import DTYPES, bits, compare, streams

import ppo_fast as pf
from ppo_fast import _C, reference
from ppo_fast.ops.normal_ppo_loss import _op


@given(data=st.data(), shape=st.sampled_from([(1,), (5,), (300,), (7, 33)]), width=st.sampled_from([1, 2, 6, 17, 70]),
       dtype=st.sampled_from(DTYPES), squash=st.booleans(), seed=st.integers(0, 2**31))  # fmt: skip
def test_matches_float64(data, shape, width, dtype, squash, seed):
    g = torch.Generator().manual_seed(seed)
    s = data.draw(streams(shape, g, dtype))
    mean = torch.randn(*shape, width, generator=g).to(dtype)
    rows = data.draw(st.sampled_from([(width,), (*shape, width), (1,) * len(shape) + (width,)]))
    log_std = (0.2 * torch.randn(rows, generator=g)).to(dtype)
    s.stored["actions"] = (mean + torch.randn(*shape, width, generator=g)).to(dtype)
    # near the true log-prob, so that ratios stay near 1 and sums do not overflow half precision
    near = reference.normal_log_prob(mean.float(), log_std.float(), s.stored["actions"].float(), squash=squash)[0]
    noise = s.stored["old_log_prob"].float()
    s.stored["old_log_prob"] = (near + noise).to(dtype)
    for name in ("ref_log_prob", "rollout_log_prob"):
        if name in s.stored:
            s.stored[name] = (near + s.stored[name].float()).to(dtype)
    inputs = {"mean": mean, "log_std": log_std}
    if "returns" in s.stored:
        inputs["values"] = torch.randn(shape, generator=g).to(dtype)
    compare(pf.normal_ppo_loss, reference.normal_ppo_loss, inputs, s, near.abs().max().item(), squash=squash)


def rollout(n=200, width=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape, scale=1.0: torch.randn(n, *shape, generator=g) * scale  # noqa: E731
    return {
        "actions": make(width), "old_log_prob": make(scale=0.2) - 4.2, "advantages": make(), "old_values": make(),
        "returns": make(), "ref_log_prob": make(scale=0.2) - 4.2, "rollout_log_prob": make(scale=0.2) - 4.2,
        "mask": torch.rand(n, generator=g) < 0.8,
    }  # fmt: skip


def parameters(*shape, width=3, dtype=torch.float32):
    mean, log_std = torch.randn(*shape, width, dtype=dtype), 0.1 * torch.randn(width, dtype=dtype)
    return [mean.requires_grad_(), log_std.requires_grad_(), torch.randn(*shape, dtype=dtype, requires_grad=True)]


FULL = pf.LossConfig(dual_clip=3.0, value_clip=0.2, entropy_coef=0.01, normalize_advantages=True, kl="k3", kl_coef=0.1,
                     rollout_correction="tis")  # fmt: skip


@pytest.mark.parametrize("shape", [(64,), (8, 8)])
def test_index_gathers_what_indexing_would(shape):
    stored, index = rollout(), torch.randint(0, 200, shape)
    mean, log_std, values = leaves = parameters(*shape)
    a = pf.normal_ppo_loss(mean, log_std, **stored, config=FULL, values=values, index=index)
    plain = {k: v[index] for k, v in stored.items()}
    b = pf.normal_ppo_loss(mean, log_std, **plain, config=FULL, values=values)
    assert same_bits(bits(a, leaves), bits(b, leaves))
    truth = reference.normal_ppo_loss(mean, log_std, **stored, config=FULL, values=values, index=index)
    torch.testing.assert_close(truth.loss, b.loss)


def test_equals_its_two_halves():
    stored = rollout()
    mean, log_std, values = leaves = parameters(200)
    fused = pf.normal_ppo_loss(mean, log_std, **stored, config=FULL, values=values)
    log_prob, entropy = pf.normal_log_prob(mean, log_std, stored.pop("actions"))
    apart = pf.ppo_loss(log_prob, **stored, config=FULL, values=values, entropy=entropy)
    assert torch.equal(fused.loss, apart.loss)
    for a, b in zip(bits(fused, leaves)[2:], bits(apart, leaves)[2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_shared_and_expanded_log_std_agree():
    stored = rollout()
    mean, log_std, values = leaves = parameters(200)
    a = bits(pf.normal_ppo_loss(mean, log_std, **stored, config=FULL, values=values), leaves)
    for shape in ((1, 3), (200, 3)):
        b = bits(pf.normal_ppo_loss(mean, log_std.expand(shape), **stored, config=FULL, values=values), leaves)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("n", [1, 17, 257, 20_000])
def test_same_bits_over_instruction_sets_threads_and_runs(n):
    stored = rollout(n)
    leaves = parameters(n)
    results = []
    for isa in ISAS:
        _C.set_isa(isa)
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = pf.normal_ppo_loss(*leaves[:2], **stored, config=FULL, values=leaves[2])
            results.append(bits(out, leaves))
    assert all(same_bits(results[0], r) for r in results[1:])


def test_nothing_behind_the_mask_reaches_anything():
    stored = rollout()
    keep = stored["mask"]
    mean, log_std, values = parameters(200)
    wanted = None
    for poison in (0.0, math.nan, math.inf):
        bad = lambda x: torch.where(keep.view(-1, *[1] * (x.ndim - 1)), x, poison)  # noqa: E731, B023
        p = {k: bad(v) if v.is_floating_point() else v for k, v in stored.items()}
        leaves = [bad(mean.detach()).requires_grad_(), log_std, bad(values.detach()).requires_grad_()]
        got = bits(pf.normal_ppo_loss(*leaves[:2], **p, config=FULL, values=leaves[2]), leaves)
        wanted = wanted or got
        assert same_bits(wanted, got)
        assert (got[2][~keep] == 0).all()


@pytest.mark.parametrize("squash", [False, True])
def test_gradcheck_and_double_backward(squash):
    stored = {k: v.double() if v.is_floating_point() else v for k, v in rollout(7, seed=1).items()}
    leaves = parameters(7, dtype=torch.float64)

    def loss(mean, log_std, values):
        return pf.normal_ppo_loss(mean, log_std, **stored, config=FULL, values=values, squash=squash).loss

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_empty_and_all_masked():
    leaves = parameters(0)
    empty = {k: v[:0] for k, v in rollout().items()}
    pf.normal_ppo_loss(*leaves[:2], **empty, config=FULL, values=leaves[2]).loss.backward()
    assert leaves[0].grad.shape == (0, 3) and torch.equal(leaves[1].grad, torch.zeros(3))
    leaves = parameters(200)
    out = pf.normal_ppo_loss(*leaves[:2], **(rollout() | {"mask": torch.zeros(200)}), config=FULL, values=leaves[2])
    out.loss.backward()
    assert out.loss.item() == 0 and all((x.grad == 0).all() for x in leaves)


def test_compile_and_opcheck():
    torch._dynamo.reset()
    s, index = rollout(), torch.randint(0, 200, (64,))
    leaves = parameters(64)

    def step(mean, log_std, values, config):
        return pf.normal_ppo_loss(mean * 1.0, log_std, **s, config=config, values=values, index=index).loss

    compiled = torch.compile(step, fullgraph=True)
    for clip in (0.2, 0.1):
        config = pf.LossConfig(clip_low=clip, entropy_coef=clip, value_clip=0.2)
        a, b = compiled(*leaves, config), step(*leaves, config)
        assert torch.equal(a, b)
        for x, y in zip(torch.autograd.grad(a, leaves), torch.autograd.grad(b, leaves), strict=True):
            torch.testing.assert_close(x, y)
    arguments = (*leaves, s["actions"], False, index, s["old_log_prob"], s["advantages"], s["old_values"],
                 s["returns"], None, None, s["mask"], None, math.nan, False)  # fmt: skip
    config = pf.LossConfig.preset("cleanrl")
    torch.library.opcheck(_op.op, (*arguments, config.numbers_vector, *config.choices()))


ERRORS = [
    (dict(log_std=torch.zeros(4)), ValueError, r"log_std must broadcast to the shape of mean = \[200, 3\], got \[4\]"),
    (dict(actions=torch.zeros(200, 4)), ValueError, r"actions must be the shape of mean = \[200, 3\], got \[200, 4\]"),
    (dict(values=torch.zeros(200, 1)), ValueError, r"values must be the shape of the rows = \[200\], got \[200, 1\]"),
    (dict(index=torch.full((200,), -1)), ValueError, r"index must be in \[0, 200\), .*got -1"),
    (dict(mean=torch.zeros(200, 3, dtype=torch.int64)), TypeError, "mean must be float32"),
    (dict(mean=None), TypeError, "expected a torch.Tensor, got NoneType"),
    (dict(actions=torch.zeros(200, 3, requires_grad=True)), ValueError, "actions gets no gradient but requires one"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change, error, message):
    base = {"mean": torch.randn(200, 3), "log_std": torch.zeros(3), "values": torch.zeros(200)}
    with pytest.raises(error, match=message):
        pf.normal_ppo_loss(**{**base, **rollout(), "config": FULL, **change})
