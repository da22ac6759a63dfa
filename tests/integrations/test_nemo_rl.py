"""NeMo-RL: what is replaced, against its own. `PYTHONPATH=<a checkout of NeMo-RL>:tests/peers/stubs/nemo_rl:<what it needs>`."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

try:
    from ppo_fast.integrations import nemo_rl
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)
from nemo_rl.algorithms.advantage_estimator import GeneralizedAdvantageEstimator
from nemo_rl.algorithms.loss import prepare_loss_input
from nemo_rl.algorithms.loss.loss_functions import (
    ClippedPGLossConfig,
    ClippedPGLossFn,
    MseValueLossConfig,
    MseValueLossFn,
)
from nemo_rl.algorithms.loss.wrapper import SequencePackingLossWrapper
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

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


# --- policy loss --------------------------------------------------------------------------------------------------------

TIS = {"use_importance_sampling_correction": True, "truncated_importance_sampling_ratio": 1.3,
       "truncated_importance_sampling_ratio_min": 0.8}  # fmt: skip
SEQUENCES = {"sequence_level_importance_ratios": True, "token_level_loss": False}
POLICIES = {
    "grpo": {},
    "no_kl": {"reference_policy_kl_penalty": 0.0},
    "kl_in_reward": {"use_kl_in_reward": True},
    "dual_clip": {"ratio_clip_c": 1.5, "ratio_clip_max": 0.28},
    "sequence_means": {"token_level_loss": False},
    "k1": {"reference_policy_kl_type": "k1", "kl_input_clamp_value": None, "kl_output_clamp_value": None},
    "k2": {"reference_policy_kl_type": "k2", "kl_input_clamp_value": 1.0, "kl_output_clamp_value": 0.3},
    "kl_clamps": {"kl_input_clamp_value": 0.7, "kl_output_clamp_value": 0.1, "reference_policy_kl_penalty": 0.3},
    "on_policy_kl": {"use_on_policy_kl_approximation": True, "reference_policy_kl_penalty": 0.2},
    "forced": {"force_on_policy_ratio": True},
    "forced_sequences": {"force_on_policy_ratio": True, **SEQUENCES, "use_importance_sampling_correction": True},
    "reinforce": {"disable_ppo_ratio": True},
    "reinforce_sequences": {"disable_ppo_ratio": True, "token_level_loss": False, **TIS,
                            "truncated_importance_sampling_type": "tis"},
    "gspo": SEQUENCES,
    "gspo_corrected": {**SEQUENCES, "use_importance_sampling_correction": True},
    "gspo_tis": {**SEQUENCES, **TIS, "truncated_importance_sampling_type": "tis"},
    "gspo_icepop": {**SEQUENCES, **TIS, "truncated_importance_sampling_type": "icepop"},
    "cispo": {"use_cispo": True},
    "cispo_corrected": {"use_cispo": True, "use_importance_sampling_correction": True},
    "corrected": {"use_importance_sampling_correction": True},
    "tis": {**TIS, "truncated_importance_sampling_type": "tis"},
    "tis_without_minimum": {**TIS, "truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio_min": None},
    "icepop": {**TIS, "truncated_importance_sampling_type": "icepop"},
    "seq_mask_tis": {**TIS, "truncated_importance_sampling_type": "seq-mask-tis", "truncated_importance_sampling_ratio": 1.1},
    "vapo": {"positive_example_nll_weight": 0.4, "ratio_clip_c": 10.0},
}  # fmt: skip


def policy_data(mask=HOLES, dtype=torch.float32, scale=0.4, integers=False, **replaced):
    old = -rand(B, T, seed=1, dtype=dtype).abs()
    data = {
        "input_ids": torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0)),
        "token_mask": mask.long() if integers else mask.float(), "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]),
        "advantages": rand(B, T, seed=2, dtype=dtype), "prev_logprobs": old,
        "generation_logprobs": old + rand(B, T, seed=3, scale=scale, dtype=dtype),
        "reference_policy_logprobs": old + rand(B, T, seed=4, scale=scale, dtype=dtype), "rewards": rand(B, seed=9), **replaced,
    }  # fmt: skip
    if integers:
        data["sample_mask"] = data["sample_mask"].long()
    return BatchedDataDict(data)


def current(data, scale=0.4):
    return (
        data["prev_logprobs"][:, 1:] + rand(B, T - 1, seed=5, scale=scale, dtype=data["prev_logprobs"].dtype)
    ).detach()


def call(function, settings, data, x, seqs=9.0, toks=57.0):
    """Loss, its gradients in the log-probs and in the unfiltered ones, and the metrics."""
    fn, x, data = (
        ClippedPGLossFn(ClippedPGLossConfig(**settings)),
        x.clone().requires_grad_(),
        BatchedDataDict({**data}),
    )
    unfiltered = data.get("curr_logprobs_unfiltered")
    if unfiltered is not None:
        unfiltered = data["curr_logprobs_unfiltered"] = unfiltered.clone().requires_grad_()
    loss, metrics = function(fn, x, data, torch.tensor(seqs), torch.tensor(toks))
    (3.0 * loss).backward()
    return loss.detach(), x.grad, None if unfiltered is None else unfiltered.grad, metrics


def same_metrics(ours, theirs, rel=1e-4, abs=2e-6):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert type(ours[key]) is type(value), key
        assert ours[key] == pytest.approx(value, rel=rel, abs=abs, nan_ok=True), key


def same(settings, data, x, **counts):
    loss, gradient, unfiltered, metrics = call(nemo_rl.policy_loss, settings, data, x, **counts)
    wanted = call(nemo_rl.theirs.policy_loss, settings, data, x, **counts)
    close(loss, wanted[0])
    close(gradient, wanted[1], rtol=2e-5, atol=1e-7)
    if unfiltered is not None:
        close(unfiltered, wanted[2], rtol=2e-5, atol=1e-7)
    same_metrics(metrics, wanted[3])
    assert set(metrics) == set(ClippedPGLossFn(ClippedPGLossConfig(**settings)).metric_normalizations)


@pytest.fixture
def ours_only(monkeypatch):
    """Reads that wait for a device, of ours; theirs may not be asked by it."""
    reads = []

    def run(*arguments, **counts):
        with monkeypatch.context() as m:
            m.setattr(nemo_rl.theirs, "policy_loss", None)
            m.setattr(nemo_rl.theirs, "packing", None)
            for name in ("item", "tolist", "__float__", "__int__", "__bool__", "nonzero", "cpu", "numpy"):
                original = getattr(torch.Tensor, name)
                m.setattr(torch.Tensor, name, lambda x, *a, _f=original, _n=name: reads.append(_n) or _f(x, *a))
            reads.clear()
            fn = ClippedPGLossFn(ClippedPGLossConfig(**arguments[0]))
            nemo_rl.policy_loss(fn, arguments[2], arguments[1], torch.tensor(9.0), torch.tensor(57.0))
            return list(reads)

    return run


@pytest.mark.parametrize("mask", ["prefix", "holes", "integer"])
@pytest.mark.parametrize("settings", POLICIES)
def test_policy_loss(settings, mask, ours_only):
    settings, data = POLICIES[settings], policy_data(MASKS[mask] != 0, integers=mask == "integer")
    assert ours_only(settings, data, current(data)) == ["tolist"]
    same(settings, data, current(data))


@pytest.mark.parametrize("settings", POLICIES)
def test_policy_loss_in_double_and_far_off_policy(settings):
    data = policy_data(dtype=torch.float64, scale=3.0)
    same(POLICIES[settings], data, current(data, scale=3.0))


@pytest.mark.parametrize("settings", ["grpo", "on_policy_kl", "gspo", "k2", "no_kl"])
def test_policy_loss_with_unfiltered_log_probs(settings, ours_only):
    data = policy_data(curr_logprobs_unfiltered=-rand(B, T - 1, seed=7).abs())
    if settings != "no_kl":
        assert ours_only(POLICIES[settings], data, current(data)) == ["tolist"]
        return same(POLICIES[settings], data, current(data))
    loss, *_ = call(
        nemo_rl.policy_loss, POLICIES[settings], {k: v for k, v in data.items() if "unf" not in k}, current(data)
    )
    close(loss, call(nemo_rl.theirs.policy_loss, POLICIES[settings], {k: v for k, v in data.items() if "unf" not in k},
                     current(data))[0])  # fmt: skip


@pytest.mark.parametrize("settings", POLICIES)
def test_policy_loss_at_the_edges(settings):
    """On policy: every ratio 1, every clamp and every tie at once; advantages of 0; and bounds that are met exactly."""
    data = policy_data(reference_policy_logprobs=torch.full((B, T), -1.0), prev_logprobs=torch.full((B, T), -1.0),
                       generation_logprobs=torch.full((B, T), -1.0))  # fmt: skip
    data["advantages"][:, ::3] = 0.0
    x = torch.full((B, T - 1), -1.0)
    same(POLICIES[settings], data, x)
    same({**POLICIES[settings], "ratio_clip_min": 0.0, "ratio_clip_max": 0.0}, data, x)


@pytest.mark.parametrize("settings", POLICIES)
def test_policy_loss_of_nothing(settings):
    for data in (policy_data(torch.zeros_like(HOLES)), policy_data(sample_mask=torch.zeros(B), integers=True),
                 policy_data(sample_mask=torch.zeros(B))):  # fmt: skip
        same(POLICIES[settings], data, current(data), seqs=0.0, toks=0.0)


@pytest.mark.parametrize("settings", POLICIES)
def test_policy_loss_does_not_read_what_is_masked(settings):
    data = policy_data()
    masked = (data["token_mask"] * data["sample_mask"][:, None]) == 0
    x = current(data)
    loss, gradient, _, metrics = call(nemo_rl.policy_loss, POLICIES[settings], data, x)
    for key in ("advantages", "prev_logprobs", "generation_logprobs", "reference_policy_logprobs"):
        data[key] = data[key].masked_fill(masked, torch.nan)
    again = call(nemo_rl.policy_loss, POLICIES[settings], data, x.masked_fill(masked[:, 1:], torch.nan))
    assert torch.equal(loss, again[0]) and torch.equal(gradient, again[1]) and metrics == again[3]
    assert not gradient[masked[:, 1:]].any()


def test_policy_loss_of_an_engine_that_is_far_away():
    """exp(prev - gen) overflows at one token, and is 0 at another: theirs makes 0 of both; values, not theirs' NaN gradients."""
    data = policy_data(PREFIX)
    data["generation_logprobs"][0, 3], data["generation_logprobs"][0, 5] = -200.0, 200.0
    data["generation_logprobs"][3, 2] = -torch.inf
    for settings in ("corrected", "tis", "icepop", "seq_mask_tis", "gspo_corrected", "gspo_icepop", "on_policy_kl"):
        loss, gradient, _, metrics = call(nemo_rl.policy_loss, POLICIES[settings], data, current(data))
        wanted = call(nemo_rl.theirs.policy_loss, POLICIES[settings], data, current(data))
        assert loss.isfinite() and gradient.isfinite().all()
        close(loss, wanted[0])
        finite = wanted[1].isfinite()
        close(gradient, wanted[1], where=finite, rtol=2e-5, atol=1e-7)
        assert finite.sum() >= finite.numel() - 2
        for each in (metrics, wanted[3]):  # the sum of a few e^200
            assert each.pop("js_divergence_error") != 0.0
        same_metrics(metrics, wanted[3])


def test_policy_losses_that_are_theirs(calls):
    data = policy_data()
    x = current(data)
    half = {k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in data.items()}

    def of(data=data, x=x, settings=None, **attributes):
        fn = ClippedPGLossFn(ClippedPGLossConfig(**(settings or {})))
        vars(fn).update(attributes)
        calls.clear()
        try:
            nemo_rl.policy_loss(fn, x, data, torch.tensor(9.0), torch.tensor(57.0))
        except (AssertionError, ValueError) as error:
            return type(error)
        finally:
            assert calls == ["policy_loss"]

    of(half, x.bfloat16())
    of(settings={"disable_ppo_ratio": True, "ratio_clip_c": 3.0})
    of(a_setting_of_later=True)
    of(policy_data(prev_logprobs=data["prev_logprobs"].clone().requires_grad_()))
    assert of(settings={"ratio_clip_c": 0.5}) is AssertionError
    assert of(settings={"reference_policy_kl_type": "k4"}) is ValueError
    assert of(truncated_importance_sampling_ratio=2.0) is ValueError
    of(settings={"ratio_clip_min": -0.1})


# --- sequence packing ---------------------------------------------------------------------------------------------------


def packed(data, lengths, padded=None):
    """Wrapper arguments: borders of sequences in one row, of what is in them and of what they take."""
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return borders, borders if padded is None else torch.tensor([0, *padded]).cumsum(0).int()


LENGTHS = (11, 4, 2, 7, 9)


@pytest.mark.parametrize("padded", [None, (12, 4, 4, 8, 14)])
@pytest.mark.parametrize("settings", sorted(POLICIES))
def test_sequence_packing(settings, padded, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    data = policy_data(PREFIX)
    data["token_mask"][3, 9] = 1.0  # beyond its length: not a token
    sampling = nemo_rl.model_utils.TrainingSamplingParams(top_k=None, top_p=1.0, temperature=1.0)
    prepare, results, called = functools.partial(prepare_loss_input, sampling_params=sampling), [], []
    clipped = nemo_rl._clipped
    monkeypatch.setattr(nemo_rl, "_clipped", lambda *a, **k: called.append(0) or clipped(*a, **k))
    for enabled in (False, True):
        logits = rand(1, sum(padded or LENGTHS), V, seed=3, scale=2.0).requires_grad_()
        fn = ClippedPGLossFn(ClippedPGLossConfig(**POLICIES[settings]))
        wrapper = SequencePackingLossWrapper(fn, prepare, *packed(data, LENGTHS, padded))
        with nemo_rl.enabled() if enabled else nullcontext():
            called.clear()
            loss, metrics = wrapper(logits, data, torch.tensor(9.0), torch.tensor(57.0))
        loss.backward()
        results.append((loss.detach(), logits.grad, metrics))
    (wanted, wanted_gradient, wanted_metrics), (loss, gradient, metrics) = results
    assert len(called) == (len(LENGTHS) if settings == "vapo" else 1)
    close(loss, wanted)
    close(gradient, wanted_gradient, rtol=5e-5, atol=1e-7)
    same_metrics(metrics, wanted_metrics)


def test_sequence_packing_of_empty_sequences(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    for mask in (HOLES, torch.zeros_like(HOLES)):
        data = policy_data(mask, integers=True)
        logits = rand(1, sum(LENGTHS), V, seed=3).requires_grad_()
        wrapper = SequencePackingLossWrapper(
            ClippedPGLossFn(ClippedPGLossConfig()), prepare_loss_input, *packed(data, LENGTHS)
        )
        arguments = logits, data, torch.tensor(9.0), torch.tensor(57.0)
        wanted, wanted_metrics = wrapper(*arguments)
        with nemo_rl.enabled():
            loss, metrics = wrapper(*arguments)
        close(loss.detach(), wanted.detach())
        same_metrics(metrics, wanted_metrics)


def test_sequence_packing_that_is_theirs(monkeypatch):
    monkeypatch.setattr(nemo_rl.theirs, "packing", lambda *a: "theirs")
    data, logits = policy_data(), rand(1, sum(LENGTHS), V)
    borders = packed(data, LENGTHS)
    fused = ClippedPGLossFn(ClippedPGLossConfig(), use_fused_linear_logprobs=True)
    filtering = nemo_rl.model_utils.TrainingSamplingParams(top_k=3, top_p=1.0, temperature=1.0)
    plain = ClippedPGLossFn(ClippedPGLossConfig())
    for wrapper in (
        SequencePackingLossWrapper(fused, prepare_loss_input, *borders),
        SequencePackingLossWrapper(plain, lambda **k: None, *borders),
        SequencePackingLossWrapper(plain, functools.partial(prepare_loss_input, sampling_params=filtering), *borders),
        SequencePackingLossWrapper(plain, prepare_loss_input, *borders, 0, object()),
        SequencePackingLossWrapper(
            MseValueLossFn(MseValueLossConfig(scale=1.0, cliprange=None)), prepare_loss_input, *borders
        ),
        SequencePackingLossWrapper(plain, prepare_loss_input, borders[0][:-1]),
    ):
        with nemo_rl.enabled():
            assert wrapper(logits, data, torch.tensor(1.0), torch.tensor(1.0)) == "theirs"


# --- log-probs, and what is theirs --------------------------------------------------------------------------------------


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
        assert MseValueLossFn.__call__ is nemo_rl.value_loss and ClippedPGLossFn.__call__ is nemo_rl.policy_loss
        assert SequencePackingLossWrapper.__call__ is nemo_rl.packed_loss
    assert utils.get_next_token_logprobs_from_logits is nemo_rl.theirs.log_probs
