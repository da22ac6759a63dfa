"""multi_categorical_log_prob: heads of unlike widths, short and long, side by side."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import pf
from hypothesis import given
from hypothesis import strategies as st
from log_prob_laws import (
    LAYOUTS,
    assert_compiles,
    assert_double_backward,
    assert_parity,
    assert_refuses,
    assert_rows_stand_alone,
    assert_same_bits,
    gradients,
    strided,
)

from ppo_fast import reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_actions(nvec, lead):
    return torch.stack([torch.randint(0, n, lead) for n in nvec], -1)


@st.composite
def cases(draw):
    nvec = draw(st.lists(st.sampled_from([1, 2, 3, 7, 64, 65, 200]), min_size=1, max_size=4))
    lead = draw(st.sampled_from([(), (1,), (5,), (33,), (2, 3), (0,)]))
    torch.manual_seed(draw(st.integers(0, 999)))
    logits = strided((*lead, sum(nvec)), draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(FLOATS)))
    actions = random_actions(nvec, lead).to(draw(st.sampled_from([torch.int64, torch.uint8, torch.float32])))
    mask = (torch.rand(*lead, sum(nvec)) > 0.3) if draw(st.booleans()) else None
    return logits, actions, nvec, mask


@given(cases())
def test_parity(case):
    logits, actions, nvec, mask = case
    assert_parity(
        lambda z: pf.multi_categorical_log_prob(z, actions, nvec, action_mask=mask),
        lambda z: reference.multi_categorical_log_prob(z, actions, nvec, action_mask=mask),
        [logits],
        ulps=32.0 if logits.dtype == torch.float64 else 8.0,  # float64's truth rounds too
    )


def test_is_the_sum_of_its_heads():
    nvec, z = [3, 5, 70], torch.randn(40, 78)
    actions = random_actions(nvec, (40,))
    got = gradients(lambda z: pf.multi_categorical_log_prob(z, actions, tuple(nvec)), [z])

    def heads(z):
        parts = [pf.categorical_log_prob(h, a) for h, a in zip(z.split(nvec, -1), actions.unbind(-1), strict=True)]
        return parts[0][0] + parts[1][0] + parts[2][0], parts[0][1] + parts[1][1] + parts[2][1]

    for a, b in zip(got, gradients(heads, [z]), strict=True):
        assert torch.equal(a, b)


def test_same_bits_everywhere():
    for dtype in FLOATS:
        z, actions = torch.randn(3000, 12).to(dtype), random_actions([4, 8], (3000,))
        assert_same_bits(lambda z: pf.multi_categorical_log_prob(z, actions, [4, 8]), [z])  # noqa: B023


def test_rows_stand_alone():
    z, actions = torch.randn(53, 80), random_actions([10, 70], (53,))
    assert_rows_stand_alone(lambda z, a: pf.multi_categorical_log_prob(z, a, [10, 70]), [z, actions], (True, True))


def test_double_backward():
    z, actions = torch.randn(3, 9, dtype=torch.float64, requires_grad=True), random_actions([2, 3, 4], (3,))
    taken = actions + torch.tensor([0, 2, 5])
    mask = (torch.rand(3, 9) > 0.2).scatter_(-1, taken, True)
    assert_double_backward(lambda z: pf.multi_categorical_log_prob(z, actions, [2, 3, 4], action_mask=mask), [z])


def test_special_rows():
    z, actions = torch.randn(6, 5), torch.zeros(6, 2, dtype=torch.long)
    z[0, :2] = -math.inf  # a head without any possible action
    z[1, 2] = math.nan
    z[2, 1:4] = -math.inf
    got = gradients(lambda z: pf.multi_categorical_log_prob(z, actions, [2, 3]), [z])
    want = gradients(lambda z: reference.multi_categorical_log_prob(z, actions, [2, 3]), [z])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert got[0][0].isfinite() and got[0][1].isnan() and not got[2][1, :2].isnan().any()


def test_errors():
    z, a = torch.randn(40, 5), torch.zeros(40, 2, dtype=torch.long)
    op = pf.multi_categorical_log_prob
    a[[7, 30], [1, 0]] = torch.tensor([3, 9])
    assert_refuses(ValueError, ["actions", "[0, 3)", "head 1", "got 3", "row 7"], op, z, a, [2, 3])
    a.zero_()
    assert_refuses(ValueError, ["nvec", "sum to 5", "got 2 that sum to 6"], op, z, a, [3, 3])
    assert_refuses(ValueError, ["nvec", "2 entries", "got 1"], op, z, a, [5])
    assert_refuses(ValueError, ["nvec", ">= 1"], op, z, a, [5, 0])
    assert_refuses(ValueError, ["actions", "[40, 5]"], op, z, a[:3], [2, 3])
    assert_refuses(ValueError, ["actions", "[40, 5]"], op, z, a[:, 0], [2, 3])
    assert_refuses(ValueError, ["action_mask", "[40, 5]"], op, z, a, [2, 3], action_mask=torch.ones(40, 2))


@pytest.mark.parametrize("entropy", [True, False])
def test_registered_op(entropy):
    z, actions = torch.randn(5, 7, requires_grad=True), random_actions([3, 4], (5,))
    ops = torch.ops.ppo_fast
    args = (z, actions, torch.rand(5, 7) > 0.3, [3, 4], entropy)
    torch.library.opcheck(ops.multi_categorical_log_prob.default, args)
    saved = ops.multi_categorical_log_prob(*args)[2]
    rest = (saved, torch.randn(5), torch.randn(5) if entropy else None)
    torch.library.opcheck(ops.multi_categorical_log_prob_backward.default, (z.detach(), *args[1:], *rest))


def test_compiles():
    actions = random_actions([3, 4], (9,))
    assert_compiles(lambda z: pf.multi_categorical_log_prob(z, actions, [3, 4]), [torch.randn(9, 7)])


def test_empty():
    z = torch.empty(0, 5, requires_grad=True)
    log_prob, entropy = pf.multi_categorical_log_prob(z, torch.empty(0, 2, dtype=torch.long), [2, 3])
    (log_prob.sum() + entropy.sum()).backward()
    assert log_prob.shape == (0,) and z.grad.shape == (0, 5)
