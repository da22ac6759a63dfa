"""The Triton kernels of the log-probabilities, run by Triton's interpreter, against the specification."""

from __future__ import annotations

import contextlib
import math
import os
from functools import partial
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import mpmath
import pytest
import test_bernoulli_log_prob
import test_beta_log_prob
import test_categorical_log_prob
import test_multi_categorical_log_prob
import test_normal_log_prob
import torch
from conftest import assert_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from log_prob_laws import assert_parity, assert_rows_stand_alone, gradients, strided
from test_triton_scans import strict_interpreter  # noqa: F401 (for all tests here)

import ppo_fast as pf
from ppo_fast import _workspace, reference

pytest.importorskip("triton")
from ppo_fast.kernels import _reports, _rows
from ppo_fast.kernels import bernoulli_log_prob as _bernoulli
from ppo_fast.kernels import beta_log_prob as _beta
from ppo_fast.kernels import categorical_log_prob as _categorical
from ppo_fast.kernels import multi_categorical_log_prob as _multi
from ppo_fast.kernels import normal_log_prob as _normal
from triton.runtime.interpreter import InterpretedFunction

pytestmark = pytest.mark.skipif(
    not isinstance(_categorical.categorical_forward, InterpretedFunction),
    reason="kernels were imported without TRITON_INTERPRET",
)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def longest_tile(columns):
    """Rows of more columns are long ones."""
    with mock.patch.object(_categorical, "LONGEST_TILE", columns), mock.patch.object(_multi, "LONGEST_TILE", columns):
        yield


# --- the raw calls, as functions that autograd knows ------------------------------------------------------------------


class _Raw(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.set_materialize_grads(False)
        log_prob, entropy, ctx.back = run(*inputs)
        return log_prob, entropy

    @staticmethod
    def backward(ctx, g, h):
        return None, *ctx.back(g, h)


def nan(shape, dtype):
    return torch.full(shape, torch.nan, dtype=dtype)


def nan_like(x):
    """Empty, with the strides that torch.empty_like gives."""
    return torch.empty_like(x).fill_(torch.nan)


def results(lead, entropy, *inputs):
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return nan(lead, dtype), nan(lead, dtype) if entropy else None


def categorical(
    logits, actions, *, action_mask=None, temperature=1.0, ignore_index=None, entropy=True, inplace=False
):  # fmt: skip
    rows = None
    if isinstance(temperature, torch.Tensor):
        rows, temperature = temperature if temperature.ndim else temperature.expand(actions.shape), 1.0

    def run(z):
        log_prob, h = results(z.shape[:-1], entropy, z)
        saved = nan((2, log_prob.numel()), log_prob.dtype)
        _categorical.categorical_log_prob(
            z, actions, action_mask, rows, temperature, ignore_index, log_prob, h, saved, None
        )

        def back(g, dh):
            d = z.detach() if inplace else nan_like(z)
            _categorical.categorical_log_prob_backward(
                z, actions, action_mask, rows, temperature, h, saved, g, dh, d, None
            )
            return (d,)

        return log_prob, h, back

    return _Raw.apply(run, logits)


def multi_categorical(logits, actions, nvec, *, action_mask=None, entropy=True):
    def run(z):
        log_prob, h = results(z.shape[:-1], entropy, z)
        saved = nan((3, len(nvec), log_prob.numel()), log_prob.dtype)
        _multi.multi_categorical_log_prob(z, actions, action_mask, nvec, log_prob, h, saved, None)

        def back(g, dh):
            d = nan_like(z)
            _multi.multi_categorical_log_prob_backward(z, actions, action_mask, nvec, saved, g, dh, d, None)
            return (d,)

        return log_prob, h, back

    return _Raw.apply(run, logits)


def normal(mean, log_std, actions, *, squash=False, entropy=True):
    def run(mean, log_std):
        log_prob, h = results(mean.shape[:-1], entropy, mean, log_std, actions)
        _normal.normal_log_prob(mean, log_std, actions, squash, log_prob, h, None)

        def back(g, dh):
            d_mean, d_log_std = nan_like(mean), nan_like(log_std)
            own = log_std.shape in (mean.shape, mean.shape[-1:])
            found = d_log_std if own else nan(mean.shape, log_prob.dtype)
            _normal.normal_log_prob_backward(mean, log_std, actions, squash, g, dh, d_mean, found, None)
            return d_mean, found if own else found.sum_to_size(log_std.shape).to(log_std.dtype)

        return log_prob, h, back

    return _Raw.apply(run, mean, log_std)


def bernoulli(logits, actions, *, entropy=True):
    def run(z):
        log_prob, h = results(z.shape[:-1], entropy, z)
        _bernoulli.bernoulli_log_prob(z, actions, log_prob, h, None)

        def back(g, dh):
            d = nan_like(z)
            _bernoulli.bernoulli_log_prob_backward(z, actions, g, dh, d, None)
            return (d,)

        return log_prob, h, back

    return _Raw.apply(run, logits)


def beta(alpha, beta, actions, *, low=0.0, high=1.0, entropy=True):
    def run(alpha, beta):
        log_prob, h = results(alpha.shape[:-1], entropy, alpha, beta, actions)
        _beta.beta_log_prob(alpha, beta, actions, low, high, log_prob, h, None)

        def back(g, dh):
            found = nan_like(alpha), nan_like(beta)
            _beta.beta_log_prob_backward(alpha, beta, actions, low, high, g, dh, *found, None)
            return found

        return log_prob, h, back

    return _Raw.apply(run, alpha, beta)


# --- categorical ------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(test_categorical_log_prob.cases(), st.booleans())
def test_categorical(case, long):
    logits, actions, options = case
    longest = 4096 if not long else 64 if logits.shape[-1] < 300 else 512
    wide = dict(options)
    if isinstance(options["temperature"], torch.Tensor):
        wide["temperature"] = options["temperature"].double()
    with longest_tile(longest):
        assert_parity(
            lambda z: categorical(z, actions, **options),
            lambda z: reference.categorical_log_prob(z, actions, **options),
            [logits],
            double=lambda z: reference.categorical_log_prob(z, actions, **wide),
            ulps=32.0 if logits.dtype == torch.float64 else 8.0,  # float64's truth rounds too
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary(dtype):
    """Logits of a language model without the last step: read where they lie."""
    logits = (torch.randn(2, 3, 20_000) * 4).to(dtype)
    logits[..., 100] = torch.tensor([8.0, 9.0])[:, None] + torch.arange(3)
    logits[0, 0, 12_000], logits[0, 1, 19_999], logits[0, 1, 5] = 60.0, 70.0, -math.inf
    actions = torch.tensor([[12_000, 0], [7, 19_999]])
    cut = logits[:, :-1]
    assert _rows.Rows(cut).parts[0][0] is cut
    options = {"temperature": torch.rand(2, 2) + 0.5, "action_mask": torch.rand(2, 2, 20_000) > 0.2, "ignore_index": 7}
    options["action_mask"].scatter_(-1, actions[..., None], True)
    for kw in ({}, options):
        wide = {k: v.double() if k == "temperature" else v for k, v in kw.items()}
        assert_parity(
            lambda z: categorical(z, actions, **kw),  # noqa: B023
            lambda z: reference.categorical_log_prob(z, actions, **kw),  # noqa: B023
            [cut],
            double=lambda z: reference.categorical_log_prob(z, actions, **wide),  # noqa: B023
            ulps=32.0,
        )


@pytest.mark.parametrize(("width", "longest"), [(5, 4096), (66, 4096), (200, 64), (4500, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_special_rows(width, longest, dtype):
    z = torch.randn(9, width).to(dtype)
    z[1, 1:] = -math.inf  # certain
    z[2, 2] = -math.inf
    z[3] = -math.inf  # impossible
    z[4, 1] = math.nan
    z[5] = math.nan
    z[6, 3] = math.inf
    z[7] = torch.linspace(-3e4, 3e4, width)
    z[8] = torch.linspace(-3e4, 3e4, width).flip(0)
    actions = torch.tensor([0, 0, 2, 0, 0, 0, 0, width - 1, width - 1])
    with longest_tile(longest):
        got = gradients(lambda z: categorical(z, actions), [z])
    want = gradients(lambda z: reference.categorical_log_prob(z, actions), [z])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert not any(bool(x[3].any()) for x in got) and not any(bool(x[1].any()) for x in got)
    assert all(bool(x[4:7].isnan().all()) for x in got)


@pytest.mark.parametrize(("width", "longest"), [(5, 4096), (66, 4096), (200, 64)])
def test_what_is_masked_reaches_nothing(width, longest):
    z, actions = torch.randn(8, width), torch.randint(0, width, (8,))
    mask = (torch.rand(8, width) > 0.5).scatter_(-1, actions[:, None], True)
    mask[3] = False
    actions[5] = -7
    dirty = torch.where(mask, z, math.nan)
    dirty[5] = math.nan

    def op(z):
        return categorical(z, actions, action_mask=mask, ignore_index=-7)

    with longest_tile(longest):
        clean = gradients(op, [z])
        for a, b in zip(clean, gradients(op, [dirty]), strict=True):
            assert torch.equal(a, b)
        assert not clean[2][~mask].any() and not clean[2][5].any() and not clean[2][3].any()
        assert clean[0][3] == clean[0][5] == clean[1][3] == clean[1][5] == 0
        mask[0, 0], mask[0, actions[0]] = True, False
        log_prob, entropy, grad = gradients(op, [z])
        assert log_prob[0] == -math.inf and entropy[0].isfinite() and grad[0, actions[0]] == 0
        z[0, 0] = math.nan  # of a row that is NaN, what is masked still gets no gradient
        grad = gradients(op, [z])[2]
        assert grad[0][mask[0]].isnan().all() and not grad[0][~mask[0]].any()


@pytest.mark.parametrize(("width", "longest"), [(6, 4096), (200, 64)])
def test_labels_out_of_range(width, longest, late):
    """Their rows give 0 and read nothing; the others are as ever."""
    z, good = torch.randn(9, width), torch.randint(0, width, (9,))
    bad = good.clone()
    bad[[1, 3, 5, 7]] = torch.tensor([-1, width, 2**40, -(2**62)])
    with longest_tile(longest):
        got = gradients(lambda z: categorical(z, bad), [z])
        want = gradients(lambda z: categorical(z, good), [z])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[::2], b[::2]) and not bool(a[1::2].any())
    with pytest.raises(ValueError, match=r"got -1 at 1$"):
        _workspace.raise_reported()


#: Of labels out of range: (longest tile, number of rows, width, how many elements of actions there are before row i's
#: first one, op of logits and actions). The rows are more than one program's.
LABELLED = {
    "categorical": (4096, 300, 6, 1, pf.categorical_log_prob),
    "categorical, strided": (4096, 300, 6, 1, lambda z, a: pf.categorical_log_prob(z, torch.stack([a, a], 1)[:, 1])),
    "categorical, int8": (4096, 300, 6, 1, lambda z, a: pf.categorical_log_prob(z, a.char())),
    "categorical, long": (64, 9, 100, 1, pf.categorical_log_prob),
    "multi": (4096, 300, 6, 3, lambda z, a: pf.multi_categorical_log_prob(z, heads(a), HEADS)),
    "multi, long": (2, 9, 6, 3, lambda z, a: pf.multi_categorical_log_prob(z, heads(a), HEADS)),
}
HEADS = (1, 3, 2)


def heads(actions):
    """[n, 3]: the actions in [0, 3) are the second head's."""
    good = torch.zeros_like(actions)
    return torch.stack([good, torch.where((actions > 2) & (actions < 6), 2, actions), good + 1], 1)


@pytest.mark.parametrize("bad", [-1, 120, -(2**62), 2**40 + 7])
@pytest.mark.parametrize("case", LABELLED)
def test_a_label_out_of_range_is_said(case, bad):
    """Its value and its place, at the end of the very call that runs in the interpreter; the next call is as ever."""
    longest, n, width, step, op = LABELLED[case]
    if "int8" in case and abs(bad) > 127:
        pytest.skip("no int8")
    z, good = torch.randn(n, width), torch.randint(0, width, (n,))
    name = "multi_categorical_log_prob" if "multi" in case else "categorical_log_prob"
    with longest_tile(longest), pf.use_backend("triton"):
        want = op(z, good)
        for row in (0, n // 2, n - 1):
            wrong = good.clone()
            wrong[row] = bad
            at = step * row + (step == 3)  # the second head of three
            with pytest.raises(ValueError, match=rf"^{name}: actions must be in range, got {bad} at {at}$"):
                op(z, wrong)
            assert all(map(torch.equal, op(z, good), want))


@pytest.mark.parametrize("case", [c for c in LABELLED if "int8" not in c])
def test_of_many_labels_one_is_said(case):
    """With its own place: the first of the first program that has any."""
    longest, n, width, step, op = LABELLED[case]
    z, actions = torch.randn(n, width), torch.randint(0, width, (n,))
    first = n // 3
    actions[first:] = torch.arange(first, n) * 1000
    actions[first + 2 :: 2] *= -1
    with longest_tile(longest), pf.use_backend("triton"):
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"got {1000 * first} at {step * first + (step == 3)}$"):
                op(z, actions)
        assert op(z, actions.clamp(0, width - 1))[0].isfinite().all()


def test_of_a_rows_labels_the_first_is_said():
    actions = torch.zeros(5, 3, dtype=torch.long)
    actions[2, 1:] = torch.tensor([7, 8])
    with pf.use_backend("triton"), pytest.raises(ValueError, match=r"got 7 at 7$"):
        pf.multi_categorical_log_prob(torch.randn(5, 6), actions, HEADS)


@pytest.mark.parametrize(("width", "longest"), [(6, 4096), (100, 64)])
@pytest.mark.parametrize("ignored", [-100, 3, 2**40])
def test_what_is_ignored_is_not_reported(width, longest, ignored):
    """Whatever else is out of range is, at its own place."""
    z, actions = torch.randn(9, width), torch.randint(0, width, (9,))
    actions[2:7] = ignored
    op = partial(pf.categorical_log_prob, ignore_index=ignored)
    with longest_tile(longest), pf.use_backend("triton"):
        log_prob, entropy = op(z, actions)
        assert not log_prob[2:7].any() and not entropy[2:7].any()
        actions[5] = -99
        with pytest.raises(ValueError, match=r"got -99 at 5$"):
            op(z, actions)


def test_a_label_is_said_late_where_kernels_run_late(late, monkeypatch):
    """By the next call of any op, once. The message is a GPU's where the memory is."""
    z, x = torch.randn(3, 5), torch.arange(5.0)
    with pf.use_backend("triton"):
        assert not pf.categorical_log_prob(z, torch.tensor([0, 1, 8]))[0][2]
        slots, places = _reports._memory["cpu"]
        monkeypatch.setattr(_reports, "_memory", {"cuda": (slots, places)})
        with pytest.raises(
            ValueError, match=r"^categorical_log_prob: .* 8 at 2 in an earlier call: a GPU says so late$"
        ):
            pf.whiten(x)
        torch.testing.assert_close(pf.whiten(x), (x - 2) / x.std())


def test_reports_of_other_devices(monkeypatch):
    """A GPU's are pinned, made once, each op's at a multiple of 16 bytes; where nothing can be pinned nothing is said."""
    made = []
    full = torch.full

    def unpinned(*args, pin_memory, **kwargs):
        made.append(pin_memory)
        return full(*args, **kwargs)

    monkeypatch.setattr(torch, "full", unpinned)
    for name in ("_memory", "_of_op"):
        monkeypatch.setattr(_reports, name, {})
    gpu, one = [[_reports.of(op, torch.device(d)) for op in _reports._LABELS] for d in ("cuda:0", "cuda:1")]
    assert made == [True] and all(a is b for a, b in zip(gpu, one, strict=True))
    assert len({x.data_ptr() for x in gpu}) == len(gpu) and not any(x.data_ptr() % 16 for x in gpu)
    cpu = _reports.of("normal_ppo_loss", torch.device("cpu"))
    assert made == [True, False] and cpu.data_ptr() != gpu[-1].data_ptr()
    assert _reports.of("categorical_log_prob", torch.device("xpu")) is None
    monkeypatch.setattr(_reports, "of", lambda op, device: None)
    with pf.use_backend("triton"):
        for op, actions in ((pf.categorical_log_prob, [9, 0]),
                            (partial(pf.multi_categorical_log_prob, nvec=(2, 3)), [[9, 9], [1, 1]])):  # fmt: skip
            log_prob = op(torch.randn(2, 5), torch.tensor(actions))[0]
            assert log_prob[0] == 0 and log_prob[1] < 0


@pytest.mark.parametrize(("width", "longest"), [(6, 4096), (300, 4096), (200, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["plain", "sliced", "transposed", "gaps"])
def test_inplace_backward(width, longest, dtype, layout):
    base, actions = strided((2, 5, width), layout, dtype), torch.randint(0, width, (2, 5))

    def run(inplace):
        logits = base.clone()
        if layout == "sliced":
            logits = torch.cat([logits, logits], -1)[:, 1:, :width]
        elif layout == "gaps":
            logits = torch.cat([logits, logits], 1)[:, ::2][:, :4]
        labels = actions[:, : logits.shape[1]]
        with longest_tile(longest):
            log_prob, entropy = categorical(logits.requires_grad_(), labels, inplace=inplace)
            (grad,) = torch.autograd.grad(log_prob.sum() + 0.3 * entropy.sum(), logits)
        assert (grad.data_ptr() == logits.data_ptr()) is inplace
        return grad

    assert torch.equal(run(True), run(False))


@pytest.mark.parametrize("longest", [64, 4096])
@pytest.mark.parametrize("pieces", [2, 3])
def test_rows_that_take_several_strides(pieces, longest):
    """Logits, mask, actions and temperatures that each lie in memory in a way of their own."""
    if pieces == 2:
        logits, mask = torch.randn(2, 3, 4, 70)[:, :, :-1], (torch.rand(2, 4, 3, 70) > 0.3)[:, 1:]
    else:
        logits, mask = torch.randn(2, 6, 8, 70)[:, :4:2, :3], (torch.rand(2, 4, 3, 70) > 0.3)[:, ::2]
    lead = logits.shape[:-1]
    actions, temperature = torch.randint(70, (2, 7, 3))[:, : lead[1]], (torch.rand(2, 7, 3) + 0.5)[:, 1 : lead[1] + 1]
    mask = mask.clone(memory_format=torch.preserve_format) if pieces == 3 else mask
    mask.scatter_(-1, actions[..., None], True)
    options = {"action_mask": mask, "temperature": temperature}
    with longest_tile(longest):
        assert_parity(
            lambda z: categorical(z, actions, **options),
            lambda z: reference.categorical_log_prob(z, actions, **options),
            [logits],
            double=lambda z: reference.categorical_log_prob(
                z, actions, **options | {"temperature": temperature.double()}
            ),
        )
        parts = [categorical(logits[i, j], actions[i, j], action_mask=mask[i, j], temperature=temperature[i, j])
                 for i in range(lead[0]) for j in range(lead[1])]  # fmt: skip
        whole = categorical(logits, actions, **options)
        for k in (0, 1):
            assert torch.equal(torch.cat([p[k] for p in parts]), whole[k].flatten())
        z = logits.clone() if pieces == 2 else logits
        grads = gradients(lambda z: categorical(z, actions, **options), [z])
        inplace = gradients(lambda z: categorical(z, actions, **options, inplace=True), [z])
        assert all(torch.equal(a, b) for a, b in zip(grads, inplace, strict=True))
        heads = torch.stack([actions % 30, actions % 40], -1)
        assert_parity(
            lambda z: multi_categorical(z, heads, [30, 40], action_mask=mask),
            lambda z: reference.multi_categorical_log_prob(z, heads, [30, 40], action_mask=mask),
            [logits],
        )


@pytest.mark.parametrize(("width", "longest"), [(3, 4096), (200, 64)])
def test_one_gradient_only(width, longest):
    z, actions = torch.randn(9, width, requires_grad=True), torch.randint(0, width, (9,))
    with longest_tile(longest):
        for k in (0, 1):
            (got,) = torch.autograd.grad(categorical(z, actions)[k].sum(), z)
            (want,) = torch.autograd.grad(reference.categorical_log_prob(z.double(), actions)[k].sum(), z)
            torch.testing.assert_close(got, want.float())
        log_prob, entropy = categorical(z, actions, entropy=False)
        assert entropy is None and torch.equal(log_prob, categorical(z, actions)[0])
        dead = torch.ones(9)
        dead[4] = 0.0  # a row without an incoming gradient reaches nothing
        spoilt = z.detach().clone()
        spoilt[4] = math.nan
        got = torch.autograd.grad(categorical(spoilt.requires_grad_(), actions)[0], spoilt, dead)[0]
        assert not got[4].any() and got.isfinite().all()


@pytest.mark.parametrize(("width", "longest"), [(2, 4096), (65, 4096), (200, 64)])
def test_rows_stand_alone(width, longest):
    logits, actions = torch.randn(21, width), torch.randint(0, width, (21,))
    with longest_tile(longest):
        assert_rows_stand_alone(lambda z, a: categorical(z, a, temperature=0.7), [logits, actions], (True, True))


def test_rows_far_apart_in_memory():
    """Offsets beyond 2**31 elements, over memory that is not there."""
    z = torch.randn(1, 300).expand(90_000_000, 300)[::89_999_999]
    log_prob, entropy = categorical(z, torch.tensor([5, 7]))
    torch.testing.assert_close(log_prob, z[0].log_softmax(-1)[[5, 7]])
    assert entropy[0] == entropy[1]


# --- several categoricals ---------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(test_multi_categorical_log_prob.cases(), st.sampled_from([64, 4096]))
def test_multi_categorical(case, longest):
    logits, actions, nvec, mask = case
    with longest_tile(longest):  # 64: heads of 65 and 200 go one by one
        assert_parity(
            lambda z: multi_categorical(z, actions, nvec, action_mask=mask),
            lambda z: reference.multi_categorical_log_prob(z, actions, nvec, action_mask=mask),
            [logits],
            ulps=32.0 if logits.dtype == torch.float64 else 8.0,
        )


@pytest.mark.parametrize("longest", [64, 4096])
def test_special_heads(longest, late):
    nvec = [2, 3, 70]
    z, actions = torch.randn(6, 75), torch.zeros(6, 3, dtype=torch.long)
    z[0, :2] = -math.inf  # a head without any possible action
    z[1, 2] = math.nan
    z[2, 1:4] = -math.inf
    bad = actions.clone()
    bad[3, 1], bad[4, 0] = 3, -1
    with longest_tile(longest):
        got = gradients(lambda z: multi_categorical(z, actions, nvec), [z])
        want = gradients(lambda z: reference.multi_categorical_log_prob(z, actions, nvec), [z])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
        log_prob, entropy, grad = gradients(lambda z: multi_categorical(z, bad, nvec), [z])
        with pytest.raises(
            ValueError, match="got -1 at 12" if longest == 64 else "got 3 at 10"
        ):  # head by head, row by row
            _workspace.raise_reported()
        assert not grad[3, 2:5].any() and grad[3, :2].all() and not grad[4, :2].any()
        others = [reference.categorical_log_prob(z[3:4, a:b], actions[3:4, 0]) for a, b in ((0, 2), (5, 75))]
        torch.testing.assert_close(log_prob[3:4], others[0][0] + others[1][0])
        torch.testing.assert_close(entropy[3:4], others[0][1] + others[1][1])
        stand_alone = partial(multi_categorical, nvec=nvec)
        assert_rows_stand_alone(
            lambda z, a: stand_alone(z, a), [torch.randn(21, 75), actions[:1].expand(21, 3)], (1, 1)
        )


# --- normal -----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(test_normal_log_prob.cases())
def test_normal(case):
    mean, log_std, actions, squash = case
    double = torch.float64 in (mean.dtype, log_std.dtype, actions.dtype)
    assert_parity(
        lambda m, s: normal(m, s, actions, squash=squash),
        lambda m, s: reference.normal_log_prob(m, s, actions, squash=squash),
        [mean, log_std],
        double=lambda m, s: reference.normal_log_prob(m, s, actions.double(), squash=squash),
        ulps=32.0 if double or log_std.numel() < mean.numel() else 8.0,  # a sum over rows cancels
    )


@pytest.mark.parametrize("parts", [1, 2, 256])
@pytest.mark.parametrize("width", [1, 3, 150])
def test_shared_log_std_over_many_rows(parts, width):
    n = 2100 if width < 10 else 21
    mean, log_std, actions = torch.randn(n, width), torch.randn(width), torch.randn(n, width)
    with mock.patch.object(_normal, "_PARTS", parts):
        got = gradients(lambda m, s: normal(m, s, actions), [mean, log_std])
        again = gradients(lambda m, s: normal(m, s, actions), [mean, log_std])
    want = gradients(lambda m, s: reference.normal_log_prob(m, s, actions.double()), [mean.double(), log_std.double()])
    eager = gradients(lambda m, s: reference.normal_log_prob(m, s, actions), [mean, log_std])
    for a, b, e, t in zip(got, again, eager, want, strict=True):
        assert torch.equal(a, b)
        assert_as_good(a, e, t)


@pytest.mark.parametrize("squash", [False, True])
def test_normal_special_rows(squash):
    mean, log_std, actions = torch.randn(20, 3), torch.zeros(3), torch.randn(20, 3)
    mean[7] = math.nan
    for shared in (True, False):
        s = (log_std if shared else log_std.expand(20, 3).clone()).requires_grad_()
        m = mean.clone().requires_grad_()
        log_prob, entropy = normal(m, s, actions, squash=squash)
        keep = torch.arange(20) != 7
        loss = torch.where(keep, log_prob, 0.0).sum() + torch.where(keep, entropy, 0.0).sum() * 0.5
        d_mean, d_log_std = torch.autograd.grad(loss, (m, s))
        assert d_mean.isfinite().all() and not d_mean[7].any() and d_log_std.isfinite().all() and log_prob[7].isnan()
    far = torch.tensor([[20.0], [-20.0], [90.0], [-1000.0]])
    log_prob, _ = normal(far, torch.zeros(1), far, squash=True)
    expected = -0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - far.abs().squeeze(-1).double())
    assert_as_good(log_prob, None, expected, "squash", ulps=4)
    assert_rows_stand_alone(
        partial(normal, squash=squash), [torch.randn(53, 9), torch.randn(9), torch.randn(53, 9)], (1, 0, 1)
    )


def test_one_gradient_of_normal_only():
    mean, log_std, actions = torch.randn(20, 3), torch.randn(3), torch.randn(20, 3)
    g = torch.ones(20)
    d_mean, d_log_std = nan_like(mean), nan_like(log_std)
    _normal.normal_log_prob_backward(mean, log_std, actions, False, g, None, d_mean, None)
    _normal.normal_log_prob_backward(mean, log_std, actions, False, None, g, None, d_log_std)
    assert d_mean.isfinite().all() and torch.equal(d_log_std, torch.full((3,), 20.0))


# --- bernoulli --------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(test_bernoulli_log_prob.cases())
def test_bernoulli(case):
    logits, actions = case
    assert_parity(
        lambda z: bernoulli(z, actions),
        lambda z: reference.bernoulli_log_prob(z, actions),
        [logits],
        ulps=32.0 if logits.dtype == torch.float64 else 8.0,
    )


def test_bernoulli_special_values():
    z = torch.tensor([[math.inf], [math.inf], [-math.inf], [-math.inf], [math.nan], [100.0], [-100.0], [1e30], [0.0]])
    actions = torch.tensor([[1], [0], [1], [0], [1], [1], [1], [0], [0]])
    got = gradients(lambda z: bernoulli(z, actions), [z])
    want = gradients(lambda z: reference.bernoulli_log_prob(z, actions), [z])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    z, actions = torch.randn(53, 80), torch.randint(0, 2, (53, 80))
    assert_rows_stand_alone(bernoulli, [z, actions], (True, True))
    z[4] = math.nan
    g = (torch.arange(53) != 4).float()
    (grad,) = torch.autograd.grad(bernoulli(z.requires_grad_(), actions), z, (g, g))
    assert grad.isfinite().all() and not grad[4].any()


# --- beta -------------------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(test_beta_log_prob.cases())
def test_beta(case):
    alpha, b, actions, low, high = case
    double = torch.float64 in (alpha.dtype, actions.dtype)
    assert_parity(
        lambda x, y: beta(x, y, actions, low=low, high=high),
        lambda x, y: reference.beta_log_prob(x, y, actions, low=low, high=high),
        [alpha, b],
        double=lambda x, y: reference.beta_log_prob(x, y, actions.double(), low=low, high=high),
        ulps=2e7 if double else 8.0,  # torch's trigamma is good to 1e-9 in float64; test_gamma_functions is stricter
    )


def test_gamma_functions():
    """The value is lgamma, the gradients digamma and trigamma: against mpmath, from tiny to huge."""
    points = [1e-3, 0.1, 0.5, 0.999, 1.0, 1.001, 1.4616, 2.0, 3.7, 9.99, 10.0, 25.0, 1e3, 1e6]
    alpha = torch.tensor(points, dtype=torch.float64)[:, None].requires_grad_()
    b, x = torch.full_like(alpha, 1.5), torch.full_like(alpha, 0.5)
    log_prob, entropy = beta(alpha, b, x)
    (by_log_prob,) = torch.autograd.grad(log_prob.sum(), alpha, retain_graph=True)
    (by_entropy,) = torch.autograd.grad(entropy.sum(), alpha)
    with mpmath.workdps(40):
        half = mpmath.log(0.5)
        for i, a in enumerate(points):
            a, total = mpmath.mpf(a), mpmath.mpf(a) + 1.5
            gammas = [mpmath.loggamma(a), mpmath.loggamma(1.5), mpmath.loggamma(total)]
            norm = gammas[0] + gammas[1] - gammas[2]
            error = abs(log_prob[i].item() - ((a - 1) * half + 0.5 * half - norm))
            assert error < 2e-14 * max(1, abs((a - 1) * half), *map(abs, gammas)), points[i]
            terms = [half, mpmath.psi(0, a), mpmath.psi(0, total)]
            error = abs(by_log_prob[i].item() - (terms[0] - terms[1] + terms[2]))
            assert error < 2e-14 * max(map(abs, terms)), points[i]
            terms = [(total - 2) * mpmath.psi(1, total), (a - 1) * mpmath.psi(1, a)]
            error = abs(by_entropy[i].item() - (terms[0] - terms[1]))
            assert error < 2e-14 * max(map(abs, terms)), points[i]


def test_edges_of_the_interval():
    x = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.5], [1.5], [0.0], [1.0]])
    alpha = torch.tensor([[1.0], [2.0], [2.0], [0.5], [1.0], [2.0], [0.5], [1.0]])
    b = torch.tensor([[2.0], [1.0], [2.0], [0.5], [1.0], [2.0], [1.0], [1.0]])
    got = gradients(lambda a, b: beta(a, b, x), [alpha, b])
    want = gradients(lambda a, b: reference.beta_log_prob(a, b, x), [alpha, b])
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)
    assert got[0][5].isnan()
    bad = torch.tensor([[-1.0]])
    assert all(bool(y.isnan()) for y in beta(bad, -bad, torch.tensor([[0.5]])))


def test_beta_without_cancellation():
    alpha, b, actions = torch.full((1, 1), 3e6), torch.full((1, 1), 2e6), torch.full((1, 1), 0.6)
    got = gradients(lambda x, y: beta(x, y, actions), [alpha, b])
    want = gradients(lambda x, y: reference.beta_log_prob(x, y, actions.double()), [alpha.double(), b.double()])
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q.float(), rtol=1e-4, atol=0)
    alpha, b, actions = torch.rand(21, 7) + 0.5, torch.rand(21, 7) + 0.5, torch.rand(21, 7)
    assert_rows_stand_alone(beta, [alpha, b, actions], (True, True, True))
    alpha[4] = math.nan
    g = (torch.arange(21) != 4).float()
    grads = torch.autograd.grad(beta(alpha.requires_grad_(), b.requires_grad_(), actions), (alpha, b), (g, g))
    assert all(bool(x.isfinite().all()) and not bool(x[4].any()) for x in grads)
    only = nan_like(b)
    _beta.beta_log_prob_backward(alpha, b, actions, 0.0, 1.0, g, g, None, only)
    assert torch.equal(only, grads[1])


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_no_rows(shape):
    x, labels = torch.empty(shape), torch.empty(shape[:-1], dtype=torch.long)
    for op, inputs in (
        (lambda z: categorical(z, labels), [x]),
        (lambda z: multi_categorical(z, torch.empty(*shape[:-1], 2), [1, 2]), [x]),
        (lambda z: bernoulli(z, x), [x]),
        (lambda m, s: normal(m, s, x), [x, torch.zeros(3)]),
        (lambda m, s: normal(m, s, x), [x, x]),
        (lambda a, b: beta(a, b, x), [x, x]),
    ):
        log_prob, entropy, *grads = gradients(op, inputs)
        assert log_prob.shape == entropy.shape == shape[:-1]
        assert all(torch.equal(d, torch.zeros_like(i)) for d, i in zip(grads, inputs, strict=True))


def test_no_dimensions():
    x = torch.empty(3, 0)
    for op, inputs in (
        (lambda z: bernoulli(z, x), [x]),
        (lambda m, s: normal(m, s, x), [x, torch.zeros(0)]),
        (lambda a, b: beta(a, b, x), [x, x]),
    ):
        log_prob, entropy, *_ = gradients(op, inputs)
        assert not log_prob.any() and not entropy.any()
