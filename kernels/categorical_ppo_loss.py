"""PPO loss from the logits of a categorical policy: the launches of `ppo_loss`, and no log-probs in memory.

Up to 2048 actions a program holds whole rows: the logits are read once, their gradient is written once, 8·A bytes a row in
float32 and what `ppo_loss` reads. Wider rows pass twice: 12·A bytes. How a row is summed depends on A alone, so a row has
the same log-prob in any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _formulas as f
from . import _loss, _reduce, _reports
from ._params import LossParams
from ._rows import finite_shift, read_actions, softmax_backward, softmax_forward, softmax_result

_WIDEST = 2048  # actions of a row that is read once


@triton.jit
def _read(
    logits, i, inside, row_stride, stride, action_mask, p, mask_row_stride, mask_stride, live, columns, width,
    T: tl.constexpr,
):  # fmt: skip
    """Columns of rows i, -inf where impossible, and which are possible. Logits do not wait for the mask or the action."""
    there = (columns < width)[None, :]
    column = columns[None, :].to(tl.int64)
    at = logits + i[:, None] * row_stride + column * stride
    z = tl.load(at, mask=inside[:, None] & there, other=0.0).to(T)
    possible = live[:, None] & there
    if action_mask is not None:
        at = action_mask + p.at[:, None] * mask_row_stride + column * mask_stride
        possible = possible & (tl.load(at, mask=possible, other=0) != 0)
    return tl.where(possible, z, float("-inf")), possible


@triton.jit
def _gradient(z, possible, columns, action, one, shift, log_sum, entropy, g, h, alive):
    """Of a tile of logits; 0 where a row is not `alive` or an action impossible."""
    d = softmax_backward(z, columns, action, one, shift, log_sum, entropy, g, h)
    return tl.where(alive[:, None] & possible, d, 0.0)


@triton.jit(do_not_specialize=["n", "stored", "parts", "blocks"])
def _categorical_ppo_loss_kernel(
    logits, actions, action_mask, grad_logits, report, width, row_stride, stride, mask_row_stride, mask_stride,
    mask, index, old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob, weights,
    grad_values, numbers, moments, records, n, stored, parts, blocks, unit: tl.float64,
    S: tl.constexpr, COUNTED: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr, INLINE: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS rows, COLS columns at a time; in one chunk the logits stay in registers until their gradient is written."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = i < _reduce.length(n, EVEN)
    p = _reduce.place_of(i, inside, index, stored, mask)
    action, known, unknown = read_actions(actions, p.at, 1, p.exists, width, None)
    live = p.valid & known  # an action out of range: a row without a distribution
    if report is not None:
        unknown = p.valid & unknown
        lost = inside & ~p.exists
        some = tl.max((lost | unknown).to(tl.int32), 0)
        if some != 0:
            _reports.refuse(report, i, p.at, lost)
            _reports.refuse(report + 2, i, action, unknown)
    columns = tl.arange(0, COLS)
    one = tl.full((ROWS,), 1.0, T)  # the temperature

    if CHUNKS == 1:
        z, possible = _read(logits, i, inside, row_stride, stride, action_mask, p, mask_row_stride, mask_stride, live,
                            columns, width, T)  # fmt: skip
        log_prob, entropy, shift, log_sum = softmax_forward(z, columns, action, one)
    else:
        largest = tl.full((ROWS,), float("-inf"), T)
        total = tl.zeros((ROWS,), tl.float64)
        weighted = tl.zeros((ROWS,), tl.float64)
        taken = tl.zeros((ROWS,), T)
        for first in range(0, CHUNKS * COLS, COLS):
            z, possible = _read(logits, i, inside, row_stride, stride, action_mask, p, mask_row_stride, mask_stride, live,
                                first + columns, width, T)  # fmt: skip
            now = tl.max(z, 1)
            now = tl.where(now > largest, now, largest)
            # sums so far are relative to a smaller logit
            step = f.softmax_exponent(largest - finite_shift(now)).to(tl.float64)
            factor = tl.where(total == 0.0, 0.0, tl.exp(step))
            u = f.softmax_exponent(z - finite_shift(now)[:, None])
            e = f.exp_floored(u)
            weighted = factor * (weighted + step * total) + tl.sum(e * u, 1).to(tl.float64)
            total = factor * total + tl.sum(e, 1).to(tl.float64)
            taken += tl.sum(tl.where((first + columns)[None, :] == action[:, None], z, 0.0), 1)
            largest = now
        log_prob, entropy, shift, log_sum = softmax_result(taken, largest, one, total, weighted)
        log_prob = log_prob.to(T)
        entropy = entropy.to(T)
        log_sum = log_sum.to(T)

    grads = _loss.token_losses(
        log_prob, entropy, i, inside, p,
        old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob, weights, grad_values,
        numbers, moments, parts, unit, records, blocks, S, COUNTED, T, INLINE,
    )  # fmt: skip
    if grad_logits is not None:
        g = grads.log_prob
        h = grads.entropy
        alive = (log_sum != float("inf")) & ((g != 0.0) | (h != 0.0))
        to = grad_logits + (i * width)[:, None] + columns[None, :]
        if CHUNKS == 1:
            d = _gradient(z, possible, columns, action, one, shift, log_sum, entropy, g, h, alive)
            _reduce.store(to, d, inside[:, None] & (columns < width)[None, :])
        else:
            for first in range(0, CHUNKS * COLS, COLS):
                z, possible = _read(logits, i, inside, row_stride, stride, action_mask, p, mask_row_stride, mask_stride,
                                    live, first + columns, width, T)  # fmt: skip
                d = _gradient(z, possible, first + columns, action, one, shift, log_sum, entropy, g, h, alive)
                _reduce.store(to + first, d, inside[:, None] & (first + columns < width)[None, :])


def _tile(width: int, double: bool) -> dict[str, int]:
    """How many rows and columns a program takes, by the width of a row alone: eight numbers a thread, four doubles."""
    cols = min(triton.next_power_of_2(max(width, 1)), _WIDEST)
    rows = max(1, min(256, (1024 if double else 2048) // cols))
    return {"CHUNKS": max(1, triton.cdiv(width, cols)), "ROWS": rows, "COLS": cols, "num_warps": 8}


def categorical_ppo_loss(
    params: LossParams, logits: Tensor, actions: Tensor, action_mask: Tensor | None, index: Tensor | None,
    old_log_prob: Tensor, advantages: Tensor, values: Tensor | None, old_values: Tensor | None, returns: Tensor | None,
    ref_log_prob: Tensor | None, rollout_log_prob: Tensor | None, mask: Tensor | None, weights: Tensor | None,
    denominator: float, sum: bool, loss: Tensor, stats: Tensor, grad_logits: Tensor | None, grad_values: Tensor | None,
    resources: object, /,
) -> None:  # fmt: skip
    """As ppo_fast._C.categorical_ppo_loss: fills `loss`, `stats` and the gradients that are not None."""
    width = logits.shape[-1]
    call = _loss.Loss(
        params, logits.shape[:-1].numel(), old_log_prob, advantages, values, old_values, returns, ref_log_prob,
        rollout_log_prob, mask, weights, index, denominator, sum, loss, stats, grad_values,
    )  # fmt: skip
    rows, row_stride, stride = _reduce.rows_of(logits)
    masks, mask_row_stride, mask_stride = _reduce.rows_of(action_mask)
    tile = _tile(width, call.double)
    call.run(_categorical_ppo_loss_kernel, tile["ROWS"], rows, _reduce.flat(actions), masks, grad_logits,
             _reports.of("categorical_ppo_loss", logits.device), width, row_stride, stride, mask_row_stride, mask_stride,
             **tile)  # fmt: skip
    _reports.raise_early(logits.device)


def _example(width: int, which: str, x: str, T: tl.dtype, action_mask: str | None) -> tuple:
    own = {"logits": x, "actions": "*i64", "action_mask": action_mask, "grad_logits": x, "report": "*i64",
           "width": "i32", "row_stride": "i32", "stride": "i32", "mask_row_stride": "i32", "mask_stride": "i32"}  # fmt: skip
    return _loss.example(
        _categorical_ppo_loss_kernel, own, which, T, index=which == "full", **_tile(width, T is tl.float64)
    )


AOT = [
    _example(6, "plain", "*fp32", tl.float32, None),
    _example(18, "full", "*bf16", tl.float32, "*i1"),
    _example(18, "full", "*fp64", tl.float64, "*i1"),
    _example(2048, "plain", "*fp32", tl.float32, None),
    _example(50_000, "plain", "*bf16", tl.float32, None),
]
