"""LossConfig: what it refuses and how it says so, what travels to C++, and the presets."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from conftest import same_bits
from hypothesis import given
from hypothesis import strategies as st

import ppo_fast as pf
from ppo_fast import _C
from ppo_fast.config import (
    CHOICES,
    NUMBERS,
    POLICIES,
    PRESETS,
    REDUCTIONS,
    SEQUENCE_NUMBERS,
    SEQUENCE_POLICIES,
    STATS,
    TOKEN_POLICIES,
)  # fmt: skip

OPTIONAL = {"dual_clip", "ratio_cap", "log_ratio_clamp", "value_clip", "kl_clamp", "kl_value_clamp"}
FIELDS = {f.name for f in dataclasses.fields(pf.LossConfig)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "trpo"}, r"LossConfig: policy must be one of \('ppo',.*\), got 'trpo'"),
        ({"reduction": "mean"}, r"LossConfig: reduction must be one of \('token-mean', .*\), got 'mean'"),
        ({"value_loss": "l1"}, r"LossConfig: value_loss must be one of \('mse', 'huber'\), got 'l1'"),
        ({"value_clip_mode": "min"}, r"LossConfig: value_clip_mode must be one of .*, got 'min'"),
        ({"kl": "k4"}, r"LossConfig: kl must be one of \(None, 'k1', 'abs', 'k2', 'k3'\), got 'k4'"),
        ({"advantage_ddof": 2}, r"LossConfig: advantage_ddof must be one of \(0, 1\), got 2"),
        ({"rollout_correction": "vtrace"}, r"LossConfig: rollout_correction must be one of .*, got 'vtrace'"),
        ({"clip_low": -0.1}, r"LossConfig: clip_low must be >= 0, got -0.1"),
        ({"clip_high": math.inf}, r"LossConfig: clip_high must be finite, got inf"),
        ({"value_clip": math.nan}, r"LossConfig: value_clip must be finite, got nan"),
        ({"kl_clamp": -1.0}, r"LossConfig: kl_clamp must be >= 0, got -1.0"),
        ({"dual_clip": 1.0}, r"LossConfig: dual_clip must be > 1, got 1.0"),
        ({"huber_delta": 0.0}, r"LossConfig: huber_delta must be > 0, got 0.0"),
        ({"sapo_tau_positive": 0.0}, r"LossConfig: sapo_tau_positive must be > 0, got 0.0"),
        ({"dro_beta": -1.0}, r"LossConfig: dro_beta must be >= 0, got -1.0"),
        ({"cov_ratio": math.nan}, r"LossConfig: cov_ratio must be finite, got nan"),
        ({"kl_gradient": "k3"}, r"LossConfig: kl_gradient must be one of \(None, 'k2'\), got 'k3'"),
        ({"kl_weight": "r"}, r"LossConfig: kl_weight must be one of \(None, 'ratio', 'score'\), got 'r'"),
        ({"kl_weight": "ratio", "kl_gradient": "k2"}, "LossConfig: kl_gradient and kl_weight must not both be given"),
        ({"rollout_low": 3.0}, r"LossConfig: rollout_low must be <= rollout_high, got 3.0 > 2.0"),
    ],
)
def test_refuses_values(fields, message):
    with pytest.raises(ValueError, match=message):
        pf.LossConfig(**fields)


@pytest.mark.parametrize("value", ["0.2", True, [0.2], torch.tensor(0.2)])
def test_refuses_types(value):
    with pytest.raises(TypeError, match=r"LossConfig: clip_low must be a number, got (str|bool|list|Tensor)"):
        pf.LossConfig(clip_low=value)


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - OPTIONAL))
def test_none_only_where_something_can_be_off(name):
    with pytest.raises(TypeError, match=f"LossConfig: {name} must be a number, got NoneType"):
        pf.LossConfig(**{name: None})


def test_coefficients_may_be_negative():
    assert pf.LossConfig(entropy_coef=-0.1, value_coef=-1.0, kl_coef=-0.5).entropy_coef == -0.1


def test_unknown_field():
    with pytest.raises(TypeError, match="clip"):
        pf.LossConfig(clip=0.2)


def test_frozen_and_replace():
    config = pf.LossConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.clip_low = 0.1
    annealed = dataclasses.replace(config, clip_low=0.1)
    assert (config.clip_low, annealed.clip_low, annealed.clip_high) == (0.2, 0.1, 0.2)
    with pytest.raises(ValueError, match="clip_low must be >= 0"):
        dataclasses.replace(config, clip_low=-1.0)


def test_equal_configs_are_one_key():
    assert pf.LossConfig() == pf.LossConfig() and hash(pf.LossConfig()) == hash(pf.LossConfig())
    assert pf.LossConfig(clip_low=0.1) != pf.LossConfig()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies(again):
    config = pf.LossConfig.preset("verl", kl="k3", kl_coef=0.001)
    assert again(config) == config
    assert again(config).numbers() == pytest.approx(config.numbers(), nan_ok=True)


# --- what travels to C++ ----------------------------------------------------------------------------------------------


def test_every_field_travels():
    assert set(NUMBERS) | set(CHOICES) | set(SEQUENCE_NUMBERS) | {"reduction"} == FIELDS
    assert len(NUMBERS) + len(CHOICES) + len(SEQUENCE_NUMBERS) + 1 == len(FIELDS)


def test_a_sequence_policy_travels_as_the_token_policy_made_of_it():
    assert set(SEQUENCE_POLICIES.values()) <= set(TOKEN_POLICIES) and set(POLICIES) == {
        *TOKEN_POLICIES,
        *SEQUENCE_POLICIES,
    }
    for policy, token in SEQUENCE_POLICIES.items():
        config = pf.LossConfig(policy=policy, kl="k3", kl_coef=0.1, normalize_advantages=True, clip_low=0.3)
        main, kl = config.forms
        assert pf.LossConfig.unpacked(config.numbers(), config.choices()).policy == token
        assert (main.policy, main.kl, main.normalize_advantages, main.clip_low) == (token, None, False, 0.3)
        assert (kl.policy, kl.kl, kl.kl_coef) == ("reinforce", "k3", 0.1)
        assert copy.deepcopy(config) == config and pickle.loads(pickle.dumps(config)).forms == config.forms
    assert pf.LossConfig().forms == ()


numbers = st.floats(1.5, 100.0, width=32)
configs = st.fixed_dictionaries(
    {
        **{name: st.none() | numbers if name in OPTIONAL else numbers for name in NUMBERS if "rollout" not in name},
        **{name: st.sampled_from(allowed) for name, allowed in CHOICES.items()},
        "kl_weight": st.none(),
    }
).map(lambda fields: pf.LossConfig(**fields))


@given(configs)
def test_round_trip(config):
    assert len(config.numbers()) == len(NUMBERS) and len(config.choices()) == len(CHOICES)
    assert all(isinstance(x, int) and 0 <= x < len(a) for x, a in zip(config.choices(), CHOICES.values(), strict=True))
    assert pf.LossConfig.unpacked(config.numbers(), config.choices()) == config


def test_off_travels_as_nan():
    config = pf.LossConfig()
    off = {name for name, x in zip(NUMBERS, config.numbers(), strict=True) if math.isnan(x)}
    assert off == OPTIONAL


def test_both_halves_have_the_same_statistics():
    assert _C.STATS == STATS
    assert tuple(pf.ppo_loss(*torch.zeros(3, 4)).stats.to_dict()) == STATS


def test_both_halves_count_the_same_fields():
    config = pf.LossConfig()
    _C.LossParams(config.numbers(), config.choices())
    for wrong in (config.numbers()[1:], (*config.numbers(), 0.0)):
        with pytest.raises(ValueError, match="Python and C\\+\\+ halves differ"):
            _C.LossParams(wrong, config.choices())
    with pytest.raises(ValueError, match="halves differ"):
        _C.LossParams(config.numbers(), config.choices()[1:])


def _call(config, double=True):
    """Every input that any config may ask for, with values that every branch treats differently: loss, statistics,
    gradient of the log-probs."""
    torch.manual_seed(1)
    dtype = torch.float64 if double else torch.float32
    log_prob, old, advantages, values, old_values, returns, ref, rollout = torch.randn(8, 5, 7, dtype=dtype)
    log_prob.requires_grad_()
    out = pf.ppo_loss(
        log_prob, old, advantages * 3, config, values=values, old_values=old_values, returns=returns * 2,
        entropy=old.abs(), ref_log_prob=ref * 2, rollout_log_prob=rollout,
    )  # fmt: skip
    return [out.loss.detach(), out.stats.vector, *torch.autograd.grad(out.loss, log_prob)]


BASE = {"kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.1, "rollout_correction": "icepop", "value_loss": "huber",
        "normalize_advantages": True, "value_clip": 0.3, "clip_low": 0.1, "dual_clip": 3.0, "ratio_cap": 4.0,
        "log_ratio_clamp": 2.5, "kl_clamp": 3.0, "kl_value_clamp": 4.0}  # fmt: skip
CHANGED = {"clip_low": 0.5, "clip_high": 0.9, "dual_clip": 1.1, "ratio_cap": 1.5, "log_ratio_clamp": 0.2,
           "huber_delta": 0.2, "value_clip": 0.05, "value_coef": 0.7, "entropy_coef": 0.2, "kl_coef": 0.4,
           "kl_clamp": 0.5, "kl_value_clamp": 0.1, "advantage_eps": 0.3, "rollout_low": 1.0, "rollout_high": 1.2,
           "value_loss": "mse", "value_half": False, "value_clip_mode": "replace", "kl": "k2",
           "normalize_advantages": False, "advantage_ddof": 0, "rollout_correction": "tis", "policy": "cispo",
           "kl_gradient": "k2", "kl_weight": "ratio", "sapo_tau_positive": 0.3, "sapo_tau_negative": 2.0,
           "dro_beta": 0.2}  # fmt: skip


@pytest.mark.parametrize("name", [*NUMBERS, *CHOICES])
def test_every_field_arrives_where_it_belongs(name):
    """Changing one field changes the kernel's loss, and to what the reference says: a swap in the order would show."""
    base = {**BASE, "policy": {"sapo": "sapo", "dro_": "dro"}.get(name[:4], "ppo")}
    before, after = pf.LossConfig(**base), pf.LossConfig(**{**base, name: CHANGED[name]})
    out = _call(after)
    assert not same_bits(out, _call(before))
    with pf.use_backend("reference"):
        truth = _call(after)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)


# --- presets ----------------------------------------------------------------------------------------------------------


def test_presets_are_those_of_the_contract():
    names = "cleanrl sb3 rsl_rl skrl torchrl rllib verl trl_ppo trl_grpo openrlhf nemo_rl slime"
    assert set(names.split()) <= set(PRESETS)
    assert all(preset.reduction in REDUCTIONS for preset in PRESETS.values())


def test_preset_with_changes():
    assert pf.LossConfig.preset("cleanrl") == PRESETS["cleanrl"]
    assert pf.LossConfig.preset("cleanrl", clip_low=0.1).clip_low == 0.1
    assert PRESETS["cleanrl"].clip_low == 0.2


def test_preset_errors():
    with pytest.raises(ValueError, match=r"LossConfig.preset: name must be one of \['cleanrl', .*\], got 'ppo'"):
        pf.LossConfig.preset("ppo")
    with pytest.raises(TypeError, match="unexpected keyword"):
        pf.LossConfig.preset("cleanrl", clip=0.1)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_run(name):
    assert _call(pf.LossConfig.preset(name), double=False)[0].isfinite()


def _control(new, old, adv, v, v_old, ret, h, *, clip, value, entropy_coef, value_coef):
    ratio = (new - old).exp()
    policy = torch.max(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)).mean()
    return policy + value_coef * value(v, v_old, ret) - entropy_coef * h.mean()


def _max_clip(v, v_old, ret, c=0.2):
    return torch.max((v - ret).square(), (v_old + (v - v_old).clamp(-c, c) - ret).square()).mean()


def _whitened(a):
    return (a - a.mean()) / (a.std() + 1e-8)


#: The losses of control trainers, written out as their sources have them.
TRAINERS = {
    "cleanrl": (_whitened, {"clip": 0.2, "value": lambda *x: 0.5 * _max_clip(*x), "entropy_coef": 0.01, "value_coef": 0.5}),
    "sb3": (_whitened, {"clip": 0.2, "value": lambda v, o, r: torch.nn.functional.mse_loss(r, v), "entropy_coef": 0.0,
                        "value_coef": 0.5}),
    "rsl_rl": (None, {"clip": 0.2, "value": _max_clip, "entropy_coef": 0.01, "value_coef": 1.0}),
    "skrl": (None, {"clip": 0.2, "value": lambda v, o, r: torch.nn.functional.mse_loss(r, o + (v - o).clip(-0.2, 0.2)),
                    "entropy_coef": 0.0, "value_coef": 2.5}),
    "torchrl": (None, {"clip": 0.2, "value": lambda v, o, r: torch.nn.functional.smooth_l1_loss(r, v),
                       "entropy_coef": 0.01, "value_coef": 1.0}),
    "rllib": (None, {"clip": 0.3, "value": lambda v, o, r: (v - r).square().clamp(0, 10.0).mean(), "entropy_coef": 0.0,
                     "value_coef": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TRAINERS))
def test_control_presets_against_their_formula(name):
    prepare, rest = TRAINERS[name]
    streams = torch.randn(7, 64, dtype=torch.float64)
    new, old, adv, v, v_old, ret, h = streams
    leaves = [x.clone().requires_grad_() for x in (new, v, h)]
    other = [x.clone().requires_grad_() for x in (new, v, h)]
    ret = ret * 4
    out = pf.ppo_loss(
        leaves[0],
        old,
        adv,
        pf.LossConfig.preset(name),
        values=leaves[1],
        old_values=v_old,
        returns=ret,
        entropy=leaves[2],
    )
    truth = _control(other[0], old, prepare(adv) if prepare else adv, other[1], v_old, ret, other[2], **rest)
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=1e-12)
    out.loss.backward()
    truth.backward()
    for mine, theirs in zip(leaves, other, strict=True):
        expected = torch.zeros_like(mine) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(mine.grad, expected, rtol=1e-12, atol=1e-14)
