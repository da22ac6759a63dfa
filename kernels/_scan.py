"""Backward scans x_t = a_t + b_t·x_{t+1} over time: gae, vtrace and discounted_returns, one code for the three.

Time is cut into segments of STEPS, counted from the start of a sequence. The x that enters a segment is found by applying
those behind it one by one, each as one affine map; inside it goes step by step. That order of association is the same
everywhere: a sequence has the same bits in every layout, alone, in a batch, packed or padded. Where c̄ > 1 a product of
vtrace's ratios could overflow that step by step meets a 0: there segments follow one another step by step too.

Two walkers, each with the next loads under way while it computes. `scan_columns` has a column in each lane and one segment
of it at a time: for [T, N] with columns enough to fill a GPU. `scan_rows` has LANES segments of one column in its lanes: for
steps that lie side by side, [N, T], [T] or packed [M], and for few columns.

With moments a program leaves those of its first output's elements too, and its neighbours' are joined after that.

Bytes a step, float32 with bool `terminated`: gae 17, vtrace 21, discounted_returns 9; a final value is read only where a
step is truncated and not terminated.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _reduce
from ._launch import launch
from ._rows import as_type, blocks, compute_type

LANES = 32  # of a program: a warp
STEPS = 8  # of a segment, whose loads are under way together; _spread and _gathered know that they are 2³
ENOUGH_COLUMNS = 2048  # from so many on a lane for each: fewer have more to gain from segments side by side

_SIZES = ["T", "N", "gamma_stride", "lam_stride"]

# --- one step ---------------------------------------------------------------------------------------------------------


@triton.jit
def transition(reward, value, log_rho, following, final, terminated, truncated, gamma, decay, rho_clip, c_clip):
    """(V(s_{t+1}), a, b, ρ clipped) of a step. csrc/math/advantage.h.

    gae, and discounted returns as its V = 0, λ = 1: a = r + γ·V(s_{t+1}) - V, b = decay = γλ. With log_rho vtrace:
    a = min(ρ̄, ρ)·(the same), b = γ·λ·min(c̄, ρ), decay = λ.
    """
    if truncated is not None:
        following = tl.where(truncated, final, following)
    if terminated is not None:
        following = tl.where(terminated, 0.0, following)
    a = tl.fma(gamma, following, reward) - value
    b = decay
    clipped = a
    if log_rho is not None:
        ratio = tl.exp(log_rho)
        clipped = tl.where(ratio > rho_clip, rho_clip, ratio)
        a = clipped * a
        b = gamma * (decay * tl.where(ratio > c_clip, c_clip, ratio))
    return following, a, b, clipped


@triton.jit
def advance(a, b, cut, x):
    """x_t from x_{t+1}. Where `cut`, nothing of it may come through: it is deselected, not multiplied by 0."""
    return tl.where(cut, a, tl.fma(b, x, a))


@triton.jit
def compose(late_a, late_b, late_cut, a, b, cut):
    """A later step, then an earlier one, as one."""
    return advance(a, b, cut, late_a), b * late_b, cut | late_cut


@triton.jit
def kept(x, keep):
    """0 where a mask says so, whatever x holds."""
    if keep is None:
        return x
    else:
        return tl.where(keep, x, 0.0)


@triton.jit
def read_rates(
    gammas, lams, gamma, lam, gamma_stride, lam_stride, i, inside, VTRACE: tl.constexpr, DTYPE: tl.constexpr
):
    """(γ, decay): numbers, or tensors of one a column; their product is taken in float64, as csrc/math/advantage.h does."""
    if gammas is None:
        g = tl.full(i.shape, gamma, tl.float64)
    else:
        g = as_type(tl.load(gammas + i * gamma_stride, mask=inside, other=0.0), tl.float64)
    if lams is None:
        decay = tl.full(i.shape, lam, tl.float64)
    else:
        decay = as_type(tl.load(lams + i * lam_stride, mask=inside, other=0.0), tl.float64)
    if not VTRACE:
        decay = g * decay
    return g.to(DTYPE), decay.to(DTYPE)


# --- a segment in each lane ---------------------------------------------------------------------------------------------


@triton.jit
def open_step(
    r, v, log_rhos, e, u, finals, m, inside, j: tl.constexpr, following, g, decay, rho_bar, c_bar, CARRY: tl.constexpr
):  # fmt: skip
    """Step j of a segment: (reward, value, V(s_{t+1}), ρ clipped, a, b, cut, whether it is shown, V that step j - 1 sees).

    Each argument up to `inside` has one block for each step, () where the stream is absent. `following`: V that step j
    sees. A step that a mask passes over, or that is not inside, is x_t = x_{t+1}.
    """
    dtype: tl.constexpr = following.dtype
    keep = m[j] != 0 if len(m) > 0 else None
    reward = kept(as_type(r[j], dtype), keep)
    value = kept(as_type(v[j], dtype), keep) if len(v) > 0 else tl.zeros(following.shape, dtype)
    log_rho = kept(as_type(log_rhos[j], dtype), keep) if len(log_rhos) > 0 else None
    terminated = e[j] != 0 if len(e) > 0 else None
    truncated = u[j] != 0 if len(u) > 0 else None
    final = as_type(finals[j], dtype) if len(u) > 0 else None
    bootstrap, a, b, clipped = transition(
        reward, value, log_rho, following, final, terminated, truncated, g, decay, rho_bar, c_bar
    )
    counts = inside[j] & keep if CARRY and len(m) > 0 else inside[j]
    cut = counts & ~counts  # nowhere
    if terminated is not None:
        cut = cut | (counts & terminated)
    if truncated is not None:
        cut = cut | (counts & truncated)
    shown = keep if len(m) > 0 else inside[j]
    a = tl.where(counts, a, 0.0)
    b = tl.where(counts, b, 1.0)
    return reward, value, bootstrap, clipped, a, b, cut, shown, tl.where(counts, value, following)


@triton.jit
def outputs(reward, value, bootstrap, clipped, cut, shown, g, x, now, VTRACE: tl.constexpr):
    """Of a step with x_t = now and x_{t+1} = x, 0 where masked: advantage and return; of vtrace target and advantage."""
    if VTRACE:
        target = bootstrap + tl.where(cut, 0.0, x)  # vs_{t+1}
        return kept(value + now, shown), kept(clipped * (tl.fma(g, target, reward) - value), shown)
    else:
        return kept(now, shown), kept(now + value, shown)


# --- a column in each lane ----------------------------------------------------------------------------------------------


@triton.jit
def _down(stream, at, step, inside, STEPS: tl.constexpr):
    """Each column's steps; () where the stream is absent."""
    found = ()
    if stream is not None:
        for j in tl.static_range(STEPS):
            found += (tl.load(stream + at + j * step, mask=inside[j], other=0),)
    return found


@triton.jit
def _inside(present, t, T, STEPS: tl.constexpr):
    """Which steps of the segment that begins at t there are; t may be before the first."""
    found = ()
    for j in tl.static_range(STEPS):
        found += (present & (t >= 0) & (t + j < T),)
    return found


@triton.jit
def _segment(rewards, values, log_rhos, terminated, truncated, mask, at, step, inside, STEPS: tl.constexpr):
    """Each stream's steps of a segment."""
    return (
        _down(rewards, at, step, inside, STEPS),
        _down(values, at, step, inside, STEPS),
        _down(log_rhos, at, step, inside, STEPS),
        _down(terminated, at, step, inside, STEPS),
        _down(truncated, at, step, inside, STEPS),
        _down(mask, at, step, inside, STEPS),
    )


@triton.jit(do_not_specialize=_SIZES)
def scan_columns(
    rewards, values, log_rhos, terminated, truncated, final_values, mask, last_values, gammas, lams, gamma: tl.float64,
    lam: tl.float64, rho_clip: tl.float64, c_clip: tl.float64, first, second, moments, T: tl.int64, N: tl.int64,
    gamma_stride: tl.int64, lam_stride: tl.int64,
    CARRY: tl.constexpr, TIME_MAJOR: tl.constexpr, AHEAD: tl.constexpr, DTYPE: tl.constexpr, LANES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """LANES columns of [T, N], or of [N, T], a program. first, second: advantages and returns; of vtrace its targets
    and advantages. moments: [3, programs], or absent. AHEAD: a segment is applied as one affine map."""
    n = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    present = n < N
    step = N if TIME_MAJOR else 1
    VTRACE: tl.constexpr = log_rhos is not None
    g, decay = read_rates(gammas, lams, gamma, lam, gamma_stride, lam_stride, n, present, VTRACE, DTYPE)
    rho_bar = tl.full((), rho_clip, DTYPE)
    c_bar = tl.full((), c_clip, DTYPE)
    zero = tl.zeros((LANES,), DTYPE)
    last = zero
    if last_values is not None:
        last = as_type(tl.load(last_values + n, mask=present, other=0.0), DTYPE)
    x = zero if values is not None else last
    following = last if values is not None else zero
    if moments is not None:
        sums = _reduce.no_sums(LANES)
    t = (T - 1) // STEPS * STEPS
    at = (n if TIME_MAJOR else n * T) + t * step
    inside = _inside(present, t, T, STEPS)
    ahead = _segment(rewards, values, log_rhos, terminated, truncated, mask, at, step, inside, STEPS)
    while t >= 0:
        r, v, rho, e, u, m = ahead
        inside = _inside(present, t - STEPS, T, STEPS)
        ahead = _segment(rewards, values, log_rhos, terminated, truncated, mask, at - STEPS * step, step, inside, STEPS)
        inside = _inside(present, t, T, STEPS)
        finals = ()
        if truncated is not None:
            read = ()
            for j in tl.static_range(STEPS):
                needed = inside[j] & (u[j] != 0)
                read += (needed & (e[j] == 0) if terminated is not None else needed,)
            finals = _down(final_values, at, step, read, STEPS)
        leaving = x
        all_a = zero
        all_b = zero + 1.0
        all_cut = n < 0
        for j in tl.static_range(STEPS - 1, -1, -1):
            reward, value, bootstrap, clipped, a, b, cut, shown, following = open_step(
                r, v, rho, e, u, finals, m, inside, j, following, g, decay, rho_bar, c_bar, CARRY
            )
            now = advance(a, b, cut, leaving)
            one, two = outputs(reward, value, bootstrap, clipped, cut, shown, g, leaving, now, VTRACE)
            tl.store(first + at + j * step, one, mask=inside[j])
            if second is not None:
                tl.store(second + at + j * step, two, mask=inside[j])
            if moments is not None:
                sums = _reduce.add_to_sums(sums, one, shown)
            all_a, all_b, all_cut = compose(all_a, all_b, all_cut, a, b, cut)
            leaving = now
        x = advance(all_a, all_b, all_cut, x) if AHEAD else leaving
        t -= STEPS
        at -= STEPS * step
    if moments is not None:
        _reduce.store_moments(moments, tl.program_id(0), tl.num_programs(0), _reduce.moments_of_sums(sums))


# --- the segments of one column in the lanes ----------------------------------------------------------------------------


@triton.jit
def _spread(x, LANES: tl.constexpr, STEPS: tl.constexpr):
    """[LANES · STEPS], in the order of time, as a block [LANES] for each step of a segment."""
    parts = (tl.reshape(x, (LANES, STEPS)),)
    for level in tl.static_range(3):  # halves, quarters, steps
        finer = ()
        for i in tl.static_range(1 << level):
            halves = tl.reshape(parts[i], (LANES, 2, STEPS >> (level + 1)))
            early, late = tl.split(tl.permute(halves, (0, 2, 1)))
            finer += (early, late)
        parts = finer
    found = ()
    for j in tl.static_range(STEPS):
        found += (tl.reshape(parts[j], (LANES,)),)
    return found


@triton.jit
def _gathered(parts, LANES: tl.constexpr, STEPS: tl.constexpr):
    """`_spread` backwards, from the last step's block to the first's."""
    in_time = ()
    for j in tl.static_range(STEPS - 1, -1, -1):
        in_time += (parts[j],)
    parts = in_time
    for level in tl.static_range(3):  # each join adds the next lower bit of the step
        joined = ()
        for i in tl.static_range(STEPS >> (level + 1)):
            joined += (tl.join(parts[i], parts[i + (STEPS >> (level + 1))]),)
        parts = joined
    return tl.reshape(parts[0], (LANES * STEPS,))


@triton.jit
def _tile(stream, at, there):
    """() where the stream is absent."""
    found = ()
    if stream is not None:
        found += (tl.load(stream + at, mask=there, other=0),)
    return found


@triton.jit
def _tiles(
    rewards, values, log_rhos, terminated, truncated, mask, begin, start, end, step, LANES: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """(place in memory, what is there, then each stream) of LANES segments; `start` may be before the first."""
    t = start + tl.arange(0, LANES * STEPS)
    there = (t >= 0) & (t < end)
    at = begin + t * step
    return (
        at,
        there,
        _tile(rewards, at, there),
        _tile(values, at, there),
        _tile(log_rhos, at, there),
        _tile(terminated, at, there),
        _tile(truncated, at, there),
        _tile(mask, at, there),
    )


@triton.jit
def _of_lane(x, k):
    """x of lane k, in every lane."""
    return tl.gather(x, tl.zeros(x.shape, tl.int32) + k, 0)


@triton.jit
def _held(border, T):
    """In [0, T]: borders lie on the device, where no one has checked them."""
    return tl.where(border < 0, 0, tl.where(border > T, T, border))


@triton.jit(do_not_specialize=_SIZES)
def scan_rows(
    rewards, values, log_rhos, terminated, truncated, final_values, mask, last_values, gammas, lams, gamma: tl.float64,
    lam: tl.float64, rho_clip: tl.float64, c_clip: tl.float64, bounds, first, second, moments, T: tl.int64, N: tl.int64,
    gamma_stride: tl.int64, lam_stride: tl.int64,
    CARRY: tl.constexpr, TIME_MAJOR: tl.constexpr, DTYPE: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Column n of [T, N] or [N, T], or sequence n of [M = T] between its borders; LANES segments at a time, from the last
    to the first. moments: [3, programs], or absent."""
    column = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    n = column + tl.zeros((LANES,), tl.int64)
    begin = column if TIME_MAJOR else column * T
    end = T
    if bounds is not None:
        begin = _held(tl.load(bounds + column).to(tl.int64), T)
        end = _held(tl.load(bounds + column + 1).to(tl.int64), T) - begin
    step = N if TIME_MAJOR else 1
    VTRACE: tl.constexpr = log_rhos is not None
    g, decay = read_rates(gammas, lams, gamma, lam, gamma_stride, lam_stride, n, n >= 0, VTRACE, DTYPE)
    rho_bar = tl.full((), rho_clip, DTYPE)
    c_bar = tl.full((), c_clip, DTYPE)
    zero = tl.zeros((LANES,), DTYPE)
    last = zero
    if last_values is not None:
        last = as_type(tl.load(last_values + n), DTYPE)
    x = zero if values is not None else last
    behind = last if values is not None else zero  # V of the first step behind these segments that counts
    if moments is not None:
        sums = _reduce.no_sums(LANES)
    start = (end + LANES * STEPS - 1) // (LANES * STEPS) * (LANES * STEPS) - LANES * STEPS
    ahead = _tiles(rewards, values, log_rhos, terminated, truncated, mask, begin, start, end, step, LANES, STEPS)
    while start >= 0:
        at, there, tile_r, tile_v, tile_rho, tile_e, tile_u, tile_m = ahead
        ahead = _tiles(
            rewards,
            values,
            log_rhos,
            terminated,
            truncated,
            mask,
            begin,
            start - LANES * STEPS,
            end,
            step,
            LANES,
            STEPS,
        )
        r = _spread(as_type(tile_r[0], DTYPE), LANES, STEPS)
        v = _spread(as_type(tile_v[0], DTYPE), LANES, STEPS) if values is not None else ()
        rho = _spread(as_type(tile_rho[0], DTYPE), LANES, STEPS) if log_rhos is not None else ()
        flags = tl.zeros((LANES * STEPS,), tl.int32)  # all in one: what is spread goes by way of shared memory
        if terminated is not None:
            flags += (tile_e[0] != 0).to(tl.int32)
        if mask is not None:
            flags += (tile_m[0] != 0).to(tl.int32) * 2
        finals = ()
        if truncated is not None:
            read = there & (tile_u[0] != 0) & (flags & 1 == 0)
            flags += (tile_u[0] != 0).to(tl.int32) * 4
            finals = _spread(as_type(tl.load(final_values + at, mask=read, other=0.0), DTYPE), LANES, STEPS)
        flags = _spread(flags, LANES, STEPS)
        e = ()
        u = ()
        m = ()
        inside = ()
        for j in tl.static_range(STEPS):
            inside += (start + lane * STEPS + j < end,)
            if terminated is not None:
                e += (flags[j] & 1,)
            if mask is not None:
                m += (flags[j] & 2,)
            if truncated is not None:
                u += (flags[j] & 4,)

        following = zero
        if values is not None:
            if CARRY and mask is not None:
                own = zero  # V of a segment's first step that counts, and whether it has one
                has = lane * 0
                for j in tl.static_range(STEPS - 1, -1, -1):
                    own = tl.where(m[j] != 0, v[j], own)
                    has = has | m[j]
                for i in range(LANES):
                    k = LANES - 1 - i
                    following = tl.where(lane == k, behind, following)
                    behind = tl.where(_of_lane(has, k) != 0, _of_lane(own, k), behind)
            else:
                after = start + (lane + 1) * STEPS
                following = as_type(tl.load(values + begin + after * step, mask=after < end, other=0.0), DTYPE)
                if mask is not None:
                    counts = tl.load(mask + begin + after * step, mask=after < end, other=0) != 0
                    following = kept(following, counts)
                following = tl.where(after < end, following, last)

        all_a = zero
        all_b = zero + 1.0
        all_cut = lane < 0
        seen = following
        for j in tl.static_range(STEPS - 1, -1, -1):
            _, _, _, _, a, b, cut, _, seen = open_step(
                r, v, rho, e, u, finals, m, inside, j, seen, g, decay, rho_bar, c_bar, CARRY
            )
            all_a, all_b, all_cut = compose(all_a, all_b, all_cut, a, b, cut)
        cuts = all_cut.to(tl.int32)
        entering = zero
        for i in range(LANES):
            k = LANES - 1 - i
            entering = tl.where(lane == k, x, entering)
            x = advance(_of_lane(all_a, k), _of_lane(all_b, k), _of_lane(cuts, k) != 0, x)

        of_first = ()
        of_second = ()
        for j in tl.static_range(STEPS - 1, -1, -1):
            reward, value, bootstrap, clipped, a, b, cut, shown, following = open_step(
                r, v, rho, e, u, finals, m, inside, j, following, g, decay, rho_bar, c_bar, CARRY
            )
            now = advance(a, b, cut, entering)
            one, two = outputs(reward, value, bootstrap, clipped, cut, shown, g, entering, now, VTRACE)
            of_first += (one,)
            of_second += (two,)
            if moments is not None:
                sums = _reduce.add_to_sums(sums, one, shown)
            entering = now
        tl.store(first + at, _gathered(of_first, LANES, STEPS), mask=there)
        if second is not None:
            tl.store(second + at, _gathered(of_second, LANES, STEPS), mask=there)
        start -= LANES * STEPS
    if moments is not None:
        _reduce.store_moments(moments, tl.program_id(0), tl.num_programs(0), _reduce.moments_of_sums(sums))


# --- on the host ------------------------------------------------------------------------------------------------------


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rate(x: float | Tensor) -> tuple[Tensor | None, int, float]:
    """As a tensor with the stride of a column, and as a number."""
    if isinstance(x, Tensor):
        return x, x.stride(0) if x.numel() > 1 else 0, 0.0
    return None, 0, float(x)


def _dense(pair: tuple[Tensor, Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Sparse final values as a tensor: NaN where there is no entry; of equal positions the last counts.

    No entry is read back to the host; a position out of range goes to a place past the end.
    """
    index, value = pair
    n = like.numel()
    index = index.long()
    index = torch.where((index >= 0) & (index < n), index, n)
    entry = torch.full((n + 1,), -1, dtype=torch.int64, device=like.device)
    entry.scatter_reduce_(0, index, torch.arange(len(index), device=like.device), "amax")
    value = torch.cat([value.to(dtype), torch.full((1,), torch.nan, dtype=dtype, device=like.device)])
    return value[entry[:n]].view(like.shape)  # entry -1 is the NaN


def scan(
    rewards: Tensor,
    values: Tensor | None,
    log_rhos: Tensor | None,
    last_values: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    final_values: Any,
    mask: Tensor | None,
    carry: bool,
    bounds: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    time_dim: int,
    outputs: tuple[Tensor, Tensor | None],
    clips: tuple[float, float] = (1.0, 1.0),
    moments: Tensor | None = None,
) -> None:
    """Fills the outputs, contiguous in the shape of rewards: [T] or [M], [T, N] or [N, T] by `time_dim`; and `moments` [3]
    of the first one's valid elements, where wanted."""
    if rewards.numel() == 0:
        if moments is not None:
            moments.zero_()
        return
    time_major = rewards.ndim == 2 and time_dim % 2 == 0
    steps = rewards.shape[time_dim]
    n = len(bounds) - 1 if bounds is not None else rewards.numel() // steps
    if truncated is None:
        final_values = None
    elif isinstance(final_values, tuple):
        final_values = _dense(final_values, rewards, outputs[0].dtype)
    gammas, gamma_stride, gamma = _rate(gamma)
    lams, lam_stride, lam = _rate(lam)
    streams = [
        _contiguous(x) for x in (rewards, values, log_rhos, terminated, truncated, final_values, mask, last_values)
    ]
    inputs = (*streams, gammas, lams, gamma, lam, *map(float, clips))
    sizes = (steps, n, gamma_stride, lam_stride)
    ahead = log_rhos is None or clips[1] <= 1
    meta = {"CARRY": carry, "TIME_MAJOR": time_major, "DTYPE": compute_type(outputs[0].dtype), "LANES": LANES,
            "STEPS": STEPS, "num_warps": 1}  # fmt: skip
    by_column = not ahead or (time_major and n >= ENOUGH_COLUMNS)
    programs = blocks(n, LANES) if by_column else n
    partials = None
    if moments is not None:
        partials = moments.view(3, 1) if programs == 1 else _reduce.empty_moments(programs, rewards.device)
    if by_column:
        launch(scan_columns, (programs,), *inputs, *outputs, partials, *sizes, **meta, AHEAD=ahead)
    else:
        launch(scan_rows, (programs,), *inputs, _contiguous(bounds), *outputs, partials, *sizes, **meta)
    if partials is not None:
        _reduce.joined(partials, 1, moments)
