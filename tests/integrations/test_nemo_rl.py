"""NeMo-RL: what is replaced, against its own. `PYTHONPATH=<a checkout of NeMo-RL>:tests/peers/stubs/nemo_rl:<what it needs>`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

try:
    from ppo_fast.integrations import nemo_rl
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
from nemo_rl.algorithms.advantage_estimator import GeneralizedAdvantageEstimator
from nemo_rl.algorithms.loss.loss_functions import MseValueLossConfig, MseValueLossFn

B, T, V = 5, 11, 23
PREFIX = torch.arange(T) < torch.tensor([11, 4, 1, 7, 9])[:, None]
HOLES = PREFIX & (torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.7)
MASKS = {"prefix": PREFIX.float(), "holes": HOLES.float(), "integer": HOLES.long()}


def rand(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    called = []
    for name, function in list(vars(nemo_rl.theirs).items()):
        monkeypatch.setattr(nemo_rl.theirs, name, lambda *a, _f=function, _n=name: called.append(_n) or _f(*a))
    return called


def close(ours, theirs, where=None, **tolerance):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if where is not None:
        ours, theirs = ours[where], theirs[where]
    torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 2e-5, "atol": 5e-6}))


def estimator(**settings):
    config = {"gae_lambda": 0.9, "gae_gamma": 0.97, "normalize_advantages": True, "length_adaptive_alpha": 0.0,
              "gae_lambda_value": None, "gae_lambda_policy": None, **settings}  # fmt: skip
    loss = SimpleNamespace(use_kl_in_reward=True, reference_policy_kl_penalty=0.1, reference_policy_kl_type="k3")
    return GeneralizedAdvantageEstimator(config, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("settings", [{}, {"normalize_advantages": False}, {"gae_lambda_value": 1.0, "gae_lambda_policy": 0.8},
                                      {"length_adaptive_alpha": 0.3}, {"gae_gamma": 1.0, "gae_lambda": 1.0}])  # fmt: skip
def test_advantages(settings, mask, dtype, calls):
    if dtype == torch.float64 and "length_adaptive_alpha" in settings:
        pytest.skip("theirs mixes dtypes")
    mask = MASKS[mask]
    arguments = {
        "prompt_ids": None, "rewards": rand(B, dtype=dtype), "mask": mask, "values": rand(T, B, seed=1, dtype=dtype).T,
        "reference_logprobs": rand(B, T, seed=2, dtype=dtype), "logprobs": rand(B, T, seed=3, dtype=dtype),
    }  # fmt: skip
    wanted = estimator(**settings).compute_advantage(**arguments)
    calls.clear()
    with nemo_rl.enabled():
        advantages, returns = estimator(**settings).compute_advantage(**arguments)
    assert not calls
    close(advantages, wanted[0])  # theirs are 0 where masked, too
    close(returns, wanted[1], where=mask != 0)


@pytest.mark.parametrize("shift_mean", [False, True])
def test_whiten(shift_mean):
    x = rand(B, T) + 3
    wanted = nemo_rl.theirs.reward_whiten(None, x, HOLES.float(), shift_mean)
    close(nemo_rl.reward_whiten(None, x, HOLES.float(), shift_mean), wanted, where=HOLES)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("trailing", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
def test_value_loss(trailing, dtype, mask, clip, calls):
    data = {"token_mask": MASKS[mask], "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]),
            "returns": rand(B, T, seed=1), "values": rand(B, T, seed=2)}  # fmt: skip
    results = []
    for enabled in (False, True):
        values = rand(B, T, 1, seed=3).to(dtype)
        values = (values if trailing else values[..., 0]).requires_grad_()
        function = MseValueLossFn(MseValueLossConfig(scale=0.4, cliprange=clip))
        calls.clear()
        call = nemo_rl.value_loss if enabled else nemo_rl.theirs.value_loss
        loss, metrics = call(function, values, data, torch.tensor(9.0), torch.tensor(57.0))
        loss.backward()
        results.append((loss.detach(), values.grad, metrics))
    assert not calls
    (wanted, wanted_gradient, wanted_metrics), (loss, gradient, metrics) = results
    close(loss, wanted, rtol=1e-5, atol=1e-6)
    close(gradient, wanted_gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert list(metrics) == list(wanted_metrics)
    for key, value in wanted_metrics.items():
        assert type(metrics[key]) is type(value) and metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_value_loss_of_nothing_and_of_masked_nan(monkeypatch):
    function = MseValueLossFn(MseValueLossConfig(scale=1.0, cliprange=0.2))
    nan = torch.full((B, T), torch.nan)
    values = torch.where(PREFIX, rand(B, T), nan).requires_grad_()
    data = {"token_mask": PREFIX.float(), "sample_mask": torch.ones(B), "returns": torch.where(PREFIX, rand(B, T, seed=1), nan),
            "values": torch.where(PREFIX, rand(B, T, seed=2), nan)}  # fmt: skip
    reads = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, _f=original, _n=name: reads.append(_n) or _f(x))
    loss, metrics = nemo_rl.value_loss(function, values, data, torch.tensor(5.0), PREFIX.sum())
    assert reads == ["tolist"]
    loss.backward()
    assert loss.isfinite() and values.grad.isfinite().all() and all(x == x for x in metrics.values())
    data["sample_mask"] = torch.zeros(B)
    loss, metrics = nemo_rl.value_loss(function, values, data, torch.tensor(0.0), torch.tensor(0.0))
    assert loss == 0 and all(x == 0.0 for key, x in metrics.items() if key != "num_valid_samples")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs(dtype, monkeypatch, calls):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)  # theirs moves tokens there
    ids, results = torch.randint(V, (B, T)), []
    for function in (nemo_rl.theirs.log_probs, nemo_rl.get_next_token_logprobs_from_logits):
        calls.clear()
        logits = rand(B, T, V, scale=3.0, dtype=dtype).requires_grad_()
        log_prob = function(ids, logits)
        (log_prob * rand(B, T - 1, seed=1)).sum().backward()
        results.append((log_prob.detach(), logits.grad))
    assert not calls
    for x, y in zip(results[1], results[0], strict=True):
        close(x, y, **({"rtol": 1e-2, "atol": 1e-3} if x.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}))


def test_what_ours_cannot_do_is_theirs(calls, monkeypatch):
    mask = torch.ones(B, T)
    nemo_rl.compute_gae(estimator(gae_gamma=1.01), rand(B, T), rand(B, T), mask)
    nemo_rl.compute_gae(estimator(), rand(B, T).bfloat16(), rand(B, T).bfloat16(), mask)
    nemo_rl.reward_whiten(None, rand(B, T).requires_grad_(), mask)
    assert calls == ["compute_gae", "compute_gae", "reward_whiten"]
    monkeypatch.setattr(nemo_rl.theirs, "log_probs", lambda *a: "theirs")
    ids, logits = torch.randint(V, (B, T)), rand(B, T, V)
    sampling = nemo_rl.model_utils.TrainingSamplingParams(top_k=3, top_p=1.0, temperature=1.0)
    assert nemo_rl.get_next_token_logprobs_from_logits(ids, logits, None, 0, object()) == "theirs"
    assert nemo_rl.get_next_token_logprobs_from_logits(ids, logits, sampling_params=sampling) == "theirs"


def test_enable_reaches_the_importer():
    from nemo_rl.algorithms.loss import utils

    with nemo_rl.enabled():
        assert utils.get_next_token_logprobs_from_logits is nemo_rl.get_next_token_logprobs_from_logits
        assert MseValueLossFn.__call__ is nemo_rl.value_loss
    assert utils.get_next_token_logprobs_from_logits is nemo_rl.theirs.log_probs
