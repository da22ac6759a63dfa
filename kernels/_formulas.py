"""The formulas of the losses per token, value and gradient, for Triton: what csrc/math is for C++.

Each is written for blocks of float32 or float64 and computes in the type of its arguments. Values that a formula selects
away may be NaN or Inf on the way; nothing is multiplied by a 0 that stands for "not chosen".
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

HALF_LOG_2PI = tl.constexpr(0.91893853320467274178)
LOG_2 = tl.constexpr(0.69314718055994530942)


class Switches(NamedTuple):
    """What of a LossConfig decides which code runs: known when a kernel is compiled."""

    dual_clip: bool
    ratio_cap: bool
    log_ratio_clamp: bool
    value_clip: bool
    kl_clamp: bool
    kl_value_clamp: bool
    value_loss: str
    value_half: bool
    value_clip_mode: str
    kl: str | None
    normalize_advantages: bool
    advantage_ddof: int
    rollout_correction: str | None
    policy: str
    kl_gradient: str | None
    kl_weight: str | None


class Numbers(NamedTuple):
    """The numbers of a LossConfig in the compute dtype: loaded, so that annealing one compiles nothing."""

    clip_lo: tl.tensor
    clip_hi: tl.tensor
    dual_clip: tl.tensor
    ratio_cap: tl.tensor
    log_ratio_clamp: tl.tensor
    huber_delta: tl.tensor
    value_clip: tl.tensor
    value_coef: tl.tensor
    entropy_coef: tl.tensor
    kl_coef: tl.tensor
    kl_clamp: tl.tensor
    kl_value_clamp: tl.tensor
    rollout_low: tl.tensor
    rollout_high: tl.tensor
    clip_low: tl.tensor
    clip_high: tl.tensor
    tau_positive: tl.tensor
    tau_negative: tl.tensor
    dro_beta: tl.tensor


@triton.jit
def load_numbers(numbers, T: tl.constexpr):
    """From float64 [18] in the order of ppo_fast.config.NUMBERS. csrc/math/surrogate.h: LossNumbers."""
    return Numbers(
        clip_lo=(1.0 - tl.load(numbers)).to(T),
        clip_hi=(1.0 + tl.load(numbers + 1)).to(T),
        dual_clip=tl.load(numbers + 2).to(T),
        ratio_cap=tl.load(numbers + 3).to(T),
        log_ratio_clamp=tl.load(numbers + 4).to(T),
        huber_delta=tl.load(numbers + 5).to(T),
        value_clip=tl.load(numbers + 6).to(T),
        value_coef=tl.load(numbers + 7).to(T),
        entropy_coef=tl.load(numbers + 8).to(T),
        kl_coef=tl.load(numbers + 9).to(T),
        kl_clamp=tl.load(numbers + 10).to(T),
        kl_value_clamp=tl.load(numbers + 11).to(T),
        rollout_low=tl.load(numbers + 13).to(T),
        rollout_high=tl.load(numbers + 14).to(T),
        clip_low=tl.load(numbers).to(T),
        clip_high=tl.load(numbers + 1).to(T),
        tau_positive=tl.load(numbers + 15).to(T),
        tau_negative=tl.load(numbers + 16).to(T),
        dro_beta=tl.load(numbers + 17).to(T),
    )


# --- elementary -------------------------------------------------------------------------------------------------------


@triton.jit
def clamp_of(x, low, high):
    """torch.clamp: the bounds themselves are inside, and NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def larger_or_second(a, b):
    """The larger one; b where either is NaN."""
    return tl.where(a > b, a, b)


@triton.jit
def exp_series(r):
    """(e^r - 1 - r)/r² for |r| <= ½·ln 2. csrc/math/elementary.h has the same coefficients."""
    if r.dtype == tl.float64:
        p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0
        p = p * r + 1.0 / 39916800.0
        p = p * r + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
    else:
        p = r * 1.9875691500e-4 + 1.3981999507e-3
        p = p * r + 8.3334519073e-3
        p = p * r + 4.1665795894e-2
        p = p * r + 1.6666665459e-1
    return p * r + 0.5


@triton.jit
def beyond_linear(x, e):
    """e^x - 1 - x from x and e = e^x. csrc/math/elementary.h: exponential.

    Near 0 that difference cancels; there, with h = x/2 and b = e^h - 1 - h from its series, it is (h + b)² + 2·b.
    """
    h = 0.5 * x
    b = exp_series(h) * (h * h)
    m = h + b
    return tl.where(tl.abs(x) <= LOG_2, m * m + 2.0 * b, (e - 1.0) - x)


@triton.jit
def log1p_of(x):
    """log(1 + x) for x in [0, 1]: log(u)·x/(u - 1) with u = 1 + x rounded takes the rounding back out."""
    u = 1.0 + x
    gap = u - 1.0
    return tl.where(gap == 0.0, x, tl.log(u) * (x / tl.where(gap == 0.0, 1.0, gap)))


@triton.jit
def softplus(x):
    """log(1 + e^x), never overflowing. csrc/math/elementary.h."""
    return tl.where(x > 0.0, x, 0.0) + log1p_of(tl.exp(-tl.abs(x)))


# --- policy -----------------------------------------------------------------------------------------------------------


class Surrogate(NamedTuple):
    """grad: d loss / d log_prob."""

    loss: tl.tensor
    grad: tl.tensor
    low: tl.tensor
    high: tl.tensor
    dual_clipped: tl.tensor


@triton.jit
def surrogate(ratio, advantage, c, S: tl.constexpr):
    """max(-A·min(r, cap), -A·clip(r, lo, hi)); where A < 0 at most -c·A. csrc/math/surrogate.h.

    The derivative of -A·r with respect to log r is -A·r again; a maximum that ties splits ½/½, a clip passes on its edge.
    """
    minus_a = -advantage
    low = ratio < c.clip_lo
    high = ratio > c.clip_hi
    clipped = minus_a * tl.where(low, c.clip_lo, tl.where(high, c.clip_hi, ratio))
    unclipped = minus_a * ratio
    if S.ratio_cap:
        below_cap = tl.where(ratio <= c.ratio_cap, unclipped, 0.0)
        passed = tl.where(low | high, 0.0, unclipped)
        unclipped = minus_a * tl.where(ratio > c.ratio_cap, c.ratio_cap, ratio)
        share = tl.where(unclipped > clipped, 1.0, tl.where(unclipped == clipped, 0.5, 0.0)).to(ratio.dtype)
        grad = share * below_cap + (1.0 - share) * passed
    else:
        grad = tl.where((low | high) & ~(unclipped > clipped), 0.0, unclipped)
    loss = larger_or_second(clipped, unclipped)  # a clip of a NaN is not one: NaN where either is
    dual_clipped = low & high  # nowhere
    if S.dual_clip:
        ceiling = c.dual_clip * minus_a
        negative = minus_a > 0.0
        dual_clipped = negative & (loss > ceiling)
        grad = tl.where(dual_clipped, 0.0, tl.where(negative & (loss == ceiling), 0.5 * grad, grad))
        loss = tl.where(dual_clipped, ceiling, loss)
    return Surrogate(loss, grad, low, high, dual_clipped)


class Term(NamedTuple):
    """A policy's loss and grad: d loss / d log_prob."""

    loss: tl.tensor
    grad: tl.tensor


@triton.jit
def sapo(ratio, advantage, c):
    """-4/τ·A·σ(τ(r - 1)), τ by the sign of A; its derivative is -4·A·r·σ·(1 - σ), 0 where 1 - σ is. csrc/math/surrogate.h."""
    minus_a = -advantage
    tau = tl.where(advantage > 0.0, c.tau_positive, c.tau_negative)
    z = tau * (ratio - 1.0)
    e = tl.exp(-tl.abs(z))
    near = 1.0 / (1.0 + e)
    far = e * near
    gate = tl.where(z >= 0.0, near, tl.where(z < 0.0, far, z))
    rest = tl.where(z >= 0.0, far, near)
    return Term(minus_a * (gate * (4.0 / tau)),
                tl.where(rest == 0.0, minus_a * 0.0, minus_a * (4.0 * (gate * rest) * ratio)))  # fmt: skip


class TooFar(NamedTuple):
    low: tl.tensor
    high: tl.tensor


@triton.jit
def too_far(log_prob, old_log_prob, advantage, c, S: tl.constexpr):
    """Where the probability p of the token went too far from q, its old one; NaN nowhere. csrc/math/surrogate.h."""
    p = tl.exp(log_prob)
    q = tl.exp(old_log_prob)
    up = advantage > 0.0
    down = advantage <= 0.0
    if S.policy == "dppo_tv":
        return TooFar(down & (p - q < -c.clip_low), up & (p - q > c.clip_high))
    else:
        other = tl.log(((1.0 - q) + 1e-8) / ((1.0 - p) + 1e-8))
        kl = q * (old_log_prob - log_prob) + (1.0 - q) * other
        return TooFar(down & (kl > c.clip_low) & (p < q), up & (kl > c.clip_high) & (p > q))


@triton.jit
def policy_term(log_prob, old_log_prob, d, ratio, advantage, c, S: tl.constexpr):
    """LossConfig.policy of a token, d inside the log-ratio clamp or not, ratio = e^d. csrc/math/surrogate.h."""
    minus_a = -advantage
    low = ratio < c.clip_lo
    high = ratio > c.clip_hi
    nowhere = low & high
    if S.policy == "ppo":
        return surrogate(ratio, advantage, c, S)
    elif S.policy == "cispo":
        grad = minus_a * tl.where(low, c.clip_lo, tl.where(high, c.clip_hi, ratio))
        return Surrogate(grad * log_prob, grad, low, high, nowhere)
    elif S.policy == "sapo":
        s = sapo(ratio, advantage, c)
        return Surrogate(s.loss, s.grad, low, high, nowhere)
    elif S.policy == "dppo_tv" or S.policy == "dppo_kl":
        out = too_far(log_prob, old_log_prob, advantage, c, S)
        capped = ratio
        if S.ratio_cap:
            capped = tl.where(ratio > c.ratio_cap, c.ratio_cap, ratio)
        grad = minus_a * capped
        dropped = out.low | out.high
        return Surrogate(
            tl.where(dropped, 0.0, grad * log_prob), tl.where(dropped, 0.0, grad), out.low, out.high, nowhere
        )
    elif S.policy == "dro":
        pull = c.dro_beta * d
        loss = minus_a * log_prob + 0.5 * (pull * d)
        if S.log_ratio_clamp:
            pull = tl.where(d == log_prob - old_log_prob, pull, 0.0)
        return Surrogate(loss, minus_a + pull, low, high, nowhere)
    elif S.policy == "reinforce":
        return Surrogate(minus_a * log_prob, minus_a, low, high, nowhere)
    else:
        return Surrogate(minus_a * ratio, minus_a * ratio, low, high, nowhere)


@triton.jit
def rollout_weight(log_rho, c, S: tl.constexpr):
    """ρ = exp(old_log_prob - rollout_log_prob): min(ρ, high), or ρ inside [low, high] and else 0. csrc/cpu/ppo_loss.inc."""
    rho = tl.exp(log_rho)
    if S.rollout_correction == "tis":
        return tl.where(rho > c.rollout_high, c.rollout_high, rho)
    else:
        return tl.where((rho >= c.rollout_low) & (rho <= c.rollout_high), rho, 0.0)


# --- value ------------------------------------------------------------------------------------------------------------


class Penalty(NamedTuple):
    loss: tl.tensor
    half_slope: tl.tensor


@triton.jit
def penalty(e, c, S: tl.constexpr):
    """f(e) = e², or beyond δ: 2δ|e| - δ²; and f'(e)/2. csrc/math/value_loss.h."""
    loss = e * e
    half_slope = e
    if S.value_loss == "huber":
        d = c.huber_delta
        size = tl.abs(e)
        loss = tl.where(size > d, (2.0 * d) * size - d * d, loss)
        half_slope = tl.where(size > d, tl.where(e > 0.0, d, -d), half_slope)
    return Penalty(loss, half_slope)


class ValueTerm(NamedTuple):
    """The loss before its ½ (value_half), and half of its derivative."""

    loss: tl.tensor
    half_grad: tl.tensor
    clipped: tl.tensor


@triton.jit
def value_term(value, old_value, target, c, S: tl.constexpr):
    """f(v - R), and with a value clip its three kinds. csrc/math/value_loss.h."""
    free = penalty(value - target, c, S)
    loss = free.loss
    grad = free.half_slope
    clipped = (loss < 0.0) & (loss > 0.0)  # nowhere
    if S.value_clip:
        bound = c.value_clip
        if S.value_clip_mode == "error":
            clipped = loss > bound
            loss = tl.where(clipped, bound, loss)
            grad = tl.where(clipped, 0.0, grad)
        else:
            step = value - old_value
            outside = (step < -bound) | (step > bound)
            near = penalty((old_value + clamp_of(step, -bound, bound)) - target, c, S)
            near_grad = tl.where(outside, 0.0, near.half_slope)
            if S.value_clip_mode == "max":
                clipped = (near.loss > loss) & outside
                tie = 0.5 * (grad + near_grad)
                grad = tl.where(loss > near.loss, grad, tl.where(loss == near.loss, tie, near_grad))
                loss = tl.where((loss > near.loss) | (loss != loss), loss, near.loss)
            else:
                clipped = outside
                loss = near.loss
                grad = near_grad
    return ValueTerm(loss, grad, clipped)


# --- KL ---------------------------------------------------------------------------------------------------------------


class KlTerm(NamedTuple):
    """grad: d loss / d log_prob."""

    loss: tl.tensor
    grad: tl.tensor


@triton.jit
def kl_term(u, ratio, moves, c, S: tl.constexpr):
    """Estimates of KL(policy || reference) from u = ref_log_prob - log_prob. csrc/math/kl.h.

    `ratio` and `moves`, whether it has a derivative, are read for a KL weighted by the ratio.
    """
    unclamped = u
    alive = (u == u) | (u != u)  # everywhere
    if S.kl_clamp:
        alive = ~((u < -c.kl_clamp) | (u > c.kl_clamp))
        u = clamp_of(u, -c.kl_clamp, c.kl_clamp)
    if S.kl == "k1":
        k = -u
        grad = tl.full(u.shape, 1.0, u.dtype)
    elif S.kl == "abs":
        k = tl.abs(u)
        grad = tl.where(u > 0.0, -1.0, tl.where(u < 0.0, 1.0, 0.0)).to(u.dtype)
    elif S.kl == "k2":
        k = 0.5 * u * u
        grad = -u
    else:
        e = tl.exp(u)
        k = beyond_linear(u, e)
        grad = 1.0 - e
    if S.kl_weight == "ratio":
        grad = ratio * tl.where(moves, grad + k, grad)
        k = ratio * k
    elif S.kl_weight == "score":
        grad = grad + k
    if S.kl_value_clamp:
        alive = alive & ~((k < -c.kl_value_clamp) | (k > c.kl_value_clamp))
        k = clamp_of(k, -c.kl_value_clamp, c.kl_value_clamp)
    grad = tl.where(alive, grad, 0.0)
    if S.kl_gradient == "k2":
        grad = -unclamped
    return KlTerm(k, grad)


# --- categorical ------------------------------------------------------------------------------------------------------


@triton.jit
def softmax_exponent(u):
    """u = logit - largest (or log p) held at the floor, where e^u is taken as 0 and u·e^u is still a number.
    csrc/math/categorical.h."""
    FLOOR: tl.constexpr = -708.0 if u.dtype == tl.float64 else -87.0
    return tl.where(u < FLOOR, FLOOR, u)


@triton.jit
def exp_floored(u):
    """e^u, and 0 at the floor itself. csrc/math/elementary.h."""
    FLOOR: tl.constexpr = -708.0 if u.dtype == tl.float64 else -87.0
    return tl.where(u == FLOOR, 0.0, tl.exp(u))


@triton.jit
def softmax_entropy(log_sum, total, weighted):
    """From s = Σ e^u and w = Σ u·e^u. Both terms are >= 0: nothing cancels. csrc/math/categorical.h."""
    return log_sum - weighted / total


@triton.jit
def softmax_grad(log_p, p, entropy, g, h):
    """d/d logit of g·log_prob + h·entropy, but for the +g of the action taken. csrc/math/categorical.h."""
    return -(g + h * (log_p + entropy)) * p


# --- normal -----------------------------------------------------------------------------------------------------------


@triton.jit
def normal_log_density(z, log_std):
    """Of one dimension, z = (action - mean)/std. csrc/math/normal.h."""
    return -0.5 * (z * z) - (log_std + HALF_LOG_2PI)


@triton.jit
def normal_entropy(log_std):
    """Of one dimension. csrc/math/normal.h."""
    return log_std + (0.5 + HALF_LOG_2PI)


@triton.jit
def log_tanh_slope(x):
    """log(1 - tanh² x) without cancellation. csrc/math/normal.h."""
    return 2.0 * ((LOG_2 - x) - softplus(-2.0 * x))
