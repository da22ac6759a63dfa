"""What kernels for language models have got wrong elsewhere, one test each: numbers against float64 formulas written out
here, or laws. The list is of bugs that were filed against Liger, verl, TRL, OpenRLHF, flash-attention and their like; each
is tested at depth beside its op, and here so that it can be read in one place.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import os
import pkgutil
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import ppo_fast as pf

F64 = torch.float64
HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNELS = ["cpu", "triton"] if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1" else ["cpu"]


# --- the formulas -----------------------------------------------------------------------------------------------------


def log_softmax(logits, actions, temperature=1.0):
    """(log-prob, entropy) in float64, with 0·log 0 = 0."""
    z = logits.to(F64) / temperature
    log_p = z - z.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    return log_p.gather(-1, actions.long()[..., None])[..., 0], -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def d_logits(logits, actions, g, h, temperature=1.0):
    """Gradient of Σ g·log_prob + h·entropy: g·(1[a] - p) - h·p·(log p + H), over the temperature."""
    z = logits.to(F64) / temperature
    log_p = z - z.logsumexp(-1, keepdim=True)
    p, entropy = log_p.exp(), log_softmax(logits, actions, temperature)[1]
    one = torch.zeros_like(z).scatter_(-1, actions.long()[..., None], 1.0)
    of_entropy = torch.where(p > 0, p * (log_p + entropy[..., None]), 0.0)
    return (g.to(F64)[..., None] * (one - p) - h.to(F64)[..., None] * of_entropy) / temperature


def surrogate(log_prob, old_log_prob, advantages, low=0.2, high=0.2):
    """PPO's loss of each token, in float64."""
    ratio, a = (log_prob.to(F64) - old_log_prob.to(F64)).exp(), advantages.to(F64)
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))


def near(actual, expected, tolerance=2e-6):
    """Within `tolerance` of the largest magnitude."""
    assert actual.shape == expected.shape
    error, scale = (actual.to(F64) - expected).abs().max().item(), max(expected.abs().max().item(), 1e-30)
    assert error <= tolerance * scale, f"error {error:.2e} of {scale:.2e}"


def differentiated(outputs, leaves, *seeds):
    return torch.autograd.grad(outputs, leaves, [s.to(x.dtype) for s, x in zip(seeds, outputs, strict=True)])


class _Overwritable(torch.autograd.Function):
    """Logits as a network hands them on: no leaf, so that their gradient may be written over them."""

    @staticmethod
    def forward(ctx, anchor, logits):
        return logits.detach()

    @staticmethod
    def backward(ctx, _):
        return None, None


def head(m=24, h=8, v=101, dtype=F64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(m, h, generator=g, dtype=F64), torch.randn(v, h, generator=g, dtype=F64) / 2
    x = {"hidden": hidden.to(dtype).requires_grad_(), "weight": weight.to(dtype).requires_grad_()}
    return {**x, "targets": torch.randint(v, (m,), generator=g)}


def rollout(m=24, seed=1):
    g = torch.Generator().manual_seed(seed)
    old = -3.0 + 0.3 * torch.randn(m, generator=g, dtype=F64)
    return {"old_log_prob": old, "advantages": torch.randn(m, generator=g, dtype=F64)}


# --- 1 ----------------------------------------------------------------------------------------------------------------


class Test1OffsetsBeyond32Bits:
    """M·V passes 2³¹ at 14,000 tokens of a vocabulary of 152,000; grids of GPUs end at 65,535 in y and z."""

    @pytest.fixture
    def far(self, tmp_path):
        """[n] bfloat16 of a file of holes: addresses beyond 2³² bytes and 2³¹ elements, but no memory."""
        if shutil.disk_usage(tmp_path).free < 1 << 30:
            pytest.skip("no room")
        path = tmp_path / "holes"
        yield lambda n: torch.from_file(str(path), shared=True, size=n, dtype=torch.bfloat16)
        path.unlink(missing_ok=True)

    def test_rows_far_apart_read_and_written(self, far):
        stride, width = 2**30 + 12_345, 1000
        logits = far(2 * stride + width).as_strided((3, width), (stride, 1))
        start = torch.randn(3, width).bfloat16()
        actions, seeds, anchor = torch.tensor([3, 5, 999]), torch.randn(2, 3), torch.zeros((), requires_grad=True)
        for backend in KERNELS:
            logits.copy_(start)
            with pf.use_backend(backend):
                out = pf.categorical_log_prob(_Overwritable.apply(anchor, logits), actions, inplace_backward=True)
                torch.autograd.backward(out, list(seeds))
            for a, b in zip(out, log_softmax(start, actions), strict=True):
                near(a, b)
            near(logits, d_logits(start, actions, *seeds), 2**-8)

    def test_one_matrix_of_more_than_two_billion(self, far):
        width, n = 131_072, 16_400
        logits, rows = far(n * width).view(n, width), torch.tensor([0, 8_191, n - 1])
        assert logits.numel() > 2**31
        values, actions = torch.randn(3, width).bfloat16(), torch.full((n,), -100)
        logits[rows], actions[rows] = values, torch.tensor([1, 70_000, width - 1])
        log_prob, entropy = pf.categorical_log_prob(logits, actions, ignore_index=-100)  # what is ignored is not read
        for a, b in zip((log_prob, entropy), log_softmax(values, actions[rows]), strict=True):
            near(a[rows], b)
        assert log_prob.count_nonzero() == 3

    def test_a_minibatch_taken_from_a_rollout_of_more_than_two_billion(self, far):
        n = 2**31 + 100
        index = torch.tensor([7, 2**31 + 99])
        advantages, old = far(n), torch.full((1,), -1.5).expand(n)
        advantages[index] = torch.tensor([2.0, -1.0]).bfloat16()
        logits, actions = torch.randn(2, 6), torch.tensor([4]).expand(n)
        out = pf.categorical_ppo_loss(logits, actions, old, advantages, index=index)
        expected = surrogate(log_softmax(logits, torch.tensor([4, 4]))[0], old[:2], torch.tensor([2.0, -1.0]))
        near(out.loss, expected.mean())

    def test_more_rows_than_a_grid_has_in_y(self):
        n = 70_000
        logits, actions = torch.randn(n, 3), torch.randint(3, (n,))
        near(pf.categorical_log_prob(logits, actions)[0], log_softmax(logits, actions)[0])
        for shape, time_dim in (((n, 1), 0), ((1, n), 0), ((1, n), 1), ((n, 1), 1)):
            rewards = torch.ones(shape)
            advantages, _ = pf.gae(rewards, torch.zeros(shape), gamma=0.5, lam=1.0, time_dim=time_dim)
            remaining = torch.arange(shape[time_dim], 0, -1, dtype=F64).view(-1, 1)
            expected = 2.0 - 2.0 ** (1 - remaining)  # 1 + ½ + ... over the steps that remain
            near(advantages, (expected if time_dim == 0 else expected.T).expand(shape))


# --- 2 ----------------------------------------------------------------------------------------------------------------


class Test2NothingRecompilesForANumber:
    def test_lengths_and_coefficients_under_torch_compile(self):
        torch._dynamo.reset()

        @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
        def step(hidden, weight, targets, old_log_prob, advantages, rewards, config, temperature):
            log_prob, entropy = pf.linear_log_prob(hidden, weight, targets, temperature=temperature)
            returns = pf.gae(rewards, torch.zeros_like(rewards))[1]
            loss = pf.ppo_loss(log_prob, old_log_prob, advantages, config, entropy=entropy).loss
            return loss * 1.0, returns

        for i, m in enumerate((20, 31, 45)):
            x, stored, t = head(m), rollout(m), 0.7 + 0.1 * i
            config = pf.LossConfig(clip_high=0.2 + 0.1 * i, entropy_coef=0.01 * i)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                loss, returns = step(
                    **x, **stored, rewards=torch.ones(m, 2), config=config, temperature=torch.tensor(t)
                )
            log_prob, entropy = log_softmax(x["hidden"] @ x["weight"].T, x["targets"], t)
            policy = surrogate(log_prob, **stored, high=config.clip_high).mean()
            near(loss, policy - config.entropy_coef * entropy.mean(), 1e-6)  # the temperature is float32
            near(returns, sum_of_powers(0.99 * 0.95, m).expand(m, 2), 1e-5)

    @pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
    def test_no_size_and_no_coefficient_is_a_constant_of_a_triton_kernel(self):
        """Constants are tiles, dtypes and switches; a number that a kernel is specialised on compiles it again."""
        from ppo_fast import kernels

        tiles = {"BLOCK", "CHUNKS", "COLS", "COLUMNS", "GROUP", "INLINE", "LANES", "ROWS", "STEPS"}
        dtypes, of_a_loss = {"DTYPE", "T"}, {"S"}
        switches = {"AHEAD", "ALIGNED", "CARRY", "COUNTED", "DDOF", "EPS_IN_VARIANCE", "EVEN", "NESTED", "SHIFT_MEAN",
                    "SQUASH", "TIME_MAJOR", "VALUES"}  # fmt: skip
        seen = set()
        for module in sorted(m.name for m in pkgutil.iter_modules(kernels.__path__)):
            for kernel, _, values, _ in getattr(importlib.import_module(f"ppo_fast.kernels.{module}"), "AOT", []):
                notes = {k: str(p.annotation) for k, p in inspect.signature(kernel.fn).parameters.items()}
                constants = {k for k, note in notes.items() if "constexpr" in note}
                assert constants <= tiles | dtypes | switches | of_a_loss, kernel.fn.__name__
                assert all("fp" in str(values[k]) for k in constants & dtypes)
                assert all(isinstance(v, (bool, str)) or v in (None, 0, 1) for v in values.get("S", ()))  # no number
                if hasattr(kernel, "kwargs"):  # as the interpreter keeps them
                    sizes = {k for k, note in notes.items() if note == "tl.int64"}
                    assert sizes <= set(kernel.kwargs["do_not_specialize"]), kernel.fn.__name__
                seen.add(kernel.fn.__name__)
        assert len(seen) > 10


def sum_of_powers(factor, n):
    """[n, 1]: 1 + factor + ... of the steps from each one on."""
    remaining = torch.arange(n, 0, -1, dtype=F64)
    return ((1 - factor**remaining) / (1 - factor))[:, None]


# --- 3 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_3_vocabularies_that_no_tile_divides_padded_and_impossible_ones(backend):
    for width in (1, 63, 65, 1000, 1025, 4099):
        logits, actions, seeds = torch.randn(3, width), torch.tensor([0, width // 2, width - 1]), torch.randn(2, 3)
        padded = torch.cat([logits, torch.full((3, 29), -math.inf)], 1)
        with pf.use_backend(backend):
            for x in (logits, padded):
                x = x.clone().requires_grad_()
                out = pf.categorical_log_prob(x, actions)
                (grad,) = differentiated(out, [x], *seeds)
                for a, b in zip(out, log_softmax(logits, actions), strict=True):
                    assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)  # 0·(-inf) is 0 in the entropy
                assert torch.allclose(grad[:, :width].double(), d_logits(logits, actions, *seeds), atol=1e-6)
                assert not grad[:, width:].any()
    impossible = torch.full((2, 70), -math.inf, requires_grad=True)
    with pf.use_backend(backend):
        out = pf.categorical_log_prob(impossible, torch.tensor([0, 69]))
        (grad,) = differentiated(out, [impossible], torch.ones(2), torch.ones(2))
    assert not any(x.any() for x in (*out, grad))


def test_3_a_padded_head():
    x = head()
    grown = torch.cat([x["weight"].detach(), torch.full((27, 8), math.nan, dtype=F64)]).requires_grad_()
    log_prob, entropy = pf.linear_log_prob(x["hidden"], grown[:101], x["targets"])
    expected = log_softmax((x["hidden"] @ x["weight"].T).detach(), x["targets"])
    near(log_prob, expected[0], 1e-12)
    near(entropy, expected[1], 1e-12)
    (grad,) = torch.autograd.grad(log_prob.sum(), grown)
    assert grad[:101].isfinite().all() and not grad[101:].any()
    bias = torch.cat([torch.zeros(101, dtype=F64), torch.full((27,), -math.inf, dtype=F64)])
    log_prob, entropy = pf.linear_log_prob(x["hidden"], grown.detach().nan_to_num(0.0), x["targets"], bias=bias)
    near(log_prob, expected[0], 1e-12)
    near(entropy, expected[1], 1e-12)


# --- 4 ----------------------------------------------------------------------------------------------------------------


def test_4_labels_ignored_out_of_range_negative_and_unaligned():
    x = head()
    logits = (x["hidden"] @ x["weight"].T).detach()
    expected = log_softmax(logits, x["targets"])[0]
    for labels in (
        x["targets"].int(), x["targets"].to(torch.uint8), torch.stack([x["targets"]] * 3, 1)[:, 1],
        torch.cat([torch.zeros(1).to(torch.uint8), x["targets"].to(torch.uint8)])[1:],  # at an odd address
    ):  # fmt: skip
        near(pf.categorical_log_prob(logits, labels)[0], expected, 1e-12)
        near(pf.linear_log_prob(x["hidden"], x["weight"], labels)[0], expected, 1e-12)
    for ignored in (-100, 0, -1):
        labels = torch.where(torch.arange(24) % 3 == 0, ignored, x["targets"].clamp(min=1))
        kept = labels != ignored
        for log_prob, entropy in (
            pf.categorical_log_prob(logits, labels, ignore_index=ignored),
            pf.linear_log_prob(x["hidden"], x["weight"], labels, ignore_index=ignored),
        ):
            near(log_prob[kept], log_softmax(logits, labels.clamp(min=0))[0][kept], 1e-12)
            assert not log_prob[~kept].any() and not entropy[~kept].any()
    for bad in (-1, 101, 2**40, -(2**62)):
        labels = torch.where(torch.arange(24) == 5, bad, x["targets"])
        with pytest.raises(
            ValueError, match=rf"^categorical_log_prob: actions must be in \[0, 101\).* got {bad} at row 5"
        ):
            pf.categorical_log_prob(logits, labels)
        with pytest.raises(ValueError, match=rf"^linear_log_prob: targets must be in \[0, 101\), got {bad} at 5"):
            pf.linear_log_prob(x["hidden"], x["weight"], labels)


# --- 5 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
def test_5_views_shifted_by_one_and_rows_wider_than_the_vocabulary(backend):
    batch, length, width = 3, 7, 90
    base = torch.randn(batch, length, width + 38, requires_grad=True)
    tokens = torch.randint(width, (batch, length))
    logits, labels, seeds = base[:, :-1, :width], tokens[:, 1:], torch.randn(2, batch, length - 1)
    with pf.use_backend(backend):
        out = pf.categorical_log_prob(logits, labels)
        (grad,) = differentiated(out, [base], *seeds)
    for a, b in zip(out, log_softmax(logits.detach(), labels), strict=True):
        near(a, b)
    near(grad[:, :-1, :width], d_logits(logits.detach(), labels, *seeds))
    assert not grad[:, -1].any() and not grad[:, :, width:].any()
    old, advantages = torch.randn(length, batch).T[:, 1:], torch.randn(batch, 2 * length)[:, ::2][:, 1:]
    with pf.use_backend(backend):
        out = pf.ppo_loss(old + 0.1, old, advantages)
    near(out.loss, surrogate(old + 0.1, old, advantages).mean())


# --- 6 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # Triton's interpreter, NumPy underneath
@pytest.mark.parametrize("backend", KERNELS)
def test_6_exp_of_masked_tokens_and_clamps_before_exp(backend):
    mask = torch.tensor([True, False, True, False, False, True])
    x = torch.tensor([-1.0, 1e30, -2.0, math.nan, math.inf, -0.5], requires_grad=True)
    old = torch.tensor([-1.1, -1e30, -1.9, -1.0, -math.inf, -0.4])
    ref = torch.tensor([-1.3, 1e30, -2.0, math.inf, math.nan, -0.6])
    a = torch.tensor([1.0, math.nan, -1.0, math.inf, 1.0, 2.0])
    config = pf.LossConfig(kl="k3", kl_coef=0.1)
    with pf.use_backend(backend):
        out = pf.ppo_loss(x, old, a, config, ref_log_prob=ref, mask=mask)
    u = (ref - x.detach()).double()
    each = surrogate(x.detach(), old, a) + 0.1 * (u.exp() - u - 1)
    near(out.loss, each[mask].mean())
    (grad,) = torch.autograd.grad(out.loss, x)
    assert grad.isfinite().all() and not grad[~mask].any() and grad[mask].all()
    # a log-ratio far outside: exp(20) and no gradient, not inf·0; inside nothing changes
    d = torch.tensor([100.0, -100.0, 0.1], requires_grad=True)
    advantages = torch.tensor([-1.0, 1.0, -1.0])
    with pf.use_backend(backend):
        clamped = pf.ppo_loss(d, torch.zeros(3), advantages, pf.LossConfig(log_ratio_clamp=20.0))
    near(clamped.loss, torch.tensor((math.exp(20) - math.exp(-20) + math.exp(0.1)) / 3, dtype=F64))
    near(torch.autograd.grad(clamped.loss, d)[0], torch.tensor([0.0, 0.0, math.exp(0.1) / 3], dtype=F64))
    # a KL that overflows: its value is held, its gradient is 0 and not NaN
    x = torch.tensor([-200.0, -1.0], requires_grad=True)
    held = pf.LossConfig(kl="k3", kl_coef=1.0, kl_value_clamp=10.0)
    with pf.use_backend(backend):
        out = pf.ppo_loss(x, x.detach(), torch.zeros(2), held, ref_log_prob=torch.tensor([-1.0, -1.5]))
    near(out.stats.kl, torch.tensor((10.0 + math.exp(-0.5) + 0.5 - 1) / 2, dtype=F64))
    near(torch.autograd.grad(out.loss, x)[0], torch.tensor([0.0, (1 - math.exp(-0.5)) / 2], dtype=F64))


# --- 7 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"])
@pytest.mark.parametrize("policy", ["ppo", "gspo", "gmpo"])
def test_7_nothing_valid_in_a_row_or_in_the_batch(policy, reduction):
    config = pf.LossConfig(policy=policy, reduction=reduction, entropy_coef=0.1, normalize_advantages=True)
    x, h = (torch.randn(3, 5, dtype=F64, requires_grad=True) for _ in range(2))
    old, a, mask = x.detach() + 0.05, torch.randn(3, 5, dtype=F64), torch.zeros(3, 5, dtype=torch.bool)
    out = pf.ppo_loss(x, old, a, config, entropy=h, mask=mask)
    assert out.loss.item() == 0.0 and out.loss.requires_grad
    assert all(math.isfinite(v) for k, v in out.stats.to_dict().items() if k != "explained_variance")
    assert not any(g.any() for g in torch.autograd.grad(out.loss, (x, h)))
    mask[0], mask[2, 1:] = True, True  # a row without a token beside others: as if it were not there
    whole = pf.ppo_loss(x, old, a, config, entropy=h, mask=mask)
    rows = torch.tensor([0, 2])
    part = pf.ppo_loss(x[rows], old[rows], a[rows], config, entropy=h[rows], mask=mask[rows])
    near(whole.loss, part.loss, 1e-14)
    near(torch.autograd.grad(whole.loss, x)[0], torch.autograd.grad(part.loss, x)[0], 1e-14)


def test_7_nothing_valid_for_a_head():
    x, stored = head(), rollout()
    nothing = torch.zeros(24, dtype=torch.bool)
    out = pf.linear_ppo_loss(**x, **stored, mask=nothing, config=pf.LossConfig(entropy_coef=0.1))
    assert out.loss.item() == 0.0
    assert not any(g.any() for g in torch.autograd.grad(out.loss, (x["hidden"], x["weight"])))
    log_prob, entropy = pf.linear_log_prob(x["hidden"], x["weight"], torch.full((24,), -100), ignore_index=-100)
    grads = torch.autograd.grad(log_prob.sum() + entropy.sum(), (x["hidden"], x["weight"]))
    assert not any(y.any() for y in (log_prob, entropy, *grads))


# --- 8 ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
def test_8_temperature_once_in_float32_and_in_the_entropy(backend):
    logits, actions, seeds = (3 * torch.randn(4, 200)).bfloat16(), torch.tensor([0, 7, 9, 199]), torch.randn(2, 4)
    each = torch.tensor([0.3, 0.7, 1.0, 2.5])
    for temperature, expected in ((0.7, 0.7), (torch.tensor(0.7), 0.7), (each, each.double()[:, None])):
        x = logits.clone().requires_grad_()
        with pf.use_backend(backend):
            out = pf.categorical_log_prob(x, actions, temperature=temperature)
            (grad,) = differentiated(out, [x], *seeds)
        for a, b in zip(out, log_softmax(logits, actions, expected), strict=True):
            near(a, b)  # bfloat16 division would be off by 2e-3
        near(grad, d_logits(logits, actions, *seeds, expected), 2**-7)  # Triton's interpreter truncates
    cold = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    for temperature in (1e-3, 1e-30):
        with pf.use_backend(backend):
            out = pf.categorical_log_prob(cold, torch.tensor([2]), temperature=temperature)
            (grad,) = differentiated(out, [cold], torch.ones(1), torch.ones(1))
        assert not any(y.any() for y in (*out, grad))  # certain: log 1, no entropy, nothing to change


def test_8_temperature_of_a_head():
    x, each = head(), torch.linspace(0.3, 2.0, 24, dtype=F64)
    logits = (x["hidden"] @ x["weight"].T).detach()
    for temperature, expected in ((0.7, 0.7), (each, each[:, None])):
        out = pf.linear_log_prob(**x, temperature=temperature)
        for a, b in zip(out, log_softmax(logits, x["targets"], expected), strict=True):
            near(a, b, 1e-12)
        seeds = torch.randn(2, 24, dtype=F64)
        (grad,) = differentiated(out, [x["hidden"]], *seeds)
        near(grad, d_logits(logits, x["targets"], *seeds, expected) @ x["weight"].detach(), 1e-12)


# --- 9 ----------------------------------------------------------------------------------------------------------------


class Test9GradientsOverTheLogits:
    def run(self, leaf, actions):
        logits = leaf * 1.0
        return logits, pf.categorical_log_prob(logits, actions, inplace_backward=True)

    def test_entropy_may_take_part_and_the_version_counts(self):
        leaf, actions, seeds = torch.randn(4, 50, requires_grad=True), torch.arange(4), torch.randn(2, 4)
        logits, out = self.run(leaf, actions)
        version = logits._version
        (grad,) = differentiated(out, [leaf], *seeds)
        near(grad, d_logits(leaf.detach(), actions, *seeds))
        assert logits._version > version

    def test_a_second_consumer_a_second_backward_and_a_leaf_are_refused(self):
        leaf, actions = torch.randn(4, 50, requires_grad=True), torch.arange(4)
        with pytest.raises(ValueError, match="leaf"):
            pf.categorical_log_prob(leaf, actions, inplace_backward=True)
        logits, out = self.run(leaf, actions)
        other = logits.square().sum()
        out[0].sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
        _, out = self.run(leaf, actions)
        out[0].sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out[0].sum().backward()

    def test_a_second_derivative_is_right(self):
        leaf, actions = torch.randn(3, 4, dtype=F64, requires_grad=True), torch.tensor([0, 3, 1])
        for op in (lambda z: self.run(z, actions)[1], lambda z: pf.categorical_log_prob(z, actions)):
            assert torch.autograd.gradgradcheck(op, leaf)


# --- 10 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [3.0, -1.0, 0.0, 65536.0])
def test_10_any_grad_output_scales_gradients_made_in_the_forward(scale):
    x, stored = head(), rollout()
    config = pf.LossConfig(entropy_coef=0.1)
    logits = (x["hidden"] @ x["weight"].T).detach().requires_grad_()
    log_prob = log_softmax(logits.detach(), x["targets"])[0].requires_grad_()
    for make, leaves in (
        (lambda: pf.ppo_loss(log_prob, **stored), [log_prob]),
        (lambda: pf.categorical_ppo_loss(logits, x["targets"], **stored, config=config), [logits]),
        (lambda: pf.linear_ppo_loss(**x, **stored, config=config), [x["hidden"], x["weight"]]),
    ):
        once = torch.autograd.grad(make().loss, leaves)
        scaled = torch.autograd.grad(make().loss * torch.tensor(scale, dtype=F64), leaves)
        for a, b in zip(scaled, once, strict=True):
            assert b.any()
            torch.testing.assert_close(a, scale * b, rtol=1e-14, atol=0.0)
        whole = make().loss
        pair = torch.autograd.grad(whole * scale + whole, leaves)  # two consumers add up
        for a, b in zip(pair, once, strict=True):
            torch.testing.assert_close(a, (scale + 1.0) * b, rtol=1e-14, atol=1e-300)


# --- 11 ---------------------------------------------------------------------------------------------------------------


class Test11SumsOverChunks:
    def row_bytes(self, x):
        return len(x["weight"]) * x["weight"].element_size()

    def gradients(self, x, chunk):
        out = pf.linear_log_prob(**x, logits_memory=None if chunk is None else 3 * self.row_bytes(x) * chunk)
        return torch.autograd.grad([y.sum() for y in out], [x["hidden"], x["weight"]])

    @pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
    def test_many_chunks_lose_nothing(self, dtype):
        x = head(600, dtype=dtype)
        x["targets"][:] = 5  # every chunk adds to the same row
        z = x["hidden"].detach().double() @ x["weight"].detach().double().T
        given = d_logits(z, x["targets"], torch.ones(600), torch.ones(600))
        truth = given @ x["weight"].detach().double(), given.T @ x["hidden"].detach().double()
        one, many = self.gradients(x, None), self.gradients(x, 3)
        for a, b, t in zip(one, many, truth, strict=True):
            near(b, t, 2**-7 if dtype is torch.bfloat16 else 1e-5)
            assert dtype is not torch.bfloat16 or (b - t).abs().max() <= 2 * (a - t).abs().max()

    def test_the_same_bits_on_any_number_of_threads(self):
        """Given a torch.mm with the same bits, which it does not have for a few rows at a time."""
        x, found = head(192, 16, 101, torch.float32), []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            products = [rows @ x["weight"].T for rows in x["hidden"].split(32)]
            found.append((products, self.gradients(x, 32)))
        for products, gradients in found[1:]:
            if same_bits(found[0][0], products):
                assert same_bits(found[0][1], gradients)
        assert same_bits(*(gradients for _, gradients in found[1:]))


# --- 12 ---------------------------------------------------------------------------------------------------------------


class Test12HeadsAsModelsHaveThem:
    def check(self, x, expected_logits, leaves, tolerance=1e-11, **options):
        """linear_log_prob(**x, **options) and linear_ppo_loss against autograd through `expected_logits`, in float64."""
        stored = rollout()
        temperature = options.get("temperature", 1.0)
        log_prob, entropy = log_softmax(expected_logits, x["targets"], temperature)
        near(pf.linear_log_prob(**x, **options)[0], log_prob.detach(), tolerance)
        near(pf.linear_log_prob(**x, **options)[1], entropy.detach(), tolerance)
        config = pf.LossConfig(clip_low=0.99, clip_high=1e9, entropy_coef=0.3)  # no clip that rounding could move
        expected = (surrogate(log_prob, **stored, low=0.99, high=1e9) - 0.3 * entropy).mean()
        truth = torch.autograd.grad(expected, leaves, retain_graph=True)
        out = pf.linear_ppo_loss(**x, **stored, config=config, **options)
        near(out.loss, expected.detach(), tolerance)
        for a, b in zip(torch.autograd.grad(out.loss, leaves, retain_graph=True), truth, strict=True):
            near(a, b.double(), tolerance)

    def test_tied_to_the_embedding(self):
        x = head()
        x["hidden"] = torch.tanh(x["weight"][x["targets"].flip(0)])  # gradients of both uses add up
        self.check(x, x["hidden"] @ x["weight"].T, [x["weight"]])

    def test_lora(self):
        x = head()
        a, b = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((2, 8), (101, 2)))
        x["weight"] = x["weight"].detach() + 0.5 * b @ a
        self.check(x, x["hidden"] @ x["weight"].T, [x["hidden"], a, b])

    def test_bias_softcap_and_logit_scale(self):
        x, bias = head(), torch.randn(101, dtype=F64, requires_grad=True)
        z = x["hidden"] @ x["weight"].T + bias
        self.check({**x, "bias": bias}, z, [x["hidden"], x["weight"], bias])
        capped = 2.5 * torch.tanh(z / 2.5)
        self.check({**x, "bias": bias}, capped, [x["hidden"], x["weight"], bias], softcap=2.5, temperature=1 / 0.6)

    def test_a_frozen_weight_and_frozen_hidden_states(self):
        for name, other in (("weight", "hidden"), ("hidden", "weight")):
            x = head()
            x[name] = x[name].detach()
            self.check(x, x["hidden"] @ x["weight"].T, [x[other]])

    def test_a_float32_head_over_bfloat16(self):
        x = head(dtype=torch.bfloat16)
        x["weight"] = x["weight"].detach().float().requires_grad_()
        logits = x["hidden"].double() @ x["weight"].double().T
        near(pf.linear_log_prob(**x)[0], log_softmax(logits, x["targets"])[0].detach())
        (grad,) = torch.autograd.grad(pf.linear_log_prob(**x)[0].sum(), x["weight"])
        assert grad.dtype is torch.float32

    def test_autocast(self):
        x = head(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            log_prob, _ = pf.linear_log_prob(**x)
        logits = (x["hidden"].bfloat16().float() @ x["weight"].bfloat16().float().T).bfloat16()
        near(log_prob, log_softmax(logits.detach(), x["targets"])[0])
        grads = torch.autograd.grad(log_prob.sum(), (x["hidden"], x["weight"]))
        assert all(g.dtype is torch.float32 for g in grads)

    def test_a_shard_without_rows_is_named(self):
        x = head()
        with pytest.raises(ValueError, match=r"weight must have at least one row, got \[0, 8\]"):
            pf.linear_log_prob(x["hidden"], x["weight"][:0], x["targets"])


# --- 13 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
def test_13_log_probs_are_float32_and_gradients_as_their_input(backend, dtype):
    wide = F64 if dtype is F64 else torch.float32
    x = head(dtype=dtype)
    logits = (x["hidden"].double() @ x["weight"].double().T).detach().to(dtype).requires_grad_()
    with pf.use_backend(backend):
        log_prob, entropy = pf.categorical_log_prob(logits, x["targets"])
        of_head = pf.linear_log_prob(**x)
        out = pf.ppo_loss(log_prob, log_prob.detach().to(dtype), torch.ones(24, dtype=dtype))
        grads = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)
        grads += torch.autograd.grad(of_head[0].sum(), (x["hidden"], x["weight"]))
        advantages = pf.gae(torch.ones(3, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype))[0]
    assert {y.dtype for y in (log_prob, entropy, *of_head, out.loss, out.stats.vector, advantages)} == {wide}
    assert {g.dtype for g in grads} == {dtype}
    near(log_prob, log_softmax(logits.detach(), x["targets"])[0], 1e-12 if dtype is F64 else 2e-6)  # not rounded to it


# --- 14 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_14_micro_batches_with_the_global_count_are_the_batch(reduction):
    x = head()
    stored = {k: v.view(6, 4) for k, v in rollout().items()}
    hidden, targets, weight = x["hidden"].detach().view(6, 4, 8), x["targets"].view(6, 4), x["weight"]
    mask = torch.rand(6, 4) < 0.7
    mask[4:], mask[0] = False, True  # the last micro-batch has nothing that counts
    config = pf.LossConfig(reduction=reduction, entropy_coef=0.1)
    each = (
        surrogate(log_softmax(hidden @ weight.T, targets)[0], **stored)
        - 0.1 * log_softmax(hidden @ weight.T, targets)[1]
    )
    each = torch.where(mask, each, 0.0)
    rows = mask.sum(1).clamp(min=1)
    sequences = (mask.sum(1) > 0).sum()
    expected = {
        "token-mean": each.sum() / mask.sum(), "seq-mean-token-mean": (each.sum(1) / rows).sum() / sequences,
        "seq-mean-token-sum": each.sum() / sequences,
    }[reduction]  # fmt: skip
    count = mask.sum() if reduction == "token-mean" else sequences
    truth = torch.autograd.grad(expected, weight)[0]
    for denominator in (count.item(), count, count.double()):
        loss, grad = 0.0, torch.zeros_like(weight)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
            part = {k: v[rows] for k, v in stored.items()}
            out = pf.linear_ppo_loss(
                hidden[rows], weight, targets[rows], **part, mask=mask[rows], config=config, denominator=denominator
            )
            loss, grad = loss + out.loss.detach(), grad + torch.autograd.grad(out.loss, weight)[0]
        near(loss, expected.detach(), 1e-12)
        near(grad, truth, 1e-11)


# --- 15 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
def test_15_deviations_of_one_of_none_and_far_from_zero(backend):
    with pf.use_backend(backend):
        for mask in (torch.zeros(5), torch.tensor([0.0, 0, 1, 0, 0])):
            y = pf.whiten(torch.arange(5.0) + 3, mask=mask)
            assert torch.equal(y, (torch.arange(5.0) + 3) * mask)  # no deviation to divide by: as it is, never NaN
        x = 1e4 + torch.randn(3000)  # E[x²] - E[x]² has no digit left in float32
        wide = x.double()
        for ddof in (0, 1):
            expected = (wide - wide.mean()) / (wide.var(correction=ddof).sqrt() + 1e-8)
            y = pf.whiten(x, ddof=ddof).double()
            near(y - y.mean(), expected, 1e-5)
            assert y.mean().abs() < 1e-3  # the mean has float32's digits
        config = pf.LossConfig(normalize_advantages=True)
        out = pf.ppo_loss(torch.zeros(1), torch.zeros(1), torch.tensor([5.0]), config)
    assert out.loss.item() == -5.0


def test_15_deviations_over_a_process_group(tmp_path):
    dist = torch.distributed
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        x, mask = 1e4 + torch.randn(300), torch.arange(300) % 3 > 0
        wide = x.double()[mask]
        expected = (wide - wide.mean()) / (wide.std() + 1e-8)
        y = pf.whiten(x, mask=mask, group=dist.group.WORLD)[mask].double()
        near(y - y.mean(), expected, 1e-5)
        assert y.mean().abs() < 1e-3
    finally:
        dist.destroy_process_group()


# --- 16 ---------------------------------------------------------------------------------------------------------------


class Test16AdvantagesOfTokens:
    gamma, lam = 0.9, 0.8

    def by_definition(self, rewards, values, mask, lam, carry):
        """Over the steps that count, or over all with what is masked as 0; in float64, one row."""
        steps = [t for t in range(len(rewards)) if mask[t] or not carry]
        advantages, running, following = torch.zeros(len(rewards), dtype=F64), 0.0, 0.0
        for t in reversed(steps):
            reward, value = (float(rewards[t]), float(values[t])) if mask[t] else (0.0, 0.0)
            running = reward + self.gamma * following - value + self.gamma * lam * running
            following = value
            advantages[t] = running if mask[t] else 0.0
        return advantages

    @pytest.mark.parametrize("backend", KERNELS)
    @pytest.mark.parametrize("mode", ["carry", "zero"])
    def test_masks_with_holes_and_a_lambda_a_sample(self, backend, mode):
        rewards, values = torch.randn(4, 9), torch.randn(4, 9)
        mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 0, 1, 1, 0, 0], [0] * 9, [1, 0, 1, 0, 1, 0, 1, 0, 1]]).bool()
        lam = torch.tensor([0.8, 0.5, 1.0, 0.0])
        dirty = torch.where(mask, rewards, math.nan), torch.where(mask, values, math.inf)
        with pf.use_backend(backend):
            advantages, returns = pf.gae(*dirty, mask=mask, mask_mode=mode, gamma=self.gamma, lam=lam, time_dim=1)
        rows = zip(rewards, values, mask, lam.double(), strict=True)
        expected = torch.stack([self.by_definition(*row, mode == "carry") for row in rows])
        near(advantages, expected)
        near(returns, torch.where(mask, expected + values, 0.0))  # 0 at what is masked

    @pytest.mark.parametrize("backend", KERNELS)
    def test_packed_rows_of_any_length(self, backend):
        lengths = [3, 0, 1, 7]
        borders = torch.tensor([0, 3, 3, 4, 11], dtype=torch.int32)
        rewards, values, lam = torch.randn(11), torch.randn(11), torch.tensor([0.8, 0.1, 0.2, 1.0])
        with pf.use_backend(backend):
            advantages, _ = pf.gae(rewards, values, cu_seqlens=borders, gamma=self.gamma, lam=lam)
        pieces = zip(rewards.split(lengths), values.split(lengths), lam.double(), strict=True)
        expected = [self.by_definition(r, v, torch.ones(len(r)), of, True) for r, v, of in pieces]
        near(advantages, torch.cat(expected))

    def test_no_step_and_one(self):
        for shape in ((0, 3), (3, 0), (0, 0)):
            assert all(y.shape == shape for y in pf.gae(torch.zeros(shape), torch.zeros(shape)))
        advantages, returns = pf.gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([4.0]), gamma=0.9)
        near(advantages, torch.tensor([[2.0 + 0.9 * 4.0 - 0.5]], dtype=F64))
        near(returns, torch.tensor([[2.0 + 0.9 * 4.0]], dtype=F64))


# --- 17 ---------------------------------------------------------------------------------------------------------------


class Test17WhereThereIsNothingToRunOn:
    def every_op(self, m, device="cpu", dtype=torch.float32):
        """Results of a call of each op that language models use."""

        def make(*shape):
            numbers = torch.arange(math.prod(shape), dtype=F64, device=device)
            return (numbers % 5 - 2).to(dtype).view(shape)  # exact in every dtype

        actions = torch.arange(m, device=device) % 7
        hidden, weight = make(m, 4).requires_grad_(), make(7, 4).requires_grad_()
        logits, x = make(m, 7).requires_grad_(), make(m).requires_grad_()
        out = [*pf.categorical_log_prob(logits, actions), *pf.linear_log_prob(hidden, weight, actions)]
        losses = [
            pf.ppo_loss(x, make(m), make(m)), pf.categorical_ppo_loss(logits, actions, make(m), make(m)),
            pf.linear_ppo_loss(hidden, weight, actions, make(m), make(m)),
        ]  # fmt: skip
        out += [*pf.gae(make(m, 2), make(m, 2)), pf.whiten(make(m)), *(y for loss in losses for y in loss[:1])]
        grads = torch.autograd.grad(sum(y.sum() for y in out if y.requires_grad), (hidden, weight, logits, x))
        return [*out, *grads]

    def test_empty(self):
        for y in self.every_op(0):
            assert y.numel() == 0 or not y.any()

    def test_no_memory_behind_a_tensor(self):
        shapes = [(y.shape, y.dtype) for y in self.every_op(6)]
        assert [(y.shape, y.dtype) for y in self.every_op(6, "meta")] == shapes
        with FakeTensorMode():
            assert [(y.shape, y.dtype) for y in self.every_op(6)] == shapes

    def test_float16(self):
        for a, b in zip(self.every_op(6, dtype=torch.float16), self.every_op(6, dtype=F64), strict=True):
            near(a, b.double(), 2**-7)  # gradients that cancel, from d_logits in float16

    def test_the_formulas_alone_where_no_kernel_is(self):
        """As after a build without a compiler: nothing but Python files."""
        code = (
            "import sys; sys.modules['ppo_fast._C'] = sys.modules['ppo_fast._C_cuda'] = sys.modules['triton'] = None\n"
            "import torch, ppo_fast as pf\n"
            "a, _ = pf.gae(torch.ones(2, 1), torch.zeros(2, 1), gamma=0.5, lam=1.0)\n"
            "assert a.flatten().tolist() == [1.5, 1.0], a\n"
            "print(pf.explain())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "a CPU tensor takes:  reference" in done.stdout

    def test_explain_says_why_a_backend_is_not_there(self):
        said = str(pf.explain())
        for name in ("cpu", "cuda", "triton", "reference"):
            assert f"  {name}" in said
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="cuda"), pf.use_backend("cuda"):
                pf.whiten(torch.ones(3))


# --- 18 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_18_subgradients_at_ties_are_those_of_max_and_clamp(backend, dtype):
    def ratio(d):
        """exp(d) as this backend has it."""
        return pf.ppo_loss(torch.tensor([d], dtype=dtype), torch.zeros(1, dtype=dtype), torch.ones(1)).stats.ratio_max

    def slope(d, advantage, **numbers):
        x = torch.tensor([d], dtype=dtype, requires_grad=True)
        out = pf.ppo_loss(x, torch.zeros(1, dtype=dtype), torch.tensor([advantage]), pf.LossConfig(**numbers))
        return torch.autograd.grad(out.loss, x)[0].item()

    with pf.use_backend(backend) if backend != "cpu" else contextlib.nullcontext():
        r = ratio(0.25).item()
        assert abs(r - math.exp(0.25)) < 1e-6
        edge = {"clip_high": r - 1.0}
        assert slope(0.1, 2.0) == -2.0 * ratio(0.1).item()  # inside: both branches tie, ½ + ½
        assert slope(0.25, 2.0, **edge) == -2.0 * r  # on the edge: all of it
        assert slope(0.0, 2.0, clip_low=0.0, clip_high=0.0) == -2.0  # r = 1, ε = 0
        assert slope(0.25 + 1e-3, 2.0, **edge) == 0.0  # just outside, on the bad side
        assert slope(0.25 + 1e-3, -2.0, **edge) == 2.0 * ratio(0.25 + 1e-3).item()  # and on the good one
        assert slope(0.25, -2.0, dual_clip=r, clip_high=9.0) == r  # exact dual-clip tie: half of 2·r
        assert slope(0.25 + 1e-3, -2.0, dual_clip=r, clip_high=9.0) == 0.0
