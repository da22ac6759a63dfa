"""categorical_ppo_loss: the fused op against the specification, against its own two halves, and its edges."""

import math

import pytest
import torch
from conftest import ISAS, same_bits
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import DTYPES, bits, compare, streams

import ppo_fast as pf
from ppo_fast import _C, reference
from ppo_fast.ops.categorical_ppo_loss import _op


@given(data=st.data(), shape=st.sampled_from([(1,), (5,), (300,), (7, 33)]), width=st.sampled_from([1, 2, 6, 18, 64, 65, 1500]),
       dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))  # fmt: skip
def test_matches_float64(data, shape, width, dtype, seed):
    g = torch.Generator().manual_seed(seed)
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
    compare(pf.categorical_ppo_loss, reference.categorical_ppo_loss, inputs, s)


def rollout(n=200, width=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda scale=1.0: torch.randn(n, generator=g) * scale  # noqa: E731
    mask = torch.rand(n, width, generator=g) < 0.7
    actions = torch.randint(0, width, (n,), generator=g)
    return {
        "actions": actions, "action_mask": mask.scatter_(-1, actions[:, None], True), "old_log_prob": make(0.2) - 1.6,
        "advantages": make(), "old_values": make(), "returns": make(), "ref_log_prob": make(0.2) - 1.6,
        "rollout_log_prob": make(0.2) - 1.6, "mask": torch.rand(n, generator=g) < 0.8,
        "weights": torch.rand(n, generator=g),
    }  # fmt: skip


FULL = pf.LossConfig(dual_clip=3.0, value_clip=0.2, entropy_coef=0.01, normalize_advantages=True, kl="k3", kl_coef=0.1,
                     rollout_correction="tis")  # fmt: skip


@pytest.mark.parametrize("width", [5, 100])
@pytest.mark.parametrize("shape", [(64,), (8, 8)])
def test_index_gathers_what_indexing_would(shape, width):
    stored = rollout(width=width)
    logits, values = torch.randn(*shape, width, requires_grad=True), torch.randn(shape, requires_grad=True)
    index = torch.randint(0, 200, shape)
    a = pf.categorical_ppo_loss(logits, **stored, config=FULL, values=values, index=index)
    b = pf.categorical_ppo_loss(logits, **{k: v[index] for k, v in stored.items()}, config=FULL, values=values)
    wanted = bits(a, [logits, values])
    assert same_bits(wanted, bits(b, [logits, values]))
    time_major = {
        k: v.view(10, 20, *v.shape[1:]).transpose(0, 1).contiguous().transpose(0, 1) for k, v in stored.items()
    }
    c = pf.categorical_ppo_loss(logits, **time_major, config=FULL, values=values, index=index.int())
    assert same_bits(wanted, bits(c, [logits, values]))
    truth = reference.categorical_ppo_loss(logits, **stored, config=FULL, values=values, index=index)
    torch.testing.assert_close(a.loss, truth.loss)


@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "seq-mean-token-sum"])
def test_index_with_sequence_reductions(reduction):
    stored = rollout()
    del stored["weights"]
    logits, index = torch.randn(6, 9, 5, requires_grad=True), torch.randint(0, 200, (6, 9))
    config = pf.LossConfig(reduction=reduction)
    a = pf.categorical_ppo_loss(logits, **stored, config=config, index=index)
    b = reference.categorical_ppo_loss(logits, **stored, config=config, index=index)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(bits(a, [logits])[2], bits(b, [logits])[2])


def test_equals_its_two_halves():
    stored = rollout()
    del stored["weights"]
    logits, values = torch.randn(200, 5, requires_grad=True), torch.randn(200, requires_grad=True)
    fused = pf.categorical_ppo_loss(logits, **stored, config=FULL, values=values)
    actions, action_mask = stored.pop("actions"), stored.pop("action_mask")
    log_prob, entropy = pf.categorical_log_prob(logits, actions, action_mask=action_mask)
    apart = pf.ppo_loss(log_prob, **stored, config=FULL, values=values, entropy=entropy)
    assert torch.equal(fused.loss, apart.loss)
    for a, b in zip(bits(fused, [logits, values])[2:], bits(apart, [logits, values])[2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 17, 257, 5000])
def test_same_bits_over_instruction_sets_threads_and_runs(n):
    stored = rollout(n)
    logits, values = torch.randn(n, 5, requires_grad=True), torch.randn(n, requires_grad=True)
    results = []
    for isa in ISAS:
        _C.set_isa(isa)
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = pf.categorical_ppo_loss(logits, **stored, config=FULL, values=values)
            results.append(bits(out, [logits, values]))
    assert all(same_bits(results[0], r) for r in results[1:])


@pytest.mark.parametrize("width", [5, 100])
def test_nothing_behind_the_mask_is_read(width):
    stored = rollout(width=width)
    keep = stored["mask"]
    logits, values = torch.randn(200, width), torch.randn(200)
    wanted = None
    for poison in (0.0, math.nan, math.inf):
        bad = lambda x: torch.where(keep.view(-1, *[1] * (x.ndim - 1)), x, poison)  # noqa: E731, B023
        p = {k: bad(v) if v.is_floating_point() else v for k, v in stored.items()}
        p["actions"] = torch.where(keep, stored["actions"], 10**6)
        leaves = [bad(logits).requires_grad_(), bad(values).requires_grad_()]
        got = bits(pf.categorical_ppo_loss(leaves[0], **p, config=FULL, values=leaves[1]), leaves)
        wanted = wanted or got
        assert same_bits(wanted, got)
        assert (got[2][~keep] == 0).all()


def test_gradient_rows_sum_to_zero_and_shifts_change_nothing():
    stored = rollout()
    del stored["action_mask"]
    logits = torch.randn(200, 5, dtype=torch.float64, requires_grad=True)
    a = pf.categorical_ppo_loss(logits, **stored, config=FULL)
    b = pf.categorical_ppo_loss(logits + 7.0 * torch.randn(200, 1), **stored, config=FULL)
    torch.testing.assert_close(a.loss, b.loss)
    grad = torch.autograd.grad(a.loss, logits)[0]
    torch.testing.assert_close(grad.sum(-1), torch.zeros(200, dtype=torch.float64), atol=1e-14, rtol=0)


def test_gradcheck_and_double_backward():
    stored = {k: v.double() if v.is_floating_point() else v for k, v in rollout(7, seed=1).items()}
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def loss(logits, values):
        return pf.categorical_ppo_loss(logits, **stored, config=FULL, values=values).loss

    assert torch.autograd.gradcheck(loss, (logits, values))
    assert torch.autograd.gradgradcheck(loss, (logits, values))


def test_empty_and_all_masked():
    empty = {k: v[:0] for k, v in rollout().items()}
    logits = torch.randn(0, 5, requires_grad=True)
    pf.categorical_ppo_loss(logits, **empty, config=FULL).loss.backward()
    assert logits.grad.shape == (0, 5)
    stored = rollout() | {"mask": torch.zeros(200)}
    logits = torch.randn(200, 5, requires_grad=True)
    out = pf.categorical_ppo_loss(logits, **stored, config=FULL)
    out.loss.backward()
    assert out.loss.item() == 0 and torch.equal(logits.grad, torch.zeros(200, 5))


def test_compile_and_opcheck():
    torch._dynamo.reset()
    stored, index = rollout(), torch.randint(0, 200, (64,))
    logits, values = torch.randn(64, 5, requires_grad=True), torch.randn(64, requires_grad=True)
    step = lambda l, v, c: pf.categorical_ppo_loss(l * 1.0, **stored, config=c, values=v, index=index).loss  # noqa: E731, E741
    compiled = torch.compile(step, fullgraph=True)
    for clip in (0.2, 0.1):
        config = pf.LossConfig(clip_low=clip, entropy_coef=clip, value_clip=0.2)
        a, b = compiled(logits, values, config), step(logits, values, config)
        assert torch.equal(a, b)
        for x, y in zip(
            torch.autograd.grad(a, [logits, values]), torch.autograd.grad(b, [logits, values]), strict=True
        ):
            torch.testing.assert_close(x, y)
    s = stored
    arguments = (logits, values, s["actions"], s["action_mask"], index, s["old_log_prob"], s["advantages"],
                 s["old_values"], s["returns"], None, None, s["mask"], None, math.nan, False)  # fmt: skip
    config = pf.LossConfig.preset("cleanrl")
    torch.library.opcheck(_op.op, (*arguments, config.numbers_vector, *config.choices()))


ERRORS = [
    (dict(actions=torch.full((200,), 5)), ValueError, r"actions must be in \[0, 5\), the number of actions, got 5 at row 0"),
    (dict(actions=torch.tensor(-1).expand(200)), ValueError, r"actions must be in \[0, 5\).*got -1"),
    (dict(actions=torch.zeros(200, 1)), ValueError, r"actions must be the shape of the rows = \[200\], got \[200, 1\]"),
    (dict(action_mask=torch.ones(200, 4)), ValueError, r"action_mask must be the shape of logits = \[200, 5\]"),
    (dict(values=torch.zeros(200, 1)), ValueError, r"values must be the shape of the rows = \[200\], got \[200, 1\]"),
    (dict(index=torch.full((200,), 200)), ValueError, r"index must be in \[0, 200\), .*got 200"),
    (dict(index=torch.zeros(200)), TypeError, "index must be an integer type, got float32"),
    (dict(index=torch.zeros(200, dtype=torch.int64), returns=torch.zeros(7)), ValueError, "returns must have as many"),
    (dict(logits=torch.zeros(200, 5, dtype=torch.int64)), TypeError, "logits must be float32"),
    (dict(logits=None), TypeError, "expected a torch.Tensor, got NoneType"),
    (dict(advantages=torch.zeros(200, requires_grad=True)), ValueError, "advantages gets no gradient but requires one"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change, error, message):
    arguments = {"logits": torch.randn(200, 5), "values": torch.zeros(200), **rollout(), "config": FULL, **change}
    with pytest.raises(error, match=message):
        pf.categorical_ppo_loss(**arguments)
