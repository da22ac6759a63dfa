"""ppo_loss: loss, statistics and gradients against float64, the laws it obeys, and its edges."""

import math

import pytest
import torch
from conftest import ISAS, same_bits
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import CENTER, DTYPES, bits, compare, compare_policy, log_probs, replace, streams
from torch._dynamo.testing import CompileCounterWithBackend

import ppo_fast as pf
from ppo_fast import _C, reference
from ppo_fast.config import STATS, TOKEN_POLICIES
from ppo_fast.ops.ppo_loss import _op


def test_statistics_are_named_alike_in_both_languages():
    assert _C.STATS == STATS


@given(data=st.data(), shape=st.sampled_from([(1,), (5,), (300,), (7, 33), (2, 3, 50)]), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 2**31))  # fmt: skip
def test_matches_float64(data, shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    s = data.draw(streams(shape, g, dtype, CENTER))
    inputs = {"log_prob": log_probs(shape, g, dtype)}
    if data.draw(st.booleans()):
        inputs["entropy"] = torch.rand(shape, generator=g).to(dtype)
    if "returns" in s.stored:
        inputs["values"] = torch.randn(shape, generator=g).to(dtype)
    compare(pf.ppo_loss, reference.ppo_loss, inputs, s)


@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_every_policy_matches_float64(isa, policy):
    for dtype in DTYPES[:3]:
        compare_policy(pf.ppo_loss, reference.ppo_loss, policy, dtype)


def example(n=100, dtype=torch.float32, seed=0, shape=None):
    g = torch.Generator().manual_seed(seed)
    make = lambda scale=1.0: (torch.randn(shape or n, generator=g) * scale).to(dtype)  # noqa: E731
    return {
        "log_prob": make(0.3).requires_grad_(), "old_log_prob": make(0.3), "advantages": make(),
        "values": make().requires_grad_(), "old_values": make(), "returns": make(), "entropy": make().requires_grad_(),
    }  # fmt: skip


FULL = pf.LossConfig(
    dual_clip=3.0, value_clip=0.2, entropy_coef=0.01, normalize_advantages=True, kl="k3", kl_coef=0.1,
    rollout_correction="tis",
)  # fmt: skip


def full_example(n, seed=0):
    x = example(n, seed=seed)
    more = example(n, seed=seed + 1)
    return {**x, "ref_log_prob": more["old_log_prob"], "rollout_log_prob": more["advantages"] * 0.1}


@pytest.mark.parametrize("n", [1, 15, 16, 17, 255, 256, 257, 4096, 4097, 70_001])
def test_same_bits_over_instruction_sets_threads_and_runs(n):
    x = full_example(n)
    x["mask"] = torch.rand(n) < 0.8
    results = []
    for isa in ISAS:
        _C.set_isa(isa)
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(bits(pf.ppo_loss(**x, config=FULL), [x["log_prob"], x["values"], x["entropy"]]))
    for other in results[1:]:
        assert same_bits(results[0], other)


@pytest.mark.parametrize(("dtype", "offset", "masked"), [
    (torch.float32, 0, False), (torch.float32, 0, True), (torch.float32, 3, False), (torch.float64, 0, False),
    (torch.bfloat16, 0, False),
])  # fmt: skip
def test_streams_longer_than_the_cache(isa, dtype, offset, masked):
    """Their gradients go past the cache, and are those of the same streams piece by piece."""
    n, config = (1 << 19) + 12_345, pf.LossConfig(value_clip=0.2, entropy_coef=0.01, dual_clip=3.0, reduction="sum")
    x = {k: v.detach()[offset:] for k, v in example(n + offset, dtype=dtype).items()}
    if masked:
        x["mask"] = torch.rand(n) < 0.8
    learned = ("log_prob", "values", "entropy")

    def gradients(piece):
        part = {k: v[piece].requires_grad_(k in learned) for k, v in x.items()}
        pf.ppo_loss(**part, config=config).loss.backward()
        return [part[k].grad for k in learned]

    pieces = [gradients(slice(i, i + 65_536)) for i in range(0, n, 65_536)]
    assert same_bits(gradients(slice(None)), [torch.cat(g) for g in zip(*pieces, strict=True)])


@pytest.mark.parametrize("n", [1, 31, 256, 1000])
def test_nothing_behind_the_mask_is_read(n):
    x = full_example(n)
    mask = torch.rand(n) < 0.5
    wanted = bits(pf.ppo_loss(**x, config=FULL, mask=mask), [x["log_prob"], x["values"], x["entropy"]])
    for poison in (math.nan, math.inf, -math.inf):
        p = {k: torch.where(mask, v.detach(), poison).requires_grad_(v.requires_grad) for k, v in x.items()}
        got = bits(pf.ppo_loss(**p, config=FULL, mask=mask), [p["log_prob"], p["values"], p["entropy"]])
        assert same_bits(wanted, got)
        assert all((g[~mask] == 0).all() for g in got[2:])


def test_a_mask_is_the_same_as_leaving_rows_out():
    x, mask = full_example(500), torch.rand(500) < 0.6
    part = {k: v.detach()[mask].requires_grad_(v.requires_grad) for k, v in x.items()}
    a, b = pf.ppo_loss(**x, config=FULL, mask=mask), pf.ppo_loss(**part, config=FULL)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.stats.vector, b.stats.vector)


def test_all_masked_is_zero_with_a_graph():
    x = full_example(40)
    out = pf.ppo_loss(**x, config=FULL, mask=torch.zeros(40))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert torch.equal(x["log_prob"].grad, torch.zeros(40))
    assert all(v == 0 or math.isnan(v) for v in out.stats.to_dict().values())


def test_empty():
    x = example(0)
    out = pf.ppo_loss(**x)
    out.loss.backward()
    assert out.loss.item() == 0.0 and x["log_prob"].grad.shape == (0,)


def test_one_sample_with_normalised_advantages_keeps_its_gradient():
    x = example(1)
    out = pf.ppo_loss(**x, config=pf.LossConfig(normalize_advantages=True))
    plain = pf.ppo_loss(**x, config=pf.LossConfig())
    assert torch.equal(out.loss, plain.loss) and out.loss.isfinite()


def test_permutation_changes_nothing_but_rounding():
    x, order = full_example(3000), torch.randperm(3000)
    y = {k: v.detach()[order].requires_grad_(v.requires_grad) for k, v in x.items()}
    a, b = pf.ppo_loss(**x, config=FULL), pf.ppo_loss(**y, config=FULL)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.stats.vector, b.stats.vector)
    a.loss.backward()
    b.loss.backward()
    torch.testing.assert_close(x["log_prob"].grad[order], y["log_prob"].grad)


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"])
def test_micro_batches_with_a_global_denominator_add_up(reduction):
    config = pf.LossConfig(reduction=reduction, value_clip=0.2, entropy_coef=0.1)
    x = example(shape=(12, 20), dtype=torch.float64)
    mask = torch.rand(12, 20) < 0.7
    whole = pf.ppo_loss(**x, config=config, mask=mask)
    grads = torch.autograd.grad(whole.loss, x["log_prob"])[0]
    count = {"token-mean": float(mask.sum()), "sum": 1.0}.get(reduction, 12.0)
    total, parts = 0.0, []
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        y = {k: v.detach()[rows].requires_grad_(v.requires_grad) for k, v in x.items()}
        out = pf.ppo_loss(**y, config=config, mask=mask[rows], denominator=count)
        total += out.loss.item()
        parts.append(torch.autograd.grad(out.loss, y["log_prob"])[0])
    assert abs(total - whole.loss.item()) < 1e-12
    torch.testing.assert_close(torch.cat(parts), grads, atol=1e-15, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_packed_equals_padded(reduction):
    config, lengths = pf.LossConfig(reduction=reduction), [3, 0, 7, 5]
    x = example(shape=(4, 7), dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    packed = {k: v.detach()[mask].requires_grad_(v.requires_grad) for k, v in x.items()}
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    a = pf.ppo_loss(**x, config=config, mask=mask)
    b = pf.ppo_loss(**packed, config=config, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(a.loss, b.loss, atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(a.stats.vector, b.stats.vector, equal_nan=True)


def gradient_at(ratio, advantage, config):
    d = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    out = pf.ppo_loss(d, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64), config)
    return torch.autograd.grad(out.loss, d)[0].item()


def test_subgradients_at_ties():
    """As torch's own: max splits ½/½, clamp passes on its edge."""
    half = pf.LossConfig(clip_low=0.5, clip_high=1.0)  # 0.5 and 2: exact in binary
    for ratio in (0.5, 1.0, 2.0):
        d = torch.tensor([math.log(ratio)], dtype=torch.float64)
        assert d.exp().item() == ratio
    assert gradient_at(1.0, 3.0, half) == -3.0
    assert gradient_at(2.0, 3.0, half) == -6.0  # on the edge: the full gradient -A·r
    assert gradient_at(0.5, -3.0, half) == 1.5
    assert gradient_at(2.1, 3.0, half) == 0.0  # outside on the bad side
    assert gradient_at(0.4, 3.0, half) == pytest.approx(-1.2)  # outside on the good side
    assert gradient_at(1.0, 3.0, pf.LossConfig(clip_low=0.0, clip_high=0.0)) == -3.0
    dual = pf.LossConfig(clip_low=0.5, clip_high=7.0, dual_clip=2.0)
    assert gradient_at(2.0, -3.0, dual) == 3.0  # exact dual-clip tie: half of 6
    assert gradient_at(2.1, -3.0, dual) == 0.0
    capped = pf.LossConfig(clip_low=0.5, clip_high=0.5, ratio_cap=2.0)
    assert gradient_at(2.0, -3.0, capped) == 6.0
    assert gradient_at(2.1, -3.0, capped) == 0.0


@pytest.mark.parametrize("config", [pf.LossConfig(), FULL, replace(FULL, ratio_cap=5.0)])
def test_ratio_overflow(config):
    """exp overflows: clipped tokens stay finite with zero gradient, unclipped ones blow up openly, none gives 0·inf."""
    config = replace(config, rollout_correction=None, kl=None, normalize_advantages=False)
    d = torch.tensor([200.0, 1e30, math.inf], requires_grad=True)
    out = pf.ppo_loss(d, torch.zeros(3), torch.full((3,), 2.0), config)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-2.0 * 1.2)
    assert torch.equal(d.grad, torch.zeros(3))
    assert out.stats.ratio_max.item() == math.inf
    d = torch.tensor([200.0], requires_grad=True)
    out = pf.ppo_loss(d, torch.zeros(1), torch.full((1,), -2.0), config)
    out.loss.backward()
    bounded = config.dual_clip is not None or config.ratio_cap is not None
    assert out.loss.isfinite() == bounded
    assert (d.grad.item() == 0.0) == bounded and not d.grad.isnan().any()


def test_kl_overflow_with_a_clamped_value_has_zero_gradient():
    x = torch.tensor([-300.0, 0.0], requires_grad=True)
    config = pf.LossConfig(kl="k3", kl_coef=1.0, kl_value_clamp=10.0)
    out = pf.ppo_loss(x, x.detach(), torch.zeros(2), config, ref_log_prob=torch.zeros(2))
    out.loss.backward()
    assert out.stats.kl.item() == pytest.approx(5.0)
    assert torch.equal(x.grad, torch.zeros(2))


def test_effective_sample_size_survives_squares_that_overflow():
    d = torch.tensor([50.0, 50.0, 0.0, 0.0])
    out = pf.ppo_loss(d, torch.zeros(4), torch.ones(4))
    assert out.stats.ess.item() == pytest.approx(0.5)


@pytest.mark.parametrize("where", ["log_prob", "old_log_prob", "advantages", "values", "returns", "entropy"])
def test_nan_in_a_valid_element_shows(where):
    x = example(40)
    x[where] = x[where].detach().clone().requires_grad_(x[where].requires_grad)
    with torch.no_grad():
        x[where][3] = math.nan
    out = pf.ppo_loss(**x, config=pf.LossConfig(entropy_coef=0.1))
    assert out.loss.isnan()
    if where == "log_prob":
        assert out.stats.ratio_min.isnan() and out.stats.ratio_max.isnan()


def test_gradcheck_and_double_backward():
    config = pf.LossConfig(value_clip=0.2, entropy_coef=0.3, normalize_advantages=True, kl="k3", kl_coef=0.2,
                           value_loss="huber", log_ratio_clamp=2.0)  # fmt: skip
    x = example(9, torch.float64, seed=3)
    ref = torch.randn(9, dtype=torch.float64)
    fixed = {k: v for k, v in x.items() if not v.requires_grad}

    def loss(log_prob, values, entropy):
        return pf.ppo_loss(log_prob, config=config, values=values, entropy=entropy, ref_log_prob=ref, **fixed).loss

    leaves = (x["log_prob"], x["values"], x["entropy"])
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_grad_output_and_retained_graphs():
    x = example(50)
    leaves = [x["log_prob"], x["values"]]
    loss = pf.ppo_loss(**x).loss
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]
    again = torch.autograd.grad(loss * 3.0, leaves, retain_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3.0 * a, b)
    torch.autograd.grad(loss, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_an_input_changed_in_place_is_refused_on_recompute():
    log_prob = torch.randn(20, requires_grad=True)
    y = log_prob * 1.0
    loss = pf.ppo_loss(y, torch.zeros(20), torch.ones(20)).loss
    y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_inputs_that_require_grad_get_one():
    x = example(30)
    x["values"] = x["values"].detach()
    out = pf.ppo_loss(**x)
    assert torch.autograd.grad(out.loss, [x["log_prob"], x["entropy"]])[0].shape == (30,)
    with torch.no_grad():
        assert not pf.ppo_loss(**x).loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(pf.ppo_loss(**x).loss, out.loss)


def test_statistics_container():
    stats = pf.ppo_loss(**example(10)).stats
    assert list(stats.to_dict()) == list(STATS) and stats.approx_kl.ndim == 0
    assert "approx_kl" in dir(stats) and "approx_kl=" in repr(stats)
    with pytest.raises(AttributeError, match="no 'nonsense'"):
        _ = stats.nonsense


def test_compiled_schedule_is_right_and_compiles_once():
    torch._dynamo.reset()
    x = example(64)
    counter = CompileCounterWithBackend("aot_eager")

    def step(log_prob, values, entropy, config):
        y = {**x, "log_prob": log_prob * 1.0, "values": values, "entropy": entropy}
        out = pf.ppo_loss(**y, config=config)
        return out.loss * 2.0, out.stats.approx_kl

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    leaves = [x["log_prob"], x["values"], x["entropy"]]
    for k in range(12):
        config = pf.LossConfig(clip_low=0.2 - 0.01 * k, clip_high=0.2 - 0.01 * k, entropy_coef=0.01 * k)
        loss, kl = compiled(*leaves, config)
        plain, plain_kl = step(*leaves, config)
        assert torch.equal(loss, plain) and torch.equal(kl, plain_kl)
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_compiled_reference_where_no_kernel_runs():
    torch._dynamo.reset()
    x = example(64)
    with pf.use_backend("reference"):
        compiled = torch.compile(lambda x: pf.ppo_loss(**x).loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), pf.ppo_loss(**x).loss)


def compiled(config):
    return config.numbers_vector, *config.choices()


def test_opcheck():
    x = example(30)
    mask = torch.rand(30) < 0.5
    arguments = (x["log_prob"], x["values"], x["entropy"], x["old_log_prob"], x["advantages"], x["old_values"],
                 x["returns"], None, None, mask, None, math.nan, False)  # fmt: skip
    torch.library.opcheck(_op.op, (*arguments, *compiled(pf.LossConfig.preset("cleanrl"))))
    bare = (x["log_prob"].detach(), x["values"], None, *arguments[3:9], None, mask.float(), math.nan, True)
    torch.library.opcheck(_op.op, (*bare, *compiled(pf.LossConfig())))


ERRORS = [
    (dict(old_log_prob=torch.zeros(10, 1)), ValueError, r"old_log_prob must be the shape of log_prob = \[10\], got \[10, 1\]"),
    (dict(values=torch.zeros(10, 1)), ValueError, r"values must be the shape of log_prob = \[10\], got \[10, 1\]"),
    (dict(advantages=torch.zeros(10, dtype=torch.int64)), TypeError, "advantages must be float32, float64"),
    (dict(advantages=None), TypeError, "advantages must be a tensor, got None"),
    (dict(mask=torch.ones(9)), ValueError, "mask must be the shape of log_prob"),
    (dict(returns=None), TypeError, "returns must be a tensor with values"),
    (dict(old_values=None, config=pf.LossConfig(value_clip=0.2)), TypeError, "old_values must be a tensor with values"),
    (dict(config=pf.LossConfig(kl="k1")), TypeError, "ref_log_prob must be a tensor"),
    (dict(config=pf.LossConfig(rollout_correction="tis")), TypeError, "rollout_log_prob must be a tensor"),
    (dict(config={"clip_low": 0.1}), TypeError, "config must be a LossConfig, got dict"),
    (dict(denominator=0.0), ValueError, "denominator must be a finite number > 0, got 0.0"),
    (dict(advantages=torch.zeros(10, requires_grad=True)), ValueError, "advantages gets no gradient but requires one"),
    (dict(log_prob=[0.0] * 10), TypeError, "expected a torch.Tensor, got list"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change, error, message, backend):
    with pf.use_backend(backend), pytest.raises(error, match=message):
        pf.ppo_loss(**{**example(10), **change})
