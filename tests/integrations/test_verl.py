"""verl: every function that is replaced, against verl's own, on random and nasty inputs: values, gradients, statistics."""

from __future__ import annotations

import itertools
import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip("verl")
from verl.trainer.ppo import core_algos
from verl.workers.config.actor import ActorConfig, PolicyLossConfig

from ppo_fast.integrations import verl

LENGTHS = [7, 0, 9, 6, 1, 8]
B, T, V = len(LENGTHS), 9, 37
PREFIX = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
HOLES = PREFIX & (torch.rand(B, T, generator=torch.Generator().manual_seed(5)) < 0.7)  # several turns
MASKS = {"prefix": PREFIX, "holes": HOLES, "integer": HOLES.long(), "floating": PREFIX.float(), "all": torch.ones(B, T)}
UIDS = np.array(["a", "b", "a", "c", "a", "c"], dtype=object)


def theirs(name):
    return getattr(verl.theirs, name)


def rand(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def close(ours, wanted, dtype=torch.float32, where=None, **tolerance):
    assert ours.dtype == wanted.dtype and ours.shape == wanted.shape
    if where is not None:
        ours, wanted = ours[where], wanted[where]
    tolerance = tolerance or {
        torch.float64: {"rtol": 1e-7, "atol": 1e-7},
        torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    }.get(dtype, {"rtol": 2e-2, "atol": 2e-2})
    torch.testing.assert_close(ours, wanted, equal_nan=True, **tolerance)


@pytest.fixture
def calls(monkeypatch):
    """Names of verl's own functions that were called."""
    called = []
    for name, function in list(vars(verl.theirs).items()):
        if callable(function) and (name.startswith("compute_") or name in vars(verl)):
            monkeypatch.setattr(
                verl.theirs, name, lambda *a, _f=function, _n=name, **k: called.append(_n) or _f(*a, **k)
            )
    return called


# --- advantages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (0.0, 0.5)])
def test_gae(gamma, lam, mask, dtype, calls):
    mask = MASKS[mask]
    rewards, values = rand(B, 2 * T, seed=1, dtype=dtype)[:, ::2], rand(T, B, seed=2, dtype=dtype).T
    wanted = theirs("compute_gae_advantage_return")(rewards, values, mask.long(), gamma, lam)
    calls.clear()
    ours = verl.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    assert not calls
    for x, y in zip(ours, wanted, strict=True):
        close(x, y, dtype, where=mask != 0)
        assert not x[mask == 0].any()


def test_gae_reads_nothing_that_is_masked():
    rewards, values = rand(B, T, seed=1), rand(B, T, seed=2)
    clean = verl.compute_gae_advantage_return(rewards, values, HOLES, 0.99, 0.95)
    dirty = [torch.where(HOLES, x, torch.nan) for x in (rewards, values)]
    for x, y in zip(clean, verl.compute_gae_advantage_return(*dirty, HOLES, 0.99, 0.95), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("shift_mean", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale, mean", [(1.0, 0.0), (1e-3, 100.0), (0.0, 3.0)])
def test_whiten(mask, scale, mean, shift_mean, calls):
    mask, x = MASKS[mask], rand(B, T, scale=scale, dtype=torch.float64) + mean
    wanted = theirs("masked_whiten")(x, mask, shift_mean)
    calls.clear()
    ours = verl.masked_whiten(x, mask, shift_mean)
    assert not calls
    close(ours, wanted, torch.float64, where=mask != 0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("valid", [0, 1])
def test_what_cannot_be_whitened_raises_as_theirs(valid):
    mask = torch.zeros(B, T)
    mask.view(-1)[:valid] = 1
    for call in (
        lambda: verl.masked_whiten(rand(B, T), mask),
        lambda: verl.compute_gae_advantage_return(rand(B, T), rand(B, T), mask, 1.0, 1.0),
    ):
        with pytest.raises(ValueError, match="mask"):
            call()


@pytest.mark.parametrize("mask", ["prefix", "holes", "integer", "floating"])
@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "reinforce_plus_plus_baseline"])
def test_groups(name, mask, calls):
    mask = MASKS[mask]
    rewards = rand(B, T, seed=3) + 2
    rewards[[3, 5]] = 0.7  # a group without variance
    original = theirs(core_algos.ADV_ESTIMATOR_REGISTRY[name].__name__)
    cases = [{}, {"norm_adv_by_std_in_grpo": False}, {"epsilon": 0.1}] if name == "grpo" else [{}]
    for options in cases:
        wanted = original(token_level_rewards=rewards.clone(), response_mask=mask, index=UIDS, **options)
        calls.clear()
        with verl.enabled():
            function = core_algos.ADV_ESTIMATOR_REGISTRY[name]
            assert function is getattr(core_algos, original.__name__, function)
            ours = function(token_level_rewards=rewards.clone(), response_mask=mask, index=UIDS, **options)
        assert not calls
        alone = torch.tensor([uid != "b" for uid in UIDS])  # theirs divides the one of its group by 1 + epsilon
        for x, y in zip(ours, wanted, strict=True):
            close(x[alone], y[alone])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(mask, gamma, calls):
    from verl.trainer.config import AlgoConfig

    mask, rewards, config = MASKS[mask].float(), rand(B, T, seed=3), AlgoConfig(gamma=gamma)
    wanted = theirs("compute_reinforce_plus_plus_outcome_advantage")(rewards, mask, config)
    calls.clear()
    ours = verl.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config=config, index=UIDS)
    assert not calls
    for x, y in zip(ours, wanted, strict=True):
        close(x, y)


# --- log-probs and entropies ------------------------------------------------------------------------------------------


def values_and_gradients(function, *leaves, seed=9):
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [rand(*x.shape, seed=seed + i).to(x.dtype) for i, x in enumerate(outputs)]
    torch.autograd.backward(outputs, cotangents)
    return *(x.detach() for x in outputs), *(x.grad for x in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(B, T), (B * T,)])
def test_log_probs(shape, dtype):
    logits, labels = rand(*shape, V, scale=4.0, dtype=dtype), torch.randint(V, shape)
    wanted = values_and_gradients(lambda x: theirs("logprobs_from_logits")(x, labels), logits)
    for x, y in zip(values_and_gradients(lambda x: verl.logprobs_from_logits(x, labels), logits), wanted, strict=True):
        close(x, y, dtype)
    sliced = rand(*shape, V + 3, scale=4.0, dtype=dtype)[..., 1:-2]
    close(verl.logprobs_from_logits(sliced, labels), theirs("logprobs_from_logits")(sliced, labels), dtype)


@pytest.mark.parametrize("inplace", [False, True])
def test_log_probs_as_with_flash_attention(inplace, monkeypatch):
    """float32 for bf16 logits, -100 ignored, the gradient written over the logits where that is asked for and possible."""
    monkeypatch.setattr(verl.functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    leaf = rand(B, V, dtype=torch.bfloat16).requires_grad_()
    labels = torch.tensor([3, -100, 0, V - 1, 5, 5])
    logits = leaf * 1.0
    log_prob = verl.logprobs_from_logits(logits, labels, inplace_backward=inplace)
    wanted = torch.log_softmax(logits.detach().float(), -1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    close(log_prob.detach(), torch.where(labels >= 0, wanted, 0.0))
    before = logits.detach().clone()
    log_prob.sum().backward()
    assert torch.equal(logits.detach(), before) != inplace
    assert not leaf.grad[1].any() and leaf.grad[0].any()
    verl.logprobs_from_logits(leaf, labels, inplace_backward=True).sum().backward()  # a leaf: not over it
    monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
    assert verl.logprobs_from_logits(leaf, labels.clamp(min=0)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropies(name, dtype):
    logits = rand(B * T, V, scale=3.0, dtype=dtype)
    wanted = values_and_gradients(theirs(name), logits)
    for x, y in zip(values_and_gradients(getattr(verl, name), logits), wanted, strict=True):
        close(x, y, dtype, **({"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}))
    logits[0, :5] = -torch.inf
    ours = getattr(verl, name)(logits)
    torch.testing.assert_close(ours[1:], theirs(name)(logits)[1:], rtol=5e-2, atol=5e-2)
    assert ours[0].isfinite() and theirs(name)(logits)[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("lead", [(B * T,), (B, T)])
def test_log_probs_of_hidden_states(lead, temperature, dtype):
    hidden, weight = rand(*lead, 16, dtype=dtype), rand(V, 16, seed=1, dtype=dtype)
    labels = torch.randint(V, lead)
    module = verl.fused_linear.FusedLinearForPPO(chunk_size=7)
    wanted = values_and_gradients(
        lambda h, w: theirs("fused_linear_forward")(module, h, w, labels, temperature), hidden, weight
    )
    with verl.enabled():
        ours = values_and_gradients(lambda h, w: module(h, w, labels, temperature=temperature), hidden, weight)
        flat = verl.kernel.linear_cross_entropy(hidden, weight, labels, temperature, "none")
    for x, y in zip(ours, wanted, strict=True):
        close(x, y, **({"rtol": 5e-2, "atol": 0.15} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}))
    for x, y in zip(flat, wanted, strict=False):
        close(x, y.flatten().float(), rtol=1e-4, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


def test_what_ours_cannot_do_is_theirs(calls, monkeypatch):
    class Wrapped(torch.Tensor):
        """As DTensor and nested tensors are."""

    verl.entropy_from_logits(rand(3, V).as_subclass(Wrapped))
    verl.logprobs_from_logits(rand(3, V).as_subclass(Wrapped), torch.zeros(3, dtype=torch.long))
    verl.masked_whiten(rand(B, T).requires_grad_(), PREFIX)
    verl.masked_whiten(rand(B, T).bfloat16(), PREFIX)
    verl.compute_gae_advantage_return(rand(B, T), rand(B, T), PREFIX.long(), 1.01, 1.0)
    verl.compute_value_loss(rand(B, T), rand(B, 1), rand(B, T), PREFIX, 0.5)
    assert calls == [
        "entropy_from_logits", "logprobs_from_logits", "masked_whiten", "masked_whiten", "compute_gae_advantage_return",
        "compute_value_loss",
    ]  # fmt: skip
    module = verl.fused_linear.FusedLinearForPPO()
    verl.fused_linear_forward(module, rand(B, 16), rand(V, 16), torch.zeros(B, dtype=torch.long), torch.tensor(1.0))
    assert calls[-1] == "fused_linear_forward"
    for group, reduction in [(object(), "none"), (None, "mean")]:
        arguments = rand(B, 16), rand(V, 16), torch.zeros(B, dtype=torch.long), 1.0, reduction, group
        monkeypatch.setattr(verl.theirs, "linear_cross_entropy", lambda *a: a)  # theirs is Triton, which is not here
        assert verl.linear_cross_entropy(*arguments) == arguments


# --- losses -----------------------------------------------------------------------------------------------------------

WHOLE = {
    "local": {},
    "global": {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 16},
    "scaled": {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": 64},
}
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]


def actor(whole="local", **changes):
    settings = {"clip_ratio": 0.1, "clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 1.3, **changes}
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(dro_beta=0.3),
        **settings,
    )
    config.global_batch_info.update(WHOLE[whole])
    return config


def streams(dtype=torch.float32):
    log_prob, old = rand(B, T, seed=1, scale=0.4) - 1.5, rand(B, T, seed=2, scale=0.4) - 1.5
    advantages = rand(B, T, seed=3, scale=1.5)
    advantages[0, :3], old[2, :2] = 0.0, log_prob[2, :2]  # ties
    old[3, 0], log_prob[3, 0], advantages[3, 0] = -30.0, -0.01, 1.0  # extreme ratios, clipped
    old[5, 0], log_prob[5, 0], advantages[5, 0] = -0.01, -30.0, -1.0
    return [x.to(dtype) for x in (old, log_prob, advantages)]


def same_loss(calls, mode, old, log_prob, advantages, mask, agg, config, weights=None, **tolerance):
    results = []
    for function in (theirs(f"compute_policy_loss_{mode}"), OURS[mode]):
        calls.clear()
        leaf = log_prob.detach().requires_grad_()
        loss, metrics = function(old, leaf, advantages, mask, agg, config, weights)
        (gradient,) = torch.autograd.grad(loss, leaf)
        results.append((loss.detach(), gradient, metrics))
    assert not calls
    (wanted, wanted_gradient, wanted_metrics), (loss, gradient, metrics) = results
    assert loss.dtype == torch.promote_types(log_prob.dtype, torch.float32)
    close(loss, wanted.to(loss.dtype), log_prob.dtype, **tolerance)
    close(gradient, wanted_gradient, log_prob.dtype, **tolerance)
    assert list(metrics) == list(wanted_metrics) and all(type(x) is float for x in metrics.values())
    for key, value in wanted_metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-7 if log_prob.dtype != torch.bfloat16 else 0.02), (
            key
        )
    return metrics


OURS = {mode: verl.policy_loss(mode) for mode in verl.POLICIES}


@pytest.mark.parametrize("mode", verl.POLICIES)
@pytest.mark.parametrize("whole", WHOLE)
def test_policy_losses(mode, whole, calls):
    config = actor(whole)
    for agg, mask, weighted in itertools.product(MODES, ["prefix", "integer", "floating"], [False, True]):
        if (mode, agg) == ("gspo", "token-sum"):
            continue
        weights = rand(B, T, seed=7).abs().float() if weighted else None
        if weights is not None:
            weights[0] = 0.0
        metrics = same_loss(calls, mode, *streams(), MASKS[mask], agg, config, weights, rtol=2e-4, atol=2e-5)
        if mode == "vanilla":
            assert 0 < metrics["actor/pg_clipfrac"] < 1 and 0 < metrics["actor/pg_clipfrac_lower"] < 1


@pytest.mark.parametrize("mode", verl.POLICIES)
def test_policy_losses_of_other_dtypes_and_strides(mode, calls):
    old, log_prob, advantages = (x.double() for x in streams())
    same_loss(calls, mode, old.T.contiguous().T, log_prob, advantages, HOLES, "token-mean", actor())
    half = [x.bfloat16() for x in (old, log_prob, advantages)]
    half[1] = half[0] + 0.25 * half[2].sign()  # exact in bf16: theirs rounds the ratio there
    same_loss(calls, mode, *half, HOLES, "token-mean", actor(), rtol=5e-2, atol=5e-2)
    loss, _ = OURS[mode](old.float(), log_prob.bfloat16(), advantages.float(), HOLES, "token-mean", actor())
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("mode", verl.POLICIES)
def test_policy_losses_read_nothing_that_is_masked(mode, calls):
    clean = same_loss(calls, mode, *streams(), PREFIX, "token-mean", actor(), rtol=2e-4, atol=2e-5)
    old, log_prob, advantages = (torch.where(PREFIX, x, torch.nan) for x in streams())
    log_prob.requires_grad_()
    loss, metrics = OURS[mode](old, log_prob, advantages, PREFIX, "token-mean", actor(), None)
    loss.backward()
    assert loss.isfinite() and metrics == clean and log_prob.grad.isfinite().all() and not log_prob.grad[~PREFIX].any()
    empty = torch.zeros(B, T, dtype=torch.bool)
    loss, metrics = OURS[mode](old, log_prob, advantages, empty, "token-mean", actor(), None)
    assert loss == 0 and set(metrics.values()) <= {0.0}


def test_policy_losses_raise_as_theirs():
    old, log_prob, advantages = streams()
    with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
        OURS["vanilla"](old, log_prob, advantages, PREFIX, "mean", actor())
    with pytest.raises(ValueError, match="batch_num_tokens is required"):
        config = actor()
        config.global_batch_info["dp_size"] = 2
        OURS["vanilla"](old, log_prob, advantages, PREFIX, "token-mean", config)
    with pytest.raises(AssertionError, match="clip_ratio_c"):
        OURS["vanilla"](old, log_prob, advantages, PREFIX, "token-mean", actor(clip_ratio_c=1.0))
    with pytest.raises(AssertionError):
        OURS["vanilla"](old, log_prob, advantages, PREFIX)


def test_statistics_cost_one_copy(monkeypatch):
    reads = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, _f=original, _n=name: reads.append(_n) or _f(x))
    OURS["vanilla"](*streams(), PREFIX, "token-mean", actor())
    assert reads == ["tolist"]
    reads.clear()
    theirs("compute_policy_loss_vanilla")(*streams(), PREFIX, "token-mean", actor())
    assert len(reads) == 3


@pytest.mark.parametrize("agg", MODES)
@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("mask", MASKS)
def test_value_loss(mask, whole, agg, calls):
    mask, whole = MASKS[mask], WHOLE[whole]
    values, returns, v = (rand(B, T, seed=i) for i in (1, 2, 3))
    values[0] = v[0]
    wanted_v, ours_v = v.clone().requires_grad_(), v.clone().requires_grad_()
    arguments = (returns, values, mask, 0.4, agg)
    wanted = theirs("compute_value_loss")(wanted_v, *arguments, **whole)
    calls.clear()
    ours = verl.compute_value_loss(ours_v, *arguments, **whole)
    assert not calls
    for x, y in zip(ours, wanted, strict=True):
        close(x.detach(), y.detach())
    ours[0].backward()
    wanted[0].backward()
    close(ours_v.grad, wanted_v.grad)


# --- put in place -----------------------------------------------------------------------------------------------------


def test_enable_reaches_those_who_have_a_function_by_name(monkeypatch):
    from verl.workers.utils import losses

    engine = types.ModuleType("verl.workers.engine.fsdp.transformer_impl")  # the real one needs a GPU's libraries
    engine.logprobs_from_logits = verl.functional.logprobs_from_logits
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    with verl.enabled():
        assert engine.logprobs_from_logits is verl.logprobs_from_logits
        assert losses.compute_value_loss is verl.compute_value_loss
        for mode in verl.POLICIES:
            assert core_algos.get_policy_loss_fn(mode) is getattr(core_algos, f"compute_policy_loss_{mode}")
            assert core_algos.get_policy_loss_fn(mode) is not theirs(f"compute_policy_loss_{mode}")
        assert core_algos.get_adv_estimator_fn("gae") is verl.compute_gae_advantage_return
    assert engine.logprobs_from_logits is theirs("logprobs_from_logits")
    assert core_algos.POLICY_LOSS_REGISTRY["vanilla"] is theirs("compute_policy_loss_vanilla")


def test_a_user_may_register_beside_ours():
    with verl.enabled():
        core_algos.register_policy_loss("mine")(mine := lambda *a: None)
        assert core_algos.get_policy_loss_fn("mine") is mine
    assert core_algos.POLICY_LOSS_REGISTRY.pop("mine") is mine
