"""`LossConfig.on`: numbers that are set in place count in the next call, on every backend, as a new config's would."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import pickle
import types

import pytest
import torch
from conftest import same_bits

import ppo_fast as pf
from ppo_fast._backend import Backend
from ppo_fast.config import NUMBERS, DeviceLossConfig
from ppo_fast.ops._loss import packed

BACKENDS = [contextlib.nullcontext, lambda: pf.use_backend("reference")]
BASE = pf.LossConfig.preset("cleanrl", kl="k3", kl_coef=0.1, dual_clip=3.0)


def loss_of(config):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5, generator=g).requires_grad_()
    values = torch.randn(64, generator=g).requires_grad_()
    streams = [torch.randn(64, generator=g) for _ in range(5)]
    out = pf.categorical_ppo_loss(
        logits, torch.arange(64) % 5, streams[0] - 2, streams[1], config, values=values, old_values=streams[2],
        returns=streams[3], ref_log_prob=streams[4] - 2,
    )  # fmt: skip
    out.loss.backward()
    return out.loss.detach(), out.stats.vector, logits.grad, values.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "numbers",
    [
        {"clip_low": 0.05, "clip_high": 0.1},
        {"value_clip": 0.01},
        {"entropy_coef": -0.3},
        {"value_coef": 2, "kl_coef": 0.7, "dual_clip": 1.5},
        {"log_ratio_clamp": None, "advantage_eps": 0.5},
    ],
)
def test_set_changes_the_loss_as_a_fresh_config_would(numbers, backend):
    config = BASE.on("cpu")
    with backend():
        before = loss_of(config)
        assert same_bits(before, loss_of(BASE))
        config.set(**numbers)
        assert same_bits(loss_of(config), loss_of(dataclasses.replace(BASE, **numbers)))
        assert not same_bits(loss_of(config), before)
        config.set(**{name: getattr(BASE, name) for name in numbers})
        assert same_bits(loss_of(config), before)


def test_all_that_speaks_of_the_numbers_agrees():
    config = BASE.on("cpu")
    address = config.device_numbers.data_ptr()
    config.set(clip_high=0.125, huber_delta=2)
    assert (config.clip_high, config.huber_delta) == (0.125, 2)
    for vector in (config.numbers_vector, config.device_numbers):
        assert vector.dtype == torch.float64
        assert vector.tolist() == pytest.approx(config.numbers(), nan_ok=True, rel=0, abs=0)
    assert config.device_numbers.data_ptr() == address


def test_compiled_calls_see_what_was_set():
    config = BASE.on("cpu")
    torch.compiler.reset()
    compiled = torch.compile(lambda: loss_of(config)[1], backend="eager")
    compiled()
    config.set(clip_low=0.01, clip_high=0.01, value_clip=0.3)
    assert torch.equal(compiled(), loss_of(config)[1])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"clip": 0.1}, r"DeviceLossConfig: set takes the fields \('clip_low', .*got 'clip'"),
        ({"kl": "k1"}, "got 'kl'"),
        ({"reduction": "sum"}, "got 'reduction'"),
        ({"log_ratio_clamp": 1.0}, "DeviceLossConfig: log_ratio_clamp is off and must stay so, got 1.0"),
        ({"value_clip": None}, "DeviceLossConfig: value_clip is on and must stay so, got None"),
        ({"clip_low": 0.1, "clip_high": -0.1}, "clip_high must be >= 0, got -0.1"),
        ({"clip_low": math.nan}, "clip_low must be finite"),
        ({"dual_clip": 1.0}, "dual_clip must be > 1"),
    ],
)
def test_what_cannot_be_set_is_named_and_changes_nothing(numbers, message):
    config = BASE.on("cpu")
    before = config.numbers()
    with pytest.raises(ValueError, match=message):
        config.set(**numbers)
    assert config.numbers() == pytest.approx(before, nan_ok=True)
    assert config.device_numbers.tolist() == pytest.approx(before, nan_ok=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.clip_low = 0.1


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, dataclasses.replace, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_copies_have_numbers_of_their_own(again):
    config = BASE.on("cpu")
    config.set(clip_low=0.01)
    other = again(config)
    assert isinstance(other, DeviceLossConfig) and other.clip_low == 0.01
    config.set(clip_low=0.02)
    assert other.device_numbers[NUMBERS.index("clip_low")] == other.clip_low == 0.01
    assert config == config and config != other and len({config, other}) == 2
    assert pf.LossConfig().device_numbers is None


@pytest.mark.parametrize(("name", "given"), [("cpu", False), ("cuda", True), ("triton", True)])
def test_kernels_of_a_gpu_get_the_numbers_where_they_are(name, given):
    made = []
    ops = types.SimpleNamespace(LossParams=lambda *arguments: made.append(arguments) or arguments)
    backend, config = Backend(name, ops, lambda: None, True), BASE.on("cpu")
    assert packed(config, backend) is packed(config, backend) is made[0]
    assert made[0][2] is (config.device_numbers if given else None)
    assert packed(BASE, backend)[2] is None
    config.set(clip_low=0.01)
    assert packed(config, backend)[0][0] == 0.01
