"""bernoulli_log_prob against its specification."""

from __future__ import annotations

import math

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


@st.composite
def cases(draw):
    width = draw(st.sampled_from([1, 2, 3, 8, 17, 64, 65, 130]))
    lead = draw(st.sampled_from([(), (1,), (5,), (16,), (33,), (300,), (2, 3), (0,)]))
    torch.manual_seed(draw(st.integers(0, 999)))
    scale = draw(st.sampled_from([0.01, 3.0, 30.0]))
    logits = strided((*lead, width), draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(FLOATS)), scale)
    actions = torch.rand(*lead, width) > 0.5
    return logits, actions.to(draw(st.sampled_from([torch.bool, torch.int64, torch.uint8, torch.float32])))


@given(cases())
def test_parity(case):
    logits, actions = case
    assert_parity(
        lambda z: pf.bernoulli_log_prob(z, actions),
        lambda z: reference.bernoulli_log_prob(z, actions),
        [logits],
        ulps=32.0 if logits.dtype == torch.float64 else 8.0,  # float64's truth rounds too
    )


def test_same_bits_everywhere():
    for dtype in FLOATS:
        z, actions = torch.randn(5000, 9).to(dtype) * 5, torch.randint(0, 2, (5000, 9))
        assert_same_bits(lambda z: pf.bernoulli_log_prob(z, actions), [z])  # noqa: B023


def test_rows_stand_alone():
    z, actions = torch.randn(53, 80), torch.randint(0, 2, (53, 80))
    assert_rows_stand_alone(pf.bernoulli_log_prob, [z, actions], (True, True))


def test_double_backward():
    z, actions = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 2, (3, 4))
    assert_double_backward(lambda z: pf.bernoulli_log_prob(z, actions), [z])
    for k in (0, 1):
        assert_double_backward(lambda z, k=k: pf.bernoulli_log_prob(z, actions)[k], [z])


def test_is_a_categorical_of_two():
    z, actions = torch.randn(50, 1), torch.randint(0, 2, (50, 1))
    two = torch.cat([torch.zeros(50, 1), z], -1)
    for a, b in zip(pf.bernoulli_log_prob(z, actions), pf.categorical_log_prob(two, actions[:, 0]), strict=True):
        torch.testing.assert_close(a, b)


def test_special_values():
    z = torch.tensor([[math.inf], [math.inf], [-math.inf], [-math.inf], [math.nan], [100.0], [-100.0], [1e30], [0.0]])
    actions = torch.tensor([[1], [0], [1], [0], [1], [1], [1], [0], [0]])
    got = gradients(lambda z: pf.bernoulli_log_prob(z, actions), [z])
    want = gradients(lambda z: reference.bernoulli_log_prob(z, actions), [z])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert got[0][0] == 0 and got[0][1] == -math.inf and not got[1][:4].any() and got[0][4].isnan()


def test_errors():
    z, a = torch.randn(4, 3), torch.zeros(4, 3)
    assert_refuses(ValueError, ["actions", "[4, 3]", "[4]"], pf.bernoulli_log_prob, z, a[:, 0])
    assert_refuses(TypeError, ["logits"], pf.bernoulli_log_prob, z.long(), a)
    assert_refuses(ValueError, ["actions gets no gradient"], pf.bernoulli_log_prob, z, a.requires_grad_())


def test_registered_op_and_compile():
    z, actions = torch.randn(5, 3, requires_grad=True), torch.randint(0, 2, (5, 3))
    ops = torch.ops.ppo_fast
    for entropy in (True, False):
        torch.library.opcheck(ops.bernoulli_log_prob.default, (z, actions, entropy))
    rest = (z.detach(), actions, True, torch.empty(0), torch.randn(5), torch.randn(5))
    torch.library.opcheck(ops.bernoulli_log_prob_backward.default, rest)
    assert_compiles(lambda z: pf.bernoulli_log_prob(z, actions), [torch.randn(5, 3)])


def test_empty():
    for shape in ((0, 3), (3, 0)):
        z = torch.empty(shape, requires_grad=True)
        log_prob, entropy = pf.bernoulli_log_prob(z, torch.empty(shape))
        (log_prob.sum() + entropy.sum()).backward()
        assert log_prob.shape == shape[:1] and not log_prob.any() and z.grad.shape == shape
