"""What the three losses share in Python: weights, outputs, and the arguments that no gradient flows to."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .. import _backend, _library
from ..config import STATS, LossConfig
from ..reductions import token_weights


@lru_cache(maxsize=256)
def packed(config: LossConfig):
    """The config as C++ has it."""
    return _backend._C.LossParams(config.numbers(), config.choices())


def compiled_arguments(config: LossConfig) -> tuple:
    """A config as registered ops take it: see _library.CONFIG_SCHEMA."""
    return (config.numbers_vector, *config.choices())


def split_compiled(rest: tuple) -> tuple[tuple, LossConfig]:
    """What follows a registered loss's inputs, as (rollout arguments, config)."""
    numbers, *choices = rest[-_library.N_CONFIG :]
    return rest[: -_library.N_CONFIG], LossConfig.unpacked(numbers.tolist(), choices)


def check_config(op: str, config: LossConfig | None) -> LossConfig:
    if config is None:
        return LossConfig()
    if not isinstance(config, LossConfig):
        raise TypeError(f"{op}: config must be a LossConfig, got {type(config).__name__}")
    return config


def check_denominator(op: str, denominator: float | Tensor | None) -> None:
    if denominator is None or isinstance(denominator, Tensor):
        return
    if not (isinstance(denominator, (int, float)) and math.isfinite(denominator) and denominator > 0):
        raise ValueError(f"{op}: denominator must be a finite number > 0, got {denominator!r}")


def constants(op: str, **tensors: Tensor | None) -> None:
    """An input that gets no gradient but requires one is a mistake that would train silently wrong."""
    if torch.is_grad_enabled():
        for name, x in tensors.items():
            if x is not None and x.requires_grad:
                raise ValueError(f"{op}: {name} gets no gradient but requires one; detach it or use torch.no_grad()")


def weighting(
    op: str,
    config: LossConfig,
    like: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    denominator: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor | None, float, bool]:
    """(weights, denominator or NaN, whether nothing else is divided): what kernels take for a reduction."""
    if denominator is not None and not isinstance(denominator, Tensor):
        check_denominator(op, denominator)
        if weights is not None or config.reduction in ("token-mean", "sum"):
            return weights, float(denominator), True
    elif denominator is None:
        if weights is not None:
            return weights, math.nan, True
        if config.reduction in ("token-mean", "sum"):
            return None, math.nan, config.reduction == "sum"
    valid = None if mask is None else mask != 0
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    ones = torch.empty((), dtype=dtype, device=like.device).expand(like.shape)
    return token_weights(ones, valid, config.reduction, weights, denominator, cu_seqlens), math.nan, True


def compute_dtype(*inputs: Tensor | None) -> torch.dtype:
    double = any(x is not None and x.dtype == torch.float64 for x in inputs)
    return torch.float64 if double else torch.float32


def outputs(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss [] and the statistics [len(STATS)], for a kernel to fill."""
    like = inputs[0]
    dtype = compute_dtype(*inputs)
    if like.dtype == dtype:
        return like.new_empty(()), like.new_empty(len(STATS))
    return like.new_empty((), dtype=dtype), like.new_empty(len(STATS), dtype=dtype)


def check_streams(op: str, shape: torch.Size, config: LossConfig, **streams: Tensor | None) -> None:
    """For the reference, what the bindings check for the kernels."""
    for name, x in streams.items():
        if x is None and name not in ("old_log_prob", "advantages"):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__ if x is not None else None}")
        if name != "mask" and not x.is_floating_point():
            raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
        if x.shape != shape:
            raise ValueError(f"{op}: {name} must be the shape of log_prob = {list(shape)}, got {list(x.shape)}")
    needs = {"values": "returns"}
    if config.value_clip is not None and config.value_clip_mode != "error":
        needs |= {"values and value_clip": "old_values"}
    for have, want in needs.items():
        if streams["values"] is not None and streams[want] is None:
            raise TypeError(f"{op}: {want} must be a tensor with {have}, got None")
    if config.kl is not None and streams["ref_log_prob"] is None:
        raise TypeError(f"{op}: ref_log_prob must be a tensor with LossConfig(kl=...), got None")
    if config.rollout_correction is not None and streams["rollout_log_prob"] is None:
        raise TypeError(f"{op}: rollout_log_prob must be a tensor with LossConfig(rollout_correction=...), got None")


def gradient_for(x: Tensor | None, wanted: bool) -> Tensor | None:
    if x is None or not wanted:
        return None
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


def wants(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad
