"""PPO loss from mean and log_std of a diagonal normal policy: the launches of `ppo_loss`, and no log-probs in memory.

Mean and actions are read once, the gradient of the mean is written once: 12·D bytes a row in float32 with a log_std that
all rows share, and what `ppo_loss` reads. The gradient of a shared log_std is a sum over the rows: each program leaves its
own, 8·D bytes, and one more launch adds them up in order. How a row is summed depends on D alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _formulas as f
from . import _loss, _reduce, _reports
from ._params import LossParams


@triton.jit
def _read(x, row, exists, stride, row_stride, column, here, width, T: tl.constexpr):
    """Rows of x, 0 where not `here`."""
    there = exists[:, None] & (column < width)[None, :]
    x = tl.load(x + row[:, None] * row_stride + column[None, :] * stride, mask=there, other=0.0).to(T)
    return tl.where(here, x, 0.0)


@triton.jit(do_not_specialize=["n", "stored", "parts", "blocks"])
def _normal_ppo_loss_kernel(
    mean, log_std, actions, grad_mean, grad_log_std, log_std_sums, report, width, mean_row_stride, mean_stride,
    log_std_row_stride, log_std_stride, action_row_stride, action_stride,
    mask, index, old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob, weights,
    grad_values, numbers, moments, records, n, stored, parts, blocks, unit: tl.float64,
    S: tl.constexpr, COUNTED: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr, INLINE: tl.constexpr, SQUASH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS rows. log_std_sums [blocks, D]: what a shared log_std's gradient is added up from, else None."""
    block = tl.program_id(0).to(tl.int64)
    i = block * ROWS + tl.arange(0, ROWS)
    inside = i < _reduce.length(n, EVEN)
    p = _reduce.place_of(i, inside, index, stored, mask)
    _reports.refuse(report, i, p.at, inside & ~p.exists)
    column = tl.arange(0, COLS).to(tl.int64)
    here = p.valid[:, None] & (column < width)[None, :]
    action = _read(actions, p.at, p.exists, action_stride, action_row_stride, column, here, width, T)
    log_s = _read(log_std, i, inside, log_std_stride, log_std_row_stride, column, here, width, T)
    inverse_std = tl.exp(-log_s)
    z = (action - _read(mean, i, inside, mean_stride, mean_row_stride, column, here, width, T)) * inverse_std
    density = f.normal_log_density(z, log_s)
    if SQUASH:
        density = density - f.log_tanh_slope(action)
    log_prob = tl.sum(tl.where(here, density, 0.0), 1)
    # squashed: the one-sample estimate
    entropy = -log_prob if SQUASH else tl.sum(tl.where(here, f.normal_entropy(log_s), 0.0), 1)

    grads = _loss.token_losses(
        log_prob, entropy, i, inside, p,
        old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob, weights, grad_values,
        numbers, moments, parts, unit, records, blocks, S, COUNTED, T, INLINE,
    )  # fmt: skip
    g = grads.log_prob
    h = grads.entropy
    if SQUASH:
        g = g - h
        h = tl.zeros((ROWS,), T)
    alive = here & ((g != 0.0) | (h != 0.0))[:, None]
    to_z = tl.where(alive, g[:, None] * z, 0.0)
    to = i[:, None] * width + column[None, :]
    exists = inside[:, None] & (column < width)[None, :]
    if grad_mean is not None:
        _reduce.store(grad_mean + to, tl.where(alive, to_z * inverse_std, 0.0), exists)
    slope = tl.where(alive, (to_z * z - g[:, None]) + h[:, None], 0.0)
    if grad_log_std is not None:
        _reduce.store(grad_log_std + to, slope, exists)
    if log_std_sums is not None:
        tl.store(log_std_sums + block * width + column, tl.sum(slope, 0).to(tl.float64), mask=column < width)


def _tile(width: int, double: bool) -> dict[str, int]:
    """How many rows and columns a program takes, by the width of a row alone: eight numbers a thread, four doubles."""
    cols = triton.next_power_of_2(max(width, 1))
    return {"ROWS": max(1, min(256, (1024 if double else 2048) // cols)), "COLS": cols, "num_warps": 8}


def normal_ppo_loss(
    params: LossParams, mean: Tensor, log_std: Tensor, actions: Tensor, squash: bool, index: Tensor | None,
    old_log_prob: Tensor, advantages: Tensor, values: Tensor | None, old_values: Tensor | None, returns: Tensor | None,
    ref_log_prob: Tensor | None, rollout_log_prob: Tensor | None, mask: Tensor | None, weights: Tensor | None,
    denominator: float, sum: bool, loss: Tensor, stats: Tensor, grad_mean: Tensor | None, grad_log_std: Tensor | None,
    grad_values: Tensor | None, resources: object, /,
) -> None:  # fmt: skip
    """As ppo_fast._C.normal_ppo_loss: fills `loss`, `stats` and the gradients that are not None."""
    width, n = mean.shape[-1], mean.shape[:-1].numel()
    call = _loss.Loss(
        params, n, old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob, mask, weights,
        index, denominator, sum, loss, stats, grad_values,
    )  # fmt: skip
    shared = log_std.ndim == 1 and mean.ndim != 1
    tile = _tile(width, call.double)
    sums = None
    if shared and grad_log_std is not None:
        blocks = max(1, triton.cdiv(n, tile["ROWS"]))
        sums = torch.empty((blocks, width), dtype=torch.float64, device=mean.device)
    means = _reduce.rows_of(mean)
    log_stds = (log_std, 0, log_std.stride(0)) if shared else _reduce.rows_of(log_std.expand(mean.shape))
    acts = _reduce.rows_of(actions)
    report = None if index is None else _reports.of("normal_ppo_loss", mean.device)
    call.run(_normal_ppo_loss_kernel, tile["ROWS"], means[0], log_stds[0], acts[0], grad_mean,
             None if shared else grad_log_std, sums, report, width, *means[1:], *log_stds[1:], *acts[1:], SQUASH=squash,
             **tile)  # fmt: skip
    if sums is not None:
        _reduce.sum_rows(sums, grad_log_std)
    _reports.raise_early(mean.device)


def _example(width: int, which: str, x: str, T: tl.dtype, shared: bool, squash: bool) -> tuple:
    strides = ("mean_row_stride", "mean_stride", "log_std_row_stride", "log_std_stride", "action_row_stride",
               "action_stride")  # fmt: skip
    own = {"mean": x, "log_std": x, "actions": x, "grad_mean": x, "grad_log_std": None if shared else x,
           "log_std_sums": "*fp64" if shared else None, "report": "*i64" if which == "full" else None,
           "width": "i32", **dict.fromkeys(strides, "i32")}  # fmt: skip
    return _loss.example(
        _normal_ppo_loss_kernel, own, which, T, index=which == "full", SQUASH=squash, **_tile(width, T is tl.float64)
    )


AOT = [
    _example(6, "plain", "*fp32", tl.float32, True, False),
    _example(17, "full", "*bf16", tl.float32, False, True),
    _example(6, "full", "*fp64", tl.float64, True, True),
]
