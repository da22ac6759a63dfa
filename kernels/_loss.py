"""What ppo_loss, categorical_ppo_loss and normal_ppo_loss share: the loss of a block of tokens, what is summed over them,
and how sums become loss and statistics. csrc/cpu/loss_tile.h and csrc/cpu/ppo_loss.inc are the same for C++.

A block of tokens leaves one record of partial sums: RECORD float64 numbers, 152 bytes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _formulas as f
from . import _reduce
from ._formulas import Switches
from ._launch import launch
from ._params import LossParams

#: Numbers in a record, in the order of `Record`.
RECORD = 19


class Record(NamedTuple):
    """Sums over tokens, all float64; csrc/cpu/loss_tile.h: LossSums. Returns and residuals: mean and m2."""

    policy: tl.tensor
    value: tl.tensor
    entropy: tl.tensor
    kl: tl.tensor
    k3: tl.tensor
    log_ratio: tl.tensor
    ratio: tl.tensor
    ratio2: tl.tensor
    count: tl.tensor
    low: tl.tensor
    high: tl.tensor
    dual: tl.tensor
    value_clipped: tl.tensor
    ratio_min: tl.tensor
    ratio_max: tl.tensor
    return_mean: tl.tensor
    return_m2: tl.tensor
    residual_mean: tl.tensor
    residual_m2: tl.tensor


@triton.jit
def _store(records, at, blocks, r):
    """One record of records [RECORD, blocks]."""
    to = records + at
    tl.store(to, r.policy)
    tl.store(to + blocks, r.value)
    tl.store(to + 2 * blocks, r.entropy)
    tl.store(to + 3 * blocks, r.kl)
    tl.store(to + 4 * blocks, r.k3)
    tl.store(to + 5 * blocks, r.log_ratio)
    tl.store(to + 6 * blocks, r.ratio)
    tl.store(to + 7 * blocks, r.ratio2)
    tl.store(to + 8 * blocks, r.count)
    tl.store(to + 9 * blocks, r.low)
    tl.store(to + 10 * blocks, r.high)
    tl.store(to + 11 * blocks, r.dual)
    tl.store(to + 12 * blocks, r.value_clipped)
    tl.store(to + 13 * blocks, r.ratio_min)
    tl.store(to + 14 * blocks, r.ratio_max)
    tl.store(to + 15 * blocks, r.return_mean)
    tl.store(to + 16 * blocks, r.return_m2)
    tl.store(to + 17 * blocks, r.residual_mean)
    tl.store(to + 18 * blocks, r.residual_m2)


@triton.jit
def _column(records, k, at, live, blocks, other):
    return tl.load(records + k * blocks + at, mask=live, other=other)


@triton.jit
def _join(records, first, blocks, LANES: tl.constexpr):
    """The records [first, first + LANES) of `blocks` as one."""
    at = first + tl.arange(0, LANES)
    live = at < blocks
    count = _column(records, 8, at, live, blocks, 0.0)
    returns = _reduce.joined_moments(
        count, _column(records, 15, at, live, blocks, 0.0), _column(records, 16, at, live, blocks, 0.0)
    )
    residuals = _reduce.joined_moments(
        count, _column(records, 17, at, live, blocks, 0.0), _column(records, 18, at, live, blocks, 0.0)
    )
    return Record(
        policy=tl.sum(_column(records, 0, at, live, blocks, 0.0)),
        value=tl.sum(_column(records, 1, at, live, blocks, 0.0)),
        entropy=tl.sum(_column(records, 2, at, live, blocks, 0.0)),
        kl=tl.sum(_column(records, 3, at, live, blocks, 0.0)),
        k3=tl.sum(_column(records, 4, at, live, blocks, 0.0)),
        log_ratio=tl.sum(_column(records, 5, at, live, blocks, 0.0)),
        ratio=tl.sum(_column(records, 6, at, live, blocks, 0.0)),
        ratio2=tl.sum(_column(records, 7, at, live, blocks, 0.0)),
        count=returns.count,
        low=tl.sum(_column(records, 9, at, live, blocks, 0.0)),
        high=tl.sum(_column(records, 10, at, live, blocks, 0.0)),
        dual=tl.sum(_column(records, 11, at, live, blocks, 0.0)),
        value_clipped=tl.sum(_column(records, 12, at, live, blocks, 0.0)),
        ratio_min=tl.min(_column(records, 13, at, live, blocks, float("inf"))),
        ratio_max=tl.max(_column(records, 14, at, live, blocks, float("-inf"))),
        return_mean=returns.mean,
        return_m2=returns.m2,
        residual_mean=residuals.mean,
        residual_m2=residuals.m2,
    )


# --- the loss of a block ----------------------------------------------------------------------------------------------


class TokenGrads(NamedTuple):
    """d loss / d log_prob and d loss / d entropy, 0 where masked out."""

    log_prob: tl.tensor
    entropy: tl.tensor


@triton.jit
def _total(x):
    return tl.sum(x).to(tl.float64)


@triton.jit
def _counts(low, high, dual, value_clipped):
    """Four counts as one sum, eleven bits each: a block has fewer than 2048 tokens."""
    word = low.to(tl.int64) | (high.to(tl.int64) << 11)
    return tl.sum(word | (dual.to(tl.int64) << 22) | (value_clipped.to(tl.int64) << 33))


@triton.jit
def _count_in(word, k: tl.constexpr):
    return ((word >> (11 * k)) & 2047).to(tl.float64)


@triton.jit
def token_losses(
    log_prob, entropy, i, inside, p,
    old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob, weights, grad_values,
    numbers, moments, parts, unit, records, blocks,
    S: tl.constexpr, COUNTED: tl.constexpr, T: tl.constexpr, INLINE: tl.constexpr,
):  # fmt: skip
    """Of tokens i, whose rollout is stored at p.at: writes grad_values and a record of sums, returns the other gradients.

    log_prob and entropy (None: no entropy term) are blocks, finite where not valid; the rest are pointers, None where
    absent. moments [3, parts]: of the advantages, where the loss normalises them or divides by their count (COUNTED);
    where it does not divide by that, it multiplies by `unit`.
    """
    c = f.load_numbers(numbers, T)
    valid = p.valid
    block = tl.program_id(0).to(tl.int64)
    scale = tl.zeros((), tl.float64) + unit
    a = _reduce.read(advantages, p.at, p, T)
    if moments is not None:
        m = _reduce.load_moments(moments, 0, parts, parts, INLINE)
        if COUNTED:
            scale = 1.0 / tl.where(m.count > 1, m.count, 1.0)
        if S.normalize_advantages:
            enough = m.count > S.advantage_ddof  # else they are left as they are
            deviation = tl.sqrt(m.m2 / tl.where(enough, m.count - S.advantage_ddof, 1.0))
            shift = tl.where(enough, m.mean, 0.0).to(T)
            inverse = tl.where(enough, 1.0 / (deviation + tl.load(numbers + 12)), 1.0).to(T)
            a = tl.where(valid, (a - shift) * inverse, 0.0)
    token = tl.where(valid, 1.0, 0.0).to(T)  # the token's weight, by which terms are summed
    if weights is not None:
        token = _reduce.read(weights, i, p, T)
    share = token * scale.to(T)  # and by which its gradients are scaled

    # policy
    old = _reduce.read(old_log_prob, p.at, p, T)
    log_prob = tl.where(valid, log_prob, 0.0)
    unclamped = log_prob - old
    d = unclamped
    if S.log_ratio_clamp:
        d = f.clamp_of(d, -c.log_ratio_clamp, c.log_ratio_clamp)
    ratio = tl.exp(d)
    s = f.policy_term(log_prob, old, d, ratio, a, c, S)
    policy = s.loss
    grad = s.grad
    if S.rollout_correction is not None:
        rollout = _reduce.read(rollout_log_prob, p.at, p, T)
        rho = f.rollout_weight(old - rollout, c, S)
        policy = policy * rho
        grad = grad * rho
    grad = grad * share
    moves = valid | (~valid)  # everywhere
    if S.log_ratio_clamp:
        moves = ~((unclamped < -c.log_ratio_clamp) | (unclamped > c.log_ratio_clamp))
        if S.policy == "ppo" or S.policy == "sapo" or S.policy == "cpi":  # the others' derivatives pass r by
            grad = tl.where(moves, grad, 0.0)
    r = tl.where(valid, ratio, 0.0)
    wide = r.to(tl.float64)  # squares of what float32 holds may be more than it holds

    # KL
    kl_sum = tl.zeros((), tl.float64)
    if S.kl is not None:
        ref = _reduce.read(ref_log_prob, p.at, p, T)
        k = f.kl_term(ref - log_prob, ratio, moves, c, S)
        kl_sum = _total(k.loss * token)
        grad = grad + tl.where(c.kl_coef == 0.0, 0.0, k.grad * (share * c.kl_coef))

    # entropy
    entropy_sum = tl.zeros((), tl.float64)
    grad_entropy = -(share * c.entropy_coef)
    if entropy is not None:
        entropy_sum = _total(tl.where(valid, entropy, 0.0) * token)

    # value
    n_valid = tl.sum(valid.to(tl.int32)).to(tl.float64)
    value_sum = tl.zeros((), tl.float64)
    value_clipped = s.low & s.high  # nowhere
    returns_m = _reduce.Moments(n_valid, 0.0 * n_valid, 0.0 * n_valid)
    residuals_m = returns_m
    if values is not None:
        v = _reduce.read(values, i, p, T)
        target = _reduce.read(returns, p.at, p, T)
        old_v = v
        if old_values is not None:
            old_v = _reduce.read(old_values, p.at, p, T)
        term = f.value_term(v, old_v, target, c, S)
        value_clipped = term.clipped
        half: tl.constexpr = 0.5 if S.value_half else 1.0
        value_sum = _total(half * term.loss * token)
        if grad_values is not None:
            _reduce.store(grad_values + i, term.half_grad * (share * (2.0 * half * c.value_coef)), inside)
        returns_m = _reduce.block_moments(target, valid, n_valid)
        residuals_m = _reduce.block_moments(target - v, valid, n_valid)

    word = _counts(valid & s.low, valid & s.high, valid & s.dual_clipped, valid & value_clipped)
    known = valid & (ratio == ratio)  # NaN has no place in an order; the sum of ratios tells of it
    _store(records, block, blocks, Record(
        policy=_total(policy * token), value=value_sum, entropy=entropy_sum, kl=kl_sum,
        k3=_total(tl.where(valid, f.beyond_linear(d, ratio), 0.0)), log_ratio=_total(tl.where(valid, d, 0.0)),
        ratio=_total(r), ratio2=tl.sum(wide * wide),
        count=n_valid, low=_count_in(word, 0), high=_count_in(word, 1), dual=_count_in(word, 2),
        value_clipped=_count_in(word, 3),
        ratio_min=tl.min(tl.where(known, ratio, float("inf"))).to(tl.float64),
        ratio_max=tl.max(tl.where(known, ratio, float("-inf"))).to(tl.float64),
        return_mean=returns_m.mean, return_m2=returns_m.m2,
        residual_mean=residuals_m.mean, residual_m2=residuals_m.m2,
    ))  # fmt: skip
    return TokenGrads(grad, grad_entropy)


# --- loss and statistics ----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["blocks", "joined"])
def _join_kernel(records, out, blocks, joined, LANES: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    _store(out, block, joined, _join(records, block * LANES, blocks, LANES))


@triton.jit(do_not_specialize=["blocks"])
def _finish_kernel(
    records, numbers, loss, stats, blocks, unit: tl.float64, S: tl.constexpr, COUNTED: tl.constexpr,
    VALUES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """From sums to the loss and the statistics, in float64. csrc/cpu/loss_tile.h: finish_loss."""
    s = _join(records, 0, blocks, LANES)
    n = tl.where(s.count > 1, s.count, 1.0)
    w = tl.zeros((), tl.float64) + unit
    if COUNTED:
        w = 1.0 / n
    policy = w * s.policy
    value = w * s.value
    entropy = w * s.entropy
    kl = w * s.kl
    total = policy
    if VALUES:
        total = total + tl.load(numbers + 7) * value
    total = total - tl.load(numbers + 8) * entropy
    if S.kl is not None:
        total = total + tl.load(numbers + 9) * kl
    tl.store(loss, total)
    some = s.count > 0
    poison = tl.where(s.ratio == s.ratio, 0.0, s.ratio)  # comparisons passed over a NaN ratio, its sum did not
    tl.store(stats, policy)
    tl.store(stats + 1, value)
    tl.store(stats + 2, entropy)
    tl.store(stats + 3, kl)
    tl.store(stats + 4, s.k3 / n)
    tl.store(stats + 5, -s.log_ratio / n)
    tl.store(stats + 6, (s.low + s.high) / n)
    tl.store(stats + 7, s.low / n)
    tl.store(stats + 8, s.high / n)
    tl.store(stats + 9, s.dual / n)
    tl.store(stats + 10, s.value_clipped / n)
    tl.store(stats + 11, s.ratio / n)
    tl.store(stats + 12, tl.where(some, s.ratio_min + poison, 0.0))
    tl.store(stats + 13, tl.where(some, s.ratio_max + poison, 0.0))
    tl.store(stats + 14, tl.where(some, s.ratio * (s.ratio / (n * tl.where(some, s.ratio2, 1.0))), 0.0))
    varied = s.return_m2 > 0
    explained = 1.0 - s.residual_m2 / tl.where(varied, s.return_m2, 1.0)
    tl.store(stats + 15, tl.where(varied, explained, float("nan")))


# --- from Python ------------------------------------------------------------------------------------------------------


class Loss:
    """One call of a loss: which streams it reads, what it divides by, and the scratch of its two stages.

    `streams`, `numbers` and so on are arguments of `token_losses`, in its order: `before` those of its pointers that say
    where tokens are, `after` those from the numbers on; `choices` are its constexprs.
    """

    def __init__(
        self, params: LossParams, n: int, old_log_prob: Tensor, advantages: Tensor, values: Tensor | None,
        old_values: Tensor | None, returns: Tensor | None, ref_log_prob: Tensor | None, rollout_log_prob: Tensor | None,
        mask: Tensor | None, weights: Tensor | None, index: Tensor | None, denominator: float, total: bool,
        loss: Tensor, stats: Tensor, grad_values: Tensor | None,
    ) -> None:  # fmt: skip
        flat, S = _reduce.flat, params.switches
        self.n, self.loss, self.stats, self.switches, device = n, loss, stats, S, loss.device
        self.double = loss.dtype == torch.float64
        self.T = tl.float64 if self.double else tl.float32
        self.advantages, self.mask, self.index = flat(advantages), flat(mask), flat(index)
        near = S.value_clip and S.value_clip_mode != "error"
        self.streams = (
            flat(old_log_prob), self.advantages, flat(values),
            flat(old_values) if near and values is not None else None,
            flat(returns) if values is not None else None,
            flat(ref_log_prob) if S.kl is not None else None,
            flat(rollout_log_prob) if S.rollout_correction is not None else None,
            flat(weights), grad_values,
        )  # fmt: skip
        given = not math.isnan(denominator)
        self.counted = not given and not total and mask is not None
        self.unit = 1.0 / denominator if given else 1.0 if total else 1.0 / max(n, 1)
        self.numbers = params.on(device)
        self.moments: Tensor | None = None
        self.parts = 0
        if self.counted or S.normalize_advantages:
            self.moments, self.parts = _reduce.moments_of(self.advantages, self.mask, self.index, n, self.T)

    def run(self, kernel: Any, block: int, *args: Any, **meta: Any) -> None:
        """kernel(*args, <what all losses take>, **meta) over blocks of tokens, then loss and statistics from its records."""
        blocks = max(1, triton.cdiv(self.n, block))
        records = torch.empty((RECORD, blocks), dtype=torch.float64, device=self.loss.device)
        launch(kernel, (blocks,), *args, self.mask, self.index, *self.streams, self.numbers, self.moments, records,
               self.n, self.advantages.numel(), self.parts, blocks, self.unit, S=self.switches, COUNTED=self.counted,
               EVEN=self.n % 16 == 0, T=self.T, INLINE=_reduce.INLINE, **meta)  # fmt: skip
        while blocks > _reduce.JOIN:
            joined = triton.cdiv(blocks, _reduce.JOIN)
            out = torch.empty((RECORD, joined), dtype=torch.float64, device=self.loss.device)
            launch(_join_kernel, (joined,), records, out, blocks, joined, LANES=_reduce.JOIN, num_warps=8)
            records, blocks = out, joined
        launch(_finish_kernel, (1,), records, self.numbers, self.loss, self.stats, blocks, self.unit, S=self.switches,
               COUNTED=self.counted, VALUES=self.streams[2] is not None, LANES=_reduce.JOIN, num_warps=8)  # fmt: skip


_ALL = Switches(True, True, True, True, True, True, "huber", True, "max", "k3", True, 1, "tis", "ppo", None, "ratio")
#: Switches of examples: a plain loss, one with everything on, and other policies.
SWITCHES = {
    "plain": Switches(*[False] * 6, "mse", True, "max", None, False, 1, None, "ppo", None, None), "full": _ALL,
    **{policy: _ALL._replace(policy=policy) for policy in ("sapo", "dppo_kl", "dro")},
}  # fmt: skip


def example(
    kernel: Any, own: dict[str, str | None], which: str, T: tl.dtype, num_warps: int, index: bool = False, **meta: Any
) -> tuple:
    """An entry of AOT for a kernel of `run`: `own` are the types of the arguments before the mask, None where absent."""
    full = which != "plain"
    x = "*fp64" if T is tl.float64 else "*fp32"
    types = {
        **own, "mask": "*i1" if full else None, "index": "*i64" if index else None, "old_log_prob": x, "advantages": x,
        "values": x, "old_values": x if full else None, "returns": x, "ref_log_prob": x if full else None,
        "rollout_log_prob": x if full else None, "weights": x if full else None, "grad_values": x, "numbers": "*fp64",
        "moments": "*fp64" if full else None, "records": "*fp64", "n": "i32", "stored": "i32", "parts": "i32",
        "blocks": "i32", "unit": "fp64",
    }  # fmt: skip
    values = {"S": SWITCHES[which], "COUNTED": full, "EVEN": True, "T": T, "INLINE": _reduce.INLINE, **meta}
    absent = {name: None for name, kind in types.items() if kind is None}
    signature = {name: kind or "constexpr" for name, kind in types.items()} | dict.fromkeys(values, "constexpr")
    return kernel, signature, values | absent, {"num_warps": num_warps}


_JOIN_TYPES = {"records": "*fp64", "out": "*fp64", "blocks": "i32", "joined": "i32", "LANES": "constexpr"}
_FINISH_TYPES = {"records": "*fp64", "numbers": "*fp64", "loss": "*fp32", "stats": "*fp32", "blocks": "i32",
                 "unit": "fp64", "S": "constexpr", "COUNTED": "constexpr", "VALUES": "constexpr",
                 "LANES": "constexpr"}  # fmt: skip
AOT = [
    (_join_kernel, _JOIN_TYPES, {"LANES": _reduce.JOIN}, {"num_warps": 8}),
    (_finish_kernel, _FINISH_TYPES, {"S": _ALL, "COUNTED": True, "VALUES": True, "LANES": _reduce.JOIN},
     {"num_warps": 8}),
]  # fmt: skip
