"""linear_ppo_loss: loss, statistics and gradients against all logits at once in float64, its laws, its cost, its edges."""

import itertools
import math

import pytest
import torch
from conftest import as_double, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_cases import Cost, H, M, V, example
from loss_cases import DTYPES, bits, compare, replace, streams
from torch._dynamo.testing import CompileCounterWithBackend

import ppo_fast as pf
from ppo_fast import reference
from ppo_fast.config import POLICIES
from ppo_fast.ops import _loss


def specification(hidden, weight, targets, config=None, bias=None, values=None, cu_seqlens=None, denominator=None,
                  temperature=1.0, softcap=None, logits_memory=None, **stored):  # fmt: skip
    rollout = [stored.get(name) for name in _loss.ROLLOUT]
    return reference.linear_ppo_loss(
        hidden, weight, targets, config or pf.LossConfig(), rollout, bias, temperature, softcap, values, cu_seqlens,
        denominator,
    )  # fmt: skip


@settings(max_examples=60)
@given(data=st.data(), lead=st.sampled_from([(1,), (37,), (4, 9)]), dtype=st.sampled_from(DTYPES),
       seed=st.integers(0, 2**31))  # fmt: skip
def test_matches_float64(data, lead, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    s = data.draw(streams(lead, g, dtype))
    x = example(dtype, lead, bias=data.draw(st.booleans()), seed=seed)
    if dtype in (torch.bfloat16, torch.float16):  # logits rounded to a half move ratios over a clip's edge, eager's too
        x["hidden"] = x["hidden"].detach().float().requires_grad_()
    log_prob, _ = reference.linear_log_prob(x["hidden"].detach(), x["weight"].detach(), x["targets"])
    for name in ("old_log_prob", "ref_log_prob", "rollout_log_prob"):
        if name in s.stored:
            s.stored[name] = (s.stored[name].float() + log_prob.float()).to(s.stored[name].dtype)
    if "returns" in s.stored:
        x["values"] = torch.randn(lead, generator=g).to(dtype)
    options = {
        "temperature": data.draw(st.sampled_from([1.0, 0.8])),
        "softcap": data.draw(st.sampled_from([None, 4.0])),
        "logits_memory": data.draw(st.sampled_from([None, 1, 8 * V * 10])),
    }
    compare(pf.linear_ppo_loss, specification, {k: v.detach() for k, v in x.items()}, s, size_of_log_prob=16.0,
            **options)  # fmt: skip


def rollout(x, lead=(M,), seed=1, noise=0.3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        log_prob, _ = reference.linear_log_prob(**{k: v for k, v in x.items() if k != "values"})
    make = lambda scale=1.0: torch.randn(lead, generator=g).to(log_prob.dtype) * scale  # noqa: E731
    return {"old_log_prob": log_prob + make(noise), "advantages": make(), "ref_log_prob": log_prob + make(noise)}


CONFIG = pf.LossConfig(entropy_coef=0.01, kl="k3", kl_coef=0.1)


def test_equals_ppo_loss_of_the_log_probs():
    x = example(torch.float64)
    stored = rollout(x)
    out = pf.linear_ppo_loss(**x, **stored, config=CONFIG)
    log_prob, h = pf.linear_log_prob(**x)
    expected = pf.ppo_loss(log_prob, entropy=h, **stored, config=CONFIG)
    leaves = (x["hidden"], x["weight"])
    assert torch.equal(out.loss, expected.loss) and torch.equal(
        out.stats.vector.nan_to_num(), expected.stats.vector.nan_to_num()
    )
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected.loss, leaves), rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_every_policy_in_chunks(policy, packed, reduction):
    """A chunk's gradient is that of the whole: sequences are never cut where they must not be."""
    lead, lengths = (6, 7), [7, 3, 12, 1, 0, 9, 10]
    x = example(torch.float64, (sum(lengths),) if packed else lead)
    stored = rollout(x, x["targets"].shape)
    stored["mask"] = torch.rand(x["targets"].shape, generator=torch.Generator().manual_seed(2)) < 0.8
    if packed:
        stored["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    config = replace(CONFIG, policy=policy, reduction=reduction, cov_ratio=0.3)
    torch.manual_seed(3)  # "clip_cov" draws
    truth = specification(**x, **stored, config=config)
    leaves = (x["hidden"], x["weight"])
    expected = torch.autograd.grad(truth.loss, leaves)
    for memory in (None, 8 * V * 40, 8 * V * 6):
        torch.manual_seed(3)
        out = pf.linear_ppo_loss(**x, **stored, config=config, logits_memory=memory)
        torch.testing.assert_close(out.loss, truth.loss, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), expected, rtol=1e-10, atol=1e-12)


def test_micro_batches_with_one_denominator_sum_to_the_whole():
    x = example(torch.float64)
    stored = rollout(x)
    stored["mask"] = torch.arange(M) % 5 != 0
    count = stored["mask"].sum().item()
    leaves = (x["hidden"], x["weight"])
    whole = torch.autograd.grad(pf.linear_ppo_loss(**x, **stored, config=CONFIG).loss, leaves)
    for cut in ([1, 20], [10, 11, 12], [36]):
        sums = [torch.zeros_like(y) for y in leaves]
        bounds = [0, *cut, M]
        for a, b in itertools.pairwise(bounds):
            piece = {k: v[a:b] for k, v in stored.items()}
            out = pf.linear_ppo_loss(
                x["hidden"][a:b], x["weight"], x["targets"][a:b], **piece, config=CONFIG, denominator=count
            )
            for total, g in zip(sums, torch.autograd.grad(out.loss, leaves), strict=True):
                total += g
        torch.testing.assert_close(tuple(sums), whole, rtol=1e-11, atol=1e-13)


def flops(x, stored, **options):
    with Cost() as cost:
        pf.linear_ppo_loss(**x, **stored, **options).loss.backward()
    return cost.flops / (2 * H * V)


def test_three_products_and_what_leaves_them():
    x, stored = example(), rollout(example())
    assert flops(x, stored) == 3 * M - 2 * clipped(x, stored)
    assert flops(x, stored, config=CONFIG) == 3 * M  # an entropy or KL term gives every token a gradient
    assert flops({**x, "weight": x["weight"].detach()}, stored, config=CONFIG) == 2 * M
    assert flops(x, stored, config=CONFIG, logits_memory=1) == 3 * M
    stored["mask"] = torch.arange(M) % 2 == 0
    assert flops(x, stored, config=CONFIG) == 3 * (M + 1) // 2
    stored["advantages"] = torch.where(torch.arange(M) < 20, 0.0, stored["advantages"].abs() + 1)
    stored["old_log_prob"] = stored["old_log_prob"] + 10  # r far below the clip: with A > 0 it has a gradient
    assert flops(x, stored) == (M + 1) // 2 + 2 * 9
    stored["advantages"] = -stored["advantages"]
    assert flops(x, stored) == (M + 1) // 2


@pytest.mark.parametrize("policy", ["clip_cov", "kl_cov"])
def test_a_policy_of_the_batch_has_a_fourth_product_only_in_several_chunks(policy):
    x, stored = example(), rollout(example())
    config = replace(CONFIG, policy=policy)
    assert flops(x, stored, config=config) == 3 * M
    assert flops(x, stored, config=config, logits_memory=1) == 4 * M


def clipped(x, stored):
    with torch.no_grad():
        log_prob, _ = pf.linear_log_prob(**x)
    ratio, a = (log_prob - stored["old_log_prob"]).exp(), stored["advantages"]
    return int((((a > 0) & (ratio > 1.2)) | ((a < 0) & (ratio < 0.8))).sum())


def test_no_gradient_no_backward():
    x, stored = example(), rollout(example())
    with torch.no_grad(), Cost() as cost:
        out = pf.linear_ppo_loss(**x, **stored)
    assert cost.flops == 2 * M * H * V and not out.loss.requires_grad
    values = torch.zeros(M, requires_grad=True)
    frozen = {k: v.detach() for k, v in x.items()}
    with Cost() as cost:
        pf.linear_ppo_loss(**frozen, **stored, values=values, returns=torch.ones(M)).loss.backward()
    assert cost.flops == 2 * M * H * V
    torch.testing.assert_close(values.grad, torch.full((M,), -0.5 / M))


def test_the_logits_never_exist():
    x = example(lead=(500,), vocabulary=1000)
    stored = rollout(x, (500,))
    with Cost() as cost:
        pf.linear_ppo_loss(**x, **stored, config=CONFIG, logits_memory=4 * 1000 * 15).loss.backward()
    assert cost.elements <= 1000 * H


def test_masked_tokens_may_hold_anything():
    x, stored = example(), rollout(example())
    mask = torch.arange(M) % 4 != 0
    values = {"values": torch.randn(M), "returns": torch.randn(M), "old_values": torch.randn(M)}
    config = replace(CONFIG, value_clip=0.2, normalize_advantages=True)

    def run(x, streams):
        out = pf.linear_ppo_loss(**x, **streams, mask=mask, config=config)
        return [out.loss.detach(), out.stats.vector, *torch.autograd.grad(out.loss, (x["hidden"], x["weight"]))]

    clean = run(x, {**stored, **values})
    dirty = {k: torch.where(mask, v, math.nan) for k, v in {**stored, **values}.items()}
    hidden = torch.where(mask[:, None], x["hidden"].detach(), math.inf).requires_grad_()
    targets = torch.where(mask, x["targets"], 10**9)
    assert same_bits(clean, run({**x, "hidden": hidden, "targets": targets}, dirty))


def test_all_masked_is_zero_and_connected():
    x, stored = example(), rollout(example())
    out = pf.linear_ppo_loss(**x, **stored, mask=torch.zeros(M, dtype=torch.bool), config=CONFIG)
    assert out.loss.item() == 0 and out.stats.approx_kl.item() == 0
    grads = torch.autograd.grad(out.loss, (x["hidden"], x["weight"]))
    assert not any(g.any() for g in grads)


def test_empty():
    x = example(lead=(0,))
    out = pf.linear_ppo_loss(**x, old_log_prob=torch.zeros(0), advantages=torch.zeros(0))
    assert out.loss.item() == 0
    assert torch.autograd.grad(out.loss, x["hidden"])[0].shape == (0, H)


def test_gradients_are_scaled_again_and_differentiated_twice():
    x, stored = example(torch.float64), rollout(example(torch.float64))
    leaves = (x["hidden"], x["weight"])
    once = torch.autograd.grad(pf.linear_ppo_loss(**x, **stored, config=CONFIG).loss, leaves)
    out = pf.linear_ppo_loss(**x, **stored, config=CONFIG)
    first = torch.autograd.grad(3.0 * out.loss, leaves, retain_graph=True)
    second = torch.autograd.grad(out.loss, leaves)
    torch.testing.assert_close(first, tuple(3.0 * g for g in once))
    assert same_bits(second, once)
    small = [x["hidden"].detach()[:4].requires_grad_(), x["weight"].detach()[:9].requires_grad_()]
    old, advantages = torch.full((4,), -2.0, dtype=torch.float64), torch.tensor([1.0, -1.0, 2.0, 0.5]).double()
    config = pf.LossConfig(clip_low=0.9, clip_high=9.0, entropy_coef=0.1)
    f = lambda h, w: pf.linear_ppo_loss(h, w, torch.tensor([1, 8, 0, 3]), old, advantages, config).loss  # noqa: E731
    torch.autograd.gradcheck(f, small)
    torch.autograd.gradgradcheck(f, small)


def test_same_bits_over_runs():
    x = example(lead=(300,), vocabulary=3000)
    stored = rollout(x, (300,))
    runs = [
        bits(pf.linear_ppo_loss(**x, **stored, config=CONFIG, logits_memory=4 * 3000 * 40), [x["hidden"], x["weight"]])
        for _ in range(2)
    ]
    assert same_bits(*runs)


def test_the_reference_backend_is_the_specification():
    x, stored = example(torch.float64), rollout(example(torch.float64))
    with pf.use_backend("reference"):
        out = pf.linear_ppo_loss(**x, **stored, config=CONFIG)
    truth = specification(**{k: as_double(v) for k, v in x.items()}, **stored, config=CONFIG)
    torch.testing.assert_close(out.loss, truth.loss)


@pytest.mark.parametrize("policy", ["cispo", "gspo", "vespo"])
def test_compiled_policies(policy):
    x = example(torch.float64, (6, 7))
    stored = rollout(x, (6, 7))
    config = replace(CONFIG, policy=policy, vespo_k_positive=1.3)
    step = torch.compile(
        lambda **y: pf.linear_ppo_loss(**y, config=config).loss * 1.0, backend="aot_eager", fullgraph=True
    )
    leaves = (x["hidden"], x["weight"])
    mine, eager = step(**x, **stored), pf.linear_ppo_loss(**x, **stored, config=config).loss
    torch.testing.assert_close(mine, eager)
    torch.testing.assert_close(torch.autograd.grad(mine, leaves), torch.autograd.grad(eager, leaves))


def test_compiled_with_other_sizes_and_coefficients():
    """One graph, no break; what is annealed or grows recompiles nothing."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(hidden, weight, targets, values, config, **stored):
        return pf.linear_ppo_loss(
            hidden * 1.0, weight, targets, config=config, values=values, temperature=0.9, **stored
        )

    for n, coefficient in ((20, 0.01), (31, 0.02), (37, 0.5)):
        x = example(lead=(n,))
        stored = {**rollout(x, (n,)), "returns": torch.randn(n)}
        stored["mask"] = torch.arange(n) % 3 != 0
        values = torch.zeros(n, requires_grad=True)
        leaves = (x["hidden"], x["weight"], values)
        config = replace(CONFIG, entropy_coef=coefficient, reduction="seq-mean-token-mean")
        out = step(**x, values=values, config=config, **stored)
        eager = pf.linear_ppo_loss(**x, values=values, config=config, temperature=0.9, **stored)
        torch.testing.assert_close(out.loss, eager.loss)
        torch.testing.assert_close(out.stats.vector, eager.stats.vector)
        torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(eager.loss, leaves))
    assert counter.frame_count == 1


BAD = {
    "old_log_prob must be the shape of targets = [37], got [36]": {"old_log_prob": torch.zeros(36)},
    "mask must be the shape of targets = [37], got [1]": {"mask": torch.ones(1)},
    "denominator must be a finite number > 0, got 0": {"denominator": 0},
    "targets must be in [0, 101), got 101 at 5": {"targets": torch.where(torch.arange(M) == 5, V, 0)},
    "config must be a LossConfig, got dict": {"config": {}},
    "weight must be [V, H] = [V, 16], got [101, 15]": {"weight": torch.zeros(V, 15)},
    "temperature must be a finite number > 0 or a tensor, got -1": {"temperature": -1},
    "advantages gets no gradient but requires one; detach it or use torch.no_grad()": {
        "advantages": torch.zeros(M, requires_grad=True)
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    x = example()
    with pytest.raises((TypeError, ValueError)) as error:
        pf.linear_ppo_loss(**{**x, **rollout(x), **BAD[message]})
    assert str(error.value) == f"linear_ppo_loss: {message}"
