"""The Triton kernels of the losses and of whitening, run by Triton's interpreter: against float64, the laws that the CPU
kernels obey, the edges of their blocks, and how they are started.
"""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported and when a kernel is defined

import mpmath
import pytest
import test_categorical_ppo_loss as categorical_laws
import test_math as math_laws
import test_normal_ppo_loss as normal_laws
import test_ppo_loss as laws
import test_whiten as whiten_laws
import torch
from conftest import as_double, assert_as_good, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CENTER, DTYPES, bits, compare, compare_policy, log_probs, replace, streams

import ppo_fast as pf
from ppo_fast import _C, _workspace, reference
from ppo_fast.config import TOKEN_POLICIES

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from ppo_fast.kernels import _launch, _reduce, _reports, raw  # noqa: E402
from ppo_fast.kernels import categorical_log_prob as log_prob_kernels  # noqa: E402
from ppo_fast.kernels import categorical_ppo_loss as categorical_kernels  # noqa: E402
from ppo_fast.kernels import multi_categorical_log_prob as multi_kernels  # noqa: E402
from ppo_fast.kernels import normal_ppo_loss as normal_kernels  # noqa: E402
from ppo_fast.kernels import ppo_loss as ppo_kernels  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

INTERPRETED = isinstance(tl.sum, InterpretedFunction)
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="triton was imported without TRITON_INTERPRET")


def test_kernels_are_interpreted():
    assert INTERPRETED, "triton was imported without TRITON_INTERPRET=1, which tests/conftest.py must set before"


@pytest.fixture
def on_triton():
    with pf.use_backend("triton"):
        yield


def by_triton(op):
    def run(*args, **kwargs):
        with pf.use_backend("triton"):
            return op(*args, **kwargs)

    return run


# --- against float64 --------------------------------------------------------------------------------------------------


@needs_interpreter
@settings(max_examples=25)
@given(data=st.data(), shape=st.sampled_from([(1,), (5,), (300,), (7, 33), (2, 3, 50)]), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 2**31))  # fmt: skip
def test_ppo_loss_matches_float64(data, shape, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    s = data.draw(streams(shape, g, dtype, CENTER))
    inputs = {"log_prob": log_probs(shape, g, dtype)}
    if data.draw(st.booleans()):
        inputs["entropy"] = torch.rand(shape, generator=g).to(dtype)
    if "returns" in s.stored:
        inputs["values"] = torch.randn(shape, generator=g).to(dtype)
    compare(by_triton(pf.ppo_loss), reference.ppo_loss, inputs, s)


@needs_interpreter
@pytest.mark.parametrize("policy", TOKEN_POLICIES)
def test_every_policy_matches_float64(policy):
    for dtype in (torch.float32, torch.float64):
        compare_policy(by_triton(pf.ppo_loss), reference.ppo_loss, policy, dtype)


@needs_interpreter
@settings(max_examples=20)
@given(data=st.data(), shape=st.sampled_from([(1,), (5,), (70,), (7, 9)]), width=st.sampled_from([1, 2, 6, 18, 65, 2500]),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))  # fmt: skip
def test_categorical_ppo_loss_matches_float64(data, shape, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    shape = (3,) if width > 100 else shape  # a row a program: slow
    s = data.draw(streams(shape, g, dtype))
    s.stored["actions"] = torch.randint(0, width, shape, generator=g).to(
        data.draw(st.sampled_from([torch.int64, torch.int32, torch.float32]))
    )
    s.stored["old_log_prob"] = s.stored["old_log_prob"] - math.log(width)
    if data.draw(st.booleans()):
        allowed = torch.rand(*shape, width, generator=g) < 0.7
        s.stored["action_mask"] = allowed.scatter_(-1, s.stored["actions"].long()[..., None], True)
    inputs = {"logits": torch.randn(*shape, width, generator=g).to(dtype)}
    if "returns" in s.stored:
        inputs["values"] = torch.randn(shape, generator=g).to(dtype)
    compare(by_triton(pf.categorical_ppo_loss), reference.categorical_ppo_loss, inputs, s)


@needs_interpreter
@settings(max_examples=20)
@given(data=st.data(), shape=st.sampled_from([(1,), (5,), (70,), (7, 9)]), width=st.sampled_from([1, 2, 6, 17]),
       dtype=st.sampled_from(DTYPES), squash=st.booleans(), seed=st.integers(0, 2**31))  # fmt: skip
def test_normal_ppo_loss_matches_float64(data, shape, width, dtype, squash, seed):
    g = torch.Generator().manual_seed(seed)
    s = data.draw(streams(shape, g, dtype))
    mean = torch.randn(*shape, width, generator=g).to(dtype)
    rows = data.draw(st.sampled_from([(width,), (*shape, width), (1,) * len(shape) + (width,)]))
    log_std = (0.2 * torch.randn(rows, generator=g)).to(dtype)
    s.stored["actions"] = (mean + torch.randn(*shape, width, generator=g)).to(dtype)
    near = reference.normal_log_prob(mean.float(), log_std.float(), s.stored["actions"].float(), squash=squash)[0]
    for name in ("old_log_prob", "ref_log_prob", "rollout_log_prob"):  # so that ratios stay near 1
        if name in s.stored:
            s.stored[name] = (near + s.stored[name].float()).to(dtype)
    inputs = {"mean": mean, "log_std": log_std}
    if "returns" in s.stored:
        inputs["values"] = torch.randn(shape, generator=g).to(dtype)
    compare(by_triton(pf.normal_ppo_loss), reference.normal_ppo_loss, inputs, s, near.abs().max().item(), squash=squash)


@needs_interpreter
@settings(max_examples=20)
@given(n=st.sampled_from([0, 1, 2, 100, 1024, 1025, 4097, 9000]), dtype=st.sampled_from(DTYPES), masked=st.booleans(),
       ddof=st.sampled_from([0, 1]), shift_mean=st.booleans(), eps_in_variance=st.booleans(), step=st.integers(1, 3),
       offset=st.sampled_from([0.0, 1.0, 300.0]), seed=st.integers(0, 2**31))  # fmt: skip
def test_whiten_matches_float64(n, dtype, masked, ddof, shift_mean, eps_in_variance, step, offset, seed):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(n * step, generator=g) + offset).to(dtype)[::step]
    mask = torch.rand(n, generator=g) < 0.6 if masked else None
    options = dict(mask=mask, ddof=ddof, shift_mean=shift_mean, eps_in_variance=eps_in_variance)
    actual = by_triton(pf.whiten)(x, **options)
    eager, truth = reference.whiten(x, **options), reference.whiten(as_double(x), **options)
    assert_as_good(actual, eager, truth, ulps=8.0 * (1.0 + offset))


# --- the laws of the CPU kernels --------------------------------------------------------------------------------------

LAWS = [
    *[(laws.test_nothing_behind_the_mask_is_read, n) for n in (1, 256, 1100)],
    (laws.test_a_mask_is_the_same_as_leaving_rows_out,),
    (laws.test_all_masked_is_zero_with_a_graph,),
    (laws.test_empty,),
    (laws.test_one_sample_with_normalised_advantages_keeps_its_gradient,),
    (laws.test_permutation_changes_nothing_but_rounding,),
    *[(laws.test_micro_batches_with_a_global_denominator_add_up, r) for r in ("token-mean", "seq-mean-token-sum", "sum")],
    (laws.test_packed_equals_padded, "seq-mean-token-mean"),
    (laws.test_subgradients_at_ties,),
    *[(laws.test_ratio_overflow, c) for c in (pf.LossConfig(), laws.FULL, replace(laws.FULL, ratio_cap=5.0))],
    (laws.test_kl_overflow_with_a_clamped_value_has_zero_gradient,),
    (laws.test_effective_sample_size_survives_squares_that_overflow,),
    *[(laws.test_nan_in_a_valid_element_shows, w)
      for w in ("log_prob", "old_log_prob", "advantages", "values", "returns", "entropy")],
    (laws.test_grad_output_and_retained_graphs,),
    (laws.test_only_inputs_that_require_grad_get_one,),
    *[(categorical_laws.test_index_gathers_what_indexing_would, shape, 5) for shape in ((64,), (8, 8))],
    (categorical_laws.test_index_with_sequence_reductions, "seq-mean-token-mean"),
    (categorical_laws.test_nothing_behind_the_mask_is_read, 5),
    (categorical_laws.test_gradient_rows_sum_to_zero_and_shifts_change_nothing,),
    (categorical_laws.test_empty_and_all_masked,),
    (normal_laws.test_index_gathers_what_indexing_would, (8, 8)),
    (normal_laws.test_shared_and_expanded_log_std_agree,),
    (normal_laws.test_nothing_behind_the_mask_reaches_anything,),
    (normal_laws.test_empty_and_all_masked,),
    (whiten_laws.test_two_dimensional_views_and_broadcasts,),
    (whiten_laws.test_mean_zero_and_unit_deviation,),
    (whiten_laws.test_affine_maps_of_the_input_change_nothing,),
    (whiten_laws.test_nothing_behind_the_mask_is_read,),
    *[(whiten_laws.test_masks_of_any_type, t) for t in (torch.bool, torch.uint8, torch.int64, torch.float32)],
    *[(whiten_laws.test_too_few_elements_are_left_alone, n) for n in (0, 1)],
    (whiten_laws.test_a_constant_becomes_zero,),
    (whiten_laws.test_nan_spreads_as_in_torch,),
]  # fmt: skip


@needs_interpreter
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN")
@pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{law[0].__module__[5:]}-{law[0].__name__[5:]}")
def test_laws(on_triton, law):
    check, *arguments = law
    check(*arguments)


@needs_interpreter
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN")
@pytest.mark.parametrize("config", [
    pf.LossConfig(), pf.LossConfig(ratio_cap=3.0), pf.LossConfig(dual_clip=2.0), pf.LossConfig(log_ratio_clamp=20.0),
    pf.LossConfig(kl="k3", kl_coef=0.5, kl_clamp=10.0), pf.LossConfig(kl="abs", kl_coef=0.5), pf.LossConfig(kl="k3"),
])  # fmt: skip
def test_special_values_are_as_on_the_cpu(config):
    inf, nan = math.inf, math.nan
    d, a = torch.cartesian_prod(
        torch.tensor([-inf, -200.0, -0.3, -0.0, 0.0, 0.3, 200.0, inf, nan]),
        torch.tensor([-inf, -2.0, 0.0, 2.0, inf, nan]),
    ).unbind(-1)
    u = torch.tensor([0.1, -inf, 0.0, 300.0, nan])[torch.arange(len(d)) % 5]
    alone = [torch.isinf(d) & (a == 0), torch.isnan(d) & (a == 2), torch.isnan(a) & (d == 0.3), (d == 200) & (a == -2)]

    def run():
        x = d.clone().requires_grad_()
        rest = dict(old_log_prob=torch.zeros_like(d), advantages=a, config=config, ref_log_prob=d + u)
        grad = torch.autograd.grad(pf.ppo_loss(x, **rest).loss, x)[0]
        return [grad, *(pf.ppo_loss(x.detach(), **rest, mask=mask).loss for mask in alone)]

    wanted = run()
    for x, y in zip(by_triton(run)(), wanted, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@needs_interpreter
def test_a_nan_that_spreads_stays_out_of_masked_elements(on_triton):
    """One valid advantage that is NaN makes mean and deviation NaN."""
    x = laws.example(20)
    x["advantages"][3] = math.nan
    mask = torch.arange(20) < 10
    out = pf.ppo_loss(**x, mask=mask, config=pf.LossConfig(normalize_advantages=True))
    grad = torch.autograd.grad(out.loss, x["log_prob"])[0]
    assert out.loss.isnan() and grad[mask].isnan().any() and (grad[~mask] == 0).all()


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_beyond_its_linear_part(on_triton, dtype):
    with mpmath.workdps(50):
        math_laws.test_exp_beyond_its_linear_part(None, dtype)


# --- blocks, joins and strides ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_blocks(monkeypatch):
    """A few hundred elements are then several blocks, whose partial results are joined more than once."""
    for name, size in (("MOMENT_BLOCK", 16), ("JOIN", 4), ("INLINE", 2), ("ROWS_JOINED", 16)):
        monkeypatch.setattr(_reduce, name, size)
    monkeypatch.setattr(ppo_kernels, "_BLOCK", 16)
    monkeypatch.setattr(ppo_kernels, "_DOUBLE_BLOCK", 16)


def full_call(n, dtype=torch.float32, config=laws.FULL, **more):
    x = {k: v.detach().to(dtype) for k, v in laws.full_example(n).items()}
    leaves = [x[k].requires_grad_() for k in ("log_prob", "values", "entropy")]
    return bits(pf.ppo_loss(**x, config=config, **more), leaves)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [15, 16, 17, 33, 200])
def test_records_and_moments_are_joined_in_any_number(tiny_blocks, on_triton, n, dtype):
    mask = torch.rand(n) < 0.8
    actual = full_call(n, dtype, mask=mask)
    with pf.use_backend("reference"):
        for a, b in zip(actual, full_call(n, dtype, mask=mask), strict=True):
            torch.testing.assert_close(a, b)
    assert same_bits(actual, full_call(n, dtype, mask=mask))


@needs_interpreter
def test_a_shared_log_std_over_many_blocks(tiny_blocks, on_triton):
    n = 20 * 32 + 3  # rows of 64 numbers: 32 a program, so 21 partial sums, then 2, then 1
    stored, leaves = normal_laws.rollout(n, 64), normal_laws.parameters(n, width=64)
    stored["old_log_prob"] = reference.normal_log_prob(*leaves[:2], stored["actions"])[0].detach()
    del stored["ref_log_prob"], stored["rollout_log_prob"]
    config = pf.LossConfig(entropy_coef=0.01)
    actual = bits(pf.normal_ppo_loss(*leaves[:2], **stored, config=config, values=leaves[2]), leaves)
    with pf.use_backend("reference"):
        truth = bits(pf.normal_ppo_loss(*leaves[:2], **stored, config=config, values=leaves[2]), leaves)
    for a, b in zip(actual, truth, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@needs_interpreter
def test_whitening_over_many_blocks(tiny_blocks, on_triton):
    x, mask = torch.randn(700, dtype=torch.float64) + 1e6, torch.rand(700) < 0.5
    torch.testing.assert_close(pf.whiten(x, mask=mask), reference.whiten(x, mask=mask), atol=1e-8, rtol=1e-8)


@needs_interpreter
def test_a_deviation_of_one_ulp(on_triton):
    """The mean lies between two neighbouring floats; the deviation is half their distance, whichever it is rounded to."""
    y = pf.whiten(torch.tensor([1e4, 1e4 + 2.0**-10]).repeat(600), ddof=0)
    assert (y.max() - y.min()).item() == pytest.approx(2.0, rel=1e-4)


@needs_interpreter
@pytest.mark.parametrize("double_values", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_strides(on_triton, dtype, double_values):
    """Rows apart, columns apart, leading dimensions that merge and that do not: the bits of contiguous logits."""
    stored = categorical_laws.rollout(24, 6)
    values = torch.randn(4, 6, dtype=torch.float64 if double_values else dtype, requires_grad=True)
    wide = torch.randn(4, 6, 13).to(dtype)
    views = [wide[..., :6], wide[..., 1::2], wide.transpose(0, 1)[:, :, :6].transpose(0, 1), wide.mT[:, :6, :].mT[:, :, :6],
             wide.flip(0).flip(0)[..., 3:9], wide[:1, :1, :6].expand(4, 6, 6)]  # fmt: skip
    stored = {k: v.view(4, 6, *v.shape[1:]) for k, v in stored.items()}
    for view in views:
        results = []
        for logits in (view, view.contiguous()):
            leaf = logits.detach().requires_grad_()
            out = pf.categorical_ppo_loss(leaf, **stored, config=categorical_laws.FULL, values=values)
            results.append(bits(out, [leaf, values]))
        assert same_bits(*results)


@pytest.mark.parametrize("x", [
    torch.zeros(6, 4), torch.zeros(6, 8)[:, ::2], torch.zeros(4, 6).t(), torch.zeros(2, 3, 4), torch.zeros(2, 3, 8)[..., :4],
    torch.zeros(4), torch.zeros(1, 4).expand(6, 4), torch.zeros(0, 3, 4),
])  # fmt: skip
def test_rows_are_found_without_a_copy(x):
    rows, row_stride, stride = _reduce.rows_of(x)
    assert rows.data_ptr() == x.data_ptr() and rows.shape == (x.shape[:-1].numel(), x.shape[-1])
    assert torch.equal(rows, x.reshape(rows.shape)) and rows.stride() == (row_stride, stride)


@needs_interpreter
@pytest.mark.parametrize("width", [5, 40, 2500])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(on_triton, width):
    n = 9 if width < 100 else 3
    stored, logits = categorical_laws.rollout(n, width), torch.randn(n, width)
    config = pf.LossConfig(reduction="sum", entropy_coef=0.1, kl="k3", kl_coef=0.2)
    del stored["mask"], stored["old_values"], stored["returns"]

    def gradient(rows):
        leaf = logits[rows].requires_grad_()
        part = {k: v[rows] for k, v in stored.items()}
        return torch.autograd.grad(pf.categorical_ppo_loss(leaf, **part, config=config).loss, leaf)[0]

    whole = gradient(slice(None))
    for i in range(n):
        assert torch.equal(whole[i : i + 1], gradient(slice(i, i + 1)))


# --- what must not be read --------------------------------------------------------------------------------------------


def raw_categorical(logits, actions, index, stored, mask=None, action_mask=None):
    """The kernel as it is called after the checks that refuse what is out of range."""
    n = logits.shape[:-1]
    grads = torch.full_like(logits, math.nan), torch.full(n, math.nan)
    loss, stats, config = torch.tensor(math.nan), torch.full((16,), math.nan), pf.LossConfig(entropy_coef=0.1)
    raw.categorical_ppo_loss(
        raw.LossParams(config.numbers(), config.choices()), logits, actions, action_mask, index, stored["old_log_prob"],
        stored["advantages"], torch.zeros(n), None, stored["returns"], None, None, mask, None, math.nan, False, loss,
        stats, *grads, None,
    )  # fmt: skip
    return loss, stats, *grads


@needs_interpreter
def test_actions_out_of_range_are_safe(late):
    """Their rows have no distribution: log-prob 0, no gradient of the logits; the others have what they had."""
    stored = {k: v[:6] for k, v in categorical_laws.rollout().items()}
    around = torch.full((8, 3, 4), math.nan)  # what a read out of bounds would find
    around[2:, 1] = torch.randn(6, 4)
    logits, actions = around[2:, 1], torch.tensor([0, 1, 2, 3, 0, 1])
    wanted = raw_categorical(logits, actions, None, stored)
    for bad in (-1, 4, 8, 10**12, -(10**12)):
        actions[2] = bad
        loss, _, grad, grad_values = raw_categorical(logits, actions, None, stored)
        with pytest.raises(ValueError, match=rf"^categorical_ppo_loss: actions must be in range, got {bad} at 2$"):
            _workspace.raise_reported()
        assert loss.isfinite() and (grad[2] == 0).all() and torch.equal(grad_values, wanted[3])
        keep = torch.arange(6) != 2
        assert torch.equal(grad[keep], wanted[2][keep])


@needs_interpreter
def test_an_index_out_of_range_counts_as_masked_out(late):
    stored, index = categorical_laws.rollout(20, 5), torch.randint(0, 20, (7,))
    names = ("old_log_prob", "advantages", "returns", "mask", "action_mask", "actions")
    held = {}
    for name in names:  # in the middle of a buffer whose rest must not be read
        x = stored[name]
        around = (
            torch.full((60, *x.shape[1:]), math.nan).to(x.dtype)
            if x.is_floating_point()
            else torch.ones_like(x).repeat(3, *[1] * (x.ndim - 1))
        )
        around[20:40] = x
        held[name] = around[20:40]
    logits = torch.randn(7, 5)
    rest = {"mask": held["mask"], "action_mask": held["action_mask"]}
    index[3] = stored["mask"].logical_not().nonzero()[0, 0]  # masked out
    wanted = raw_categorical(logits, held["actions"], index, held, **rest)
    for bad in (-1, 20, 35, -15):
        index[3] = bad
        assert same_bits(wanted, raw_categorical(logits, held["actions"], index, held, **rest))
        with pytest.raises(ValueError, match=rf"^categorical_ppo_loss: index must be in range, got {bad} at 3$"):
            _workspace.raise_reported()


def labelled(op, n, stored, width=6):
    """(a call of the op with actions and an index, good ones of these): its loss and the gradient of its first input."""
    index = torch.randint(0, stored, (n,))
    x = {"old_log_prob": torch.randn(stored) - 1.5, "advantages": torch.randn(stored)}
    logits, log_std = torch.randn(n, width), torch.zeros(width)
    normal_actions = torch.randn(stored, width)

    def call(actions, index, **rest):
        leaf = logits.clone().requires_grad_()
        if op == "normal_ppo_loss":
            out = pf.normal_ppo_loss(leaf, log_std, normal_actions, **x, index=index, **rest)
        else:
            out = pf.categorical_ppo_loss(leaf, actions, **x, index=index, **rest)
        return out, torch.autograd.grad(out.loss, leaf)[0]

    return call, torch.randint(0, width, (stored,)), index


@needs_interpreter
@pytest.mark.parametrize("bad", [-1, 800, -(2**62), 2**40 + 7])
@pytest.mark.parametrize(("op", "argument"), [
    ("categorical_ppo_loss", "actions"), ("categorical_ppo_loss", "index"), ("normal_ppo_loss", "index"),
])  # fmt: skip
def test_a_label_out_of_range_is_said(on_triton, op, argument, bad):
    """Its value and its place in the minibatch, by the very call that runs in the interpreter; the next one is as ever."""
    n, stored = 700, 800  # more than one program
    call, actions, index = labelled(op, n, stored)
    index = torch.randperm(stored)[:n]  # each action is one row's
    wanted = call(actions, index)[1]
    for row in (0, 333, n - 1):
        wrong = {"actions": actions.clone(), "index": index.clone()}
        wrong[argument][index[row] if argument == "actions" else row] = bad
        with pytest.raises(ValueError, match=rf"^{op}: {argument} must be in range, got {bad} at {row}$"):
            call(**wrong)
        assert torch.equal(call(actions, index)[1], wanted)


@needs_interpreter
def test_a_wide_rows_action_out_of_range_is_said(on_triton):
    call, actions, index = labelled("categorical_ppo_loss", 5, 5, categorical_kernels._WIDEST + 3)
    actions[index[3]] = len(actions) * 2000
    with pytest.raises(ValueError, match=r"^categorical_ppo_loss: actions must be in range, got 10000 at \d$"):
        call(actions, index)


@needs_interpreter
def test_both_labels_of_a_program_are_noted(late, on_triton):
    """Each in its own slot; both are said, one after the other."""
    call, actions, index = labelled("categorical_ppo_loss", 20, 20)
    index = torch.arange(20)
    wanted = call(actions, index)[1]
    wanted[[4, 7, 8, 9]] = 0
    actions[4], actions[9], index[7], index[8] = 66, -6, 77, -8
    assert torch.equal(call(actions, index)[1], wanted)
    said = []
    for _ in range(2):
        with pytest.raises(ValueError, match="must be in range") as error:
            pf.whiten(torch.arange(5.0))
        said.append(str(error.value))
    assert said == ["categorical_ppo_loss: index must be in range, got 77 at 7",
                    "categorical_ppo_loss: actions must be in range, got 66 at 4"]  # fmt: skip
    pf.whiten(torch.arange(5.0))


@needs_interpreter
def test_nothing_is_left_of_a_call_that_raised(on_triton):
    call, actions, index = labelled("categorical_ppo_loss", 20, 20)
    wrong = torch.arange(20)
    wrong[3] = -1
    with pytest.raises(ValueError, match=r"index must be in range, got -1 at 3$"):
        call(actions + 1000, wrong)
    call(actions, index)


@needs_interpreter
def test_what_is_masked_out_is_not_reported(on_triton):
    """An action that nobody reads; of the rest, what is out of range is."""
    call, actions, index = labelled("categorical_ppo_loss", 40, 60)
    mask = torch.ones(60, dtype=torch.bool)
    index[5], mask[index[5]], actions[index[5]] = 59, False, 1000
    index[:5] = index[6:] = 7
    mask[59], actions[59] = False, 1000
    out, grad = call(actions, index, mask=mask)
    assert out.loss.isfinite() and not grad[5].any()
    mask[59] = True
    with pytest.raises(ValueError, match=r"actions must be in range, got 1000 at 5$"):
        call(actions, index, mask=mask)
    actions[7], mask[59] = -3, False
    with pytest.raises(ValueError, match=r"actions must be in range, got -3 at 0$"):
        call(actions, index, mask=mask)


@needs_interpreter
def test_statistics_say_it_too(late, on_triton):
    """Whoever reads them waits for the kernel anyway."""
    call, actions, index = labelled("categorical_ppo_loss", 20, 20)
    actions[index[3]] = 6
    out, _ = call(actions, index)
    with pytest.raises(ValueError, match="categorical_ppo_loss: actions must be in range, got 6 at"):
        out.stats.to_dict()
    assert out.stats.to_dict()["policy_loss"] == out.stats.vector[0].item()


@needs_interpreter
def test_a_row_without_a_possible_action_is_as_on_the_cpu():
    """Logits that are all -inf, and an action mask that leaves none."""
    logits = torch.randn(6, 4)
    logits[2] = -math.inf
    action_mask = torch.ones(6, 4, dtype=torch.bool)
    action_mask[4] = False
    stored = {"old_log_prob": torch.zeros(6), "advantages": torch.randn(6), "action_mask": action_mask}

    def run():
        leaf = logits.clone().requires_grad_()
        out = pf.categorical_ppo_loss(leaf, torch.arange(6) % 4, **stored, config=pf.LossConfig(entropy_coef=0.1))
        return bits(out, [leaf])

    wanted = run()
    for x, y in zip(by_triton(run)(), wanted, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)
    assert (wanted[2][[2, 4]] == 0).all()


@needs_interpreter
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_an_infinite_action_without_a_gradient_is_as_on_the_cpu():
    actions = torch.randn(5, 3)
    actions[1, 2] = math.inf  # log_prob -inf, ratio 0

    def run():
        leaves = normal_laws.parameters(5)[:2]
        out = pf.normal_ppo_loss(*leaves, actions, torch.full((5,), -4.0), torch.ones(5))
        return torch.autograd.grad(out.loss, leaves)

    torch.manual_seed(1)
    wanted = run()
    torch.manual_seed(1)
    for x, y in zip(by_triton(run)(), wanted, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x, y)


# --- numbers on the device, scaling -----------------------------------------------------------------------------------


@needs_interpreter
def test_numbers_may_be_on_the_device(on_triton):
    """They take the place of the host's, which still say what is off."""
    x = {k: v.detach() for k, v in laws.full_example(50).items()}
    now, later = (
        laws.FULL,
        replace(laws.FULL, clip_low=0.05, value_coef=2.0, entropy_coef=0.3, dual_clip=1.1, kl_coef=0.0),
    )

    def call(config, device_numbers=None):
        params = raw.LossParams(config.numbers(), config.choices(), device_numbers)
        grads = [torch.full_like(x[k], math.nan) for k in ("log_prob", "values", "entropy")]
        loss, stats = torch.tensor(math.nan), torch.full((16,), math.nan)
        names = ("log_prob", "old_log_prob", "advantages", "values", "old_values", "returns", "entropy", "ref_log_prob",
                 "rollout_log_prob")  # fmt: skip
        raw.ppo_loss(params, *(x[k] for k in names), None, None, math.nan, False, loss, stats, *grads, None)
        return [loss, stats, *grads]

    assert same_bits(call(later), call(now, torch.tensor(later.numbers(), dtype=torch.float64)))


def test_params_refuse_another_packages_config():
    with pytest.raises(ValueError, match="reinstall"):
        raw.LossParams((0.2,), (0,))


def test_params_are_pinned_once(monkeypatch):
    """For all streams, and not for the CPU."""
    made, streams = [], iter([1, 1, 2, 3])

    def unpinned(*args, pin_memory=False, **kwargs):
        made.append(pin_memory)
        return tensor(*args, **kwargs)

    tensor, config = torch.tensor, pf.LossConfig()
    monkeypatch.setattr(torch, "tensor", unpinned)
    driver = SimpleNamespace(get_current_stream=lambda device: next(streams))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    params = raw.LossParams(config.numbers(), config.choices())
    params.on(torch.device("cpu"))
    assert made == [False]
    there = [params.on(torch.device("meta")) for _ in range(4)]
    assert made == [False, True] and there[0] is there[1] and len({id(x) for x in there}) == 3


def test_params_are_moved_once():
    config = pf.LossConfig()
    params = raw.LossParams(config.numbers(), config.choices())
    there = params.on(torch.device("cpu"))
    assert there is params.on(torch.device("cpu")) and same_bits([there], [config.numbers_vector])


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 4096, 5000])
def test_scale(dtype, n):
    x, y = torch.randn(n).to(dtype), torch.randn(3, 5).to(dtype)
    a, b = x.clone(), y.clone()
    raw.scale(torch.tensor(1.0), a, None, b, torch.empty(0, dtype=dtype))
    assert torch.equal(a, x) and torch.equal(b, y)
    raw.scale(torch.tensor(-2.0), a, None, b)
    assert torch.equal(a, -2 * x) and torch.equal(b, -2 * y)


@pytest.mark.parametrize("x", [
    torch.zeros(3, 4), torch.zeros(3, 1).expand(3, 4), torch.zeros(4, 3).t(), torch.zeros(0, 1).expand(0, 4),
    torch.zeros(9).as_strided((4, 3), (1, 2)), torch.zeros(()), torch.zeros(4, 6)[:, ::2],
])  # fmt: skip
def test_overlap_is_seen_as_on_the_cpu(x):
    assert raw.has_overlap(x) == _C.has_overlap(x)


# --- launching --------------------------------------------------------------------------------------------------------


class FakeKernel:
    """What `_launch` uses of a JITFunction; it counts what it compiles and what is started directly."""

    def __init__(self, names, do_not_specialize=(), starts=True):
        self.params = [SimpleNamespace(name=n, do_not_specialize=n in do_not_specialize, default=None) for n in names]
        self.through_triton, self.started, self.starts = [], [], starts

    def __getitem__(self, grid):
        def run(*args, **meta):
            self.through_triton.append((grid, args, meta))
            if not self.starts:
                return None
            return SimpleNamespace(
                run=lambda *a: self.started.append(a), function="function", packed_metadata="metadata"
            )

        return run


@pytest.fixture
def fake_driver(monkeypatch):
    driver = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def test_the_second_launch_starts_the_compiled_kernel(fake_driver):
    kernel = FakeKernel(["x", "absent", "n", "unit", "BLOCK", "FLAG"], ["n"])
    x = torch.zeros(64)
    for n in (5, 1, 16):
        _launch.start(kernel, (n,), (x, None, n, 0.5), {"BLOCK": 128, "num_warps": 4}, 0)
    assert len(kernel.through_triton) == 1
    assert kernel.through_triton[0] == ((5,), (x, None, 5, 0.5), {"BLOCK": 128, "num_warps": 4})
    # grid, stream, function, metadata, no launch metadata and hooks, then all parameters in order, options not
    assert kernel.started[-1] == (
        16, 1, 1, "stream of 0", "function", "metadata", None, None, None, x.data_ptr(), None, 16, 0.5, 128, None,
    )  # fmt: skip


def test_what_triton_specialises_on_compiles_anew(fake_driver):
    kernel = FakeKernel(["x", "y", "n", "stride", "BLOCK"], ["n"])
    x, y = torch.zeros(64), torch.zeros(64)

    def compiles(*args, device=0, **meta):
        before = len(kernel.through_triton)
        _launch.start(kernel, (1,), args, {"BLOCK": 128, **meta}, device)
        return len(kernel.through_triton) > before

    assert compiles(x, y, 7, 7) and not compiles(x, y, 9, 9) and not compiles(y, x, 1, 11)
    assert compiles(x[1:], y, 7, 7)  # not on a multiple of 16 bytes
    assert compiles(x, y[1:], 7, 7) and not compiles(x[4:], y[3:], 7, 7)
    assert compiles(x.double(), y, 7, 7) and compiles(x, None, 7, 7)
    assert compiles(x, y, 7, 1) and compiles(x, y, 7, 32) and not compiles(x, y, 7, 48)
    assert compiles(x, y, 2**31, 7) and not compiles(x, y, 2**33, 7)  # a length may change but for its width
    assert compiles(x, y, 7, 7, BLOCK=64) and compiles(x, y, 7, 7, num_warps=8) and compiles(x, y, 7, 7, device=1)


def test_a_report_does_not_decide_how_a_kernel_starts(fake_driver):
    """Not the device, which the first tensor says, nor by its place which compiled kernel it is."""
    for kernels in (log_prob_kernels, multi_kernels, categorical_kernels, normal_kernels):
        for kernel, types, *_ in kernels.AOT:
            pointers = [name for name, kind in types.items() if kind.startswith("*")]
            assert pointers[0] in ("logits", "mean") and ("report" not in types or list(types).index("report") > 0)
            assert types.get("report", "*i64") in ("*i64", "constexpr"), kernel
    kernel, x = FakeKernel(["x", "report", "n", "BLOCK"], ["n"]), torch.zeros(4)
    for op in _reports._LABELS:
        report = _reports.of(op, torch.device("cpu"))
        _launch.start(kernel, (1,), (x, report, 4), {"BLOCK": 128}, 0)
    assert len(kernel.through_triton) == 1 and kernel.started[-1][9:11] == (x.data_ptr(), report.data_ptr())
    _launch.start(kernel, (1,), (x, None, 4), {"BLOCK": 128}, 0)
    assert len(kernel.through_triton) == 2


def test_launching_falls_back_on_triton(fake_driver, monkeypatch):
    kernel, x = FakeKernel(["x"], starts=False), torch.zeros(4)
    for _ in range(3):
        _launch.start(kernel, (1,), (x,), {}, 0)
    assert len(kernel.through_triton) == 3

    def refuses(*args):
        raise TypeError("another launcher")

    kernel = FakeKernel(["x"])
    _launch.start(kernel, (1,), (x,), {}, 0)
    (known,) = [c for c in _launch._compiled.values() if c is not None]
    known.run = refuses
    for _ in range(3):
        _launch.start(kernel, (1,), (x,), {}, 0)
    assert len(kernel.through_triton) == 4

    kernel = FakeKernel(["x"])
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=["profiler"]), launch_exit_hook=None)
    _launch.start(kernel, (1,), (x,), {}, 0)
    monkeypatch.setattr(triton, "knobs", SimpleNamespace(runtime=hooks))
    _launch.start(kernel, (1,), (x,), {}, 0)
    assert len(kernel.through_triton) == 2 and not kernel.started


def test_tiles_depend_on_the_width_alone():
    for double in (False, True):
        for width in (1, 2, 3, 1000, 2048, 2049, 152_000):
            tile = categorical_kernels._tile(width, double)
            assert tile["COLS"] * tile["CHUNKS"] >= width and tile["ROWS"] * tile["COLS"] <= 2048
