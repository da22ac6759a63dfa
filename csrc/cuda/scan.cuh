// The backward scan that gae, vtrace and discounted_returns share. A thread has sixteen steps (of float64 eight) of one
// column, a segment, in registers; what enters a segment from later ones is found by applying their compositions one by
// one, from the end of the sequence on. That order of association is the same for every layout, tile and batch, so a
// sequence has the same bits wherever it lies. Two walkers: `across`, where columns are neighbours in memory, and
// `along`, where steps are.
//
// Tiles of one column follow one another in time. A tile posts what leaves it at its start, and the one before it waits
// for that (a chained scan): each input is read once. Tiles are taken by ticket, the latest in time first, so whoever
// is waited for is already running. Where c̄ > 1, products of ratios could overflow that step by step meet a 0: then
// segments are solved one after the other.
#pragma once
#include <type_traits>

#include "reduce.cuh"
#include "../math/advantage.h"

namespace pf {
namespace PF_ISA {

template <class T>
constexpr int kSegment = sizeof(T) == 4 ? 16 : 8;  // steps of a thread
constexpr int kAcrossWarps = 8;  // segments of a tile whose columns are neighbours
constexpr int kAlongWarps = 4;  // tiles of a block whose steps are neighbours, a warp each
template <class T>
constexpr int kAlongSteps = kWarp * kSegment<T>;  // steps of such a tile, of one row or of four

// --- posts: a value and whether it is there yet; they start as zeros -------------------------------------------------

template <class T>
struct Post {
  T value;
  uint32_t there;
};

PF_DEV void post(Post<float>* to, float x) {
  const uint64_t both = uint64_t{1} << 32 | static_cast<uint32_t>(bits_of(x));
  *reinterpret_cast<volatile uint64_t*>(to) = both;  // one store: whoever sees the flag sees the value
}
PF_DEV float wait_for(const Post<float>* from) {
  const auto* at = reinterpret_cast<const volatile uint64_t*>(from);
  uint64_t both = *at;
  while (both >> 32 == 0) {
    PF_PAUSE();
    both = *at;
  }
  return of_bits(static_cast<int32_t>(static_cast<uint32_t>(both)));
}
PF_DEV void post(Post<double>* to, double x) {
  *static_cast<volatile double*>(&to->value) = x;
  __threadfence();
  *static_cast<volatile uint32_t*>(&to->there) = 1;
}
PF_DEV double wait_for(const Post<double>* from) {
  while (*static_cast<const volatile uint32_t*>(&from->there) == 0) PF_PAUSE();
  __threadfence();
  return *static_cast<const volatile double*>(&from->value);
}

// What tiles post: the x that leaves a tile, and with masks that carry the value that comes first in it or after it.
template <class T>
struct Posts {
  Post<T>*x, *next;
};

// --- a thread's segment ----------------------------------------------------------------------------------------------

template <class T>
PF_DEV T grid_element(const Grid& g, int64_t t, int64_t n) {
  return element<T>(g.data, g.dtype, t * g.t + n * g.n);
}
PF_DEV bool grid_flag(const Grid& g, int64_t t, int64_t n) { return flag(g.data, g.dtype, t * g.t + n * g.n); }

template <class Op, class T>
struct Segment {
  T reward[kSegment<T>], value[kSegment<T>], log_rho[kSegment<T>];
  uint32_t terminated = 0, truncated = 0, keep = ~0u, inside = 0;  // a bit a step
  T gamma, decay;
  int64_t t, n;  // of the first step, in the grid

  // The rates of its column, in float64 until they are one number.
  PF_DEV void read_rates(const ScanArgs& a, int64_t column) {
    const double g =
        a.gamma.row.data ? element<double>(a.gamma.row.data, a.gamma.row.dtype, column * a.gamma.row.n) : a.gamma.value;
    const double l =
        a.lam.row.data ? element<double>(a.lam.row.data, a.lam.row.dtype, column * a.lam.row.n) : a.lam.value;
    gamma = a.gamma.row.data ? element<T>(a.gamma.row.data, a.gamma.row.dtype, column * a.gamma.row.n)
                             : static_cast<T>(a.gamma.value);
    decay = static_cast<T>(Op::decay(g, l));
  }
  static PF_DEV Presence presence(const ScanArgs& a) {
    return {a.terminated.data != nullptr, a.truncated.data != nullptr, a.mask.data != nullptr, a.carry, true};
  }
  PF_DEV bool is_kept(int j) const { return (keep & inside) >> j & 1; }
  // The value that an earlier step sees behind it when `next` comes after step j.
  PF_DEV T before(const ScanArgs& a, int j, T next) const {
    if (!(inside >> j & 1)) return next;
    if (!a.mask.data || is_kept(j)) return value[j];
    return a.carry ? next : T(0);
  }

  PF_DEV Step<T, bool> open(const Op& op, const ScanArgs& a, int j, T next, Transition<T, bool>& x) const {
    Inputs<T, bool> in;
    in.reward = reward[j], in.value = value[j], in.log_rho = log_rho[j], in.next = next, in.final = T(0);
    in.terminated = terminated >> j & 1, in.truncated = truncated >> j & 1;
    in.keep = keep >> j & 1, in.inside = inside >> j & 1;
    if (in.truncated && !in.terminated && in.inside) in.final = grid_element<T>(a.final_values, t + j, n);
    return open_step(op, presence(a), in, gamma, decay, x);
  }

  // All steps as one. next: V of the state after the last.
  PF_DEV Step<T, bool> composed(const Op& op, const ScanArgs& a, T next) const {
    Step<T, bool> all{T(0), T(1), false};
#pragma unroll
    for (int j = kSegment<T> - 1; j >= 0; --j) {
      Transition<T, bool> x;
      all = compose(open(op, a, j, next, x), all);
      if constexpr (Op::kValues) next = before(a, j, next);
    }
    return all;
  }
  // From the x that enters it: out[k][j], 0 where masked. Returns the x that leaves it.
  PF_DEV T solve(const Op& op, const ScanArgs& a, T next, T x, T (&out)[2][kSegment<T>]) const {
#pragma unroll
    for (int j = kSegment<T> - 1; j >= 0; --j) {
      Transition<T, bool> transition;
      const auto step = open(op, a, j, next, transition);
      const T now = advance(step, x);
      T result[2] = {T(0), T(0)};
      op.outputs(transition, gamma, now, x, result);
      const bool shown = !a.mask.data || is_kept(j);
#pragma unroll
      for (int k = 0; k < Op::kOutputs; ++k) out[k][j] = shown ? result[k] : T(0);
      x = now;
      if constexpr (Op::kValues) next = before(a, j, next);
    }
    return x;
  }
  // Sums of x where a step counts, and how many do.
  PF_DEV int count_sums(const T (&x)[kSegment<T>], SumsAround<T>& sums) const {
    int count = 0;
#pragma unroll
    for (int j = 0; j < kSegment<T>; ++j) {
      if (is_kept(j)) sums.add(x[j], count == 0), ++count;
    }
    return count;
  }
  // The first step that masks do not pass over.
  PF_DEV bool first_kept(T& first) const {
    bool any = false;
#pragma unroll
    for (int j = kSegment<T> - 1; j >= 0; --j) {
      if (is_kept(j)) first = value[j], any = true;
    }
    return any;
  }
};

// V after the last step of a sequence, or the x there.
template <class T>
PF_DEV T last_of(const ScanArgs& a, int64_t column) {
  return a.last_values.row.data
             ? element<T>(a.last_values.row.data, a.last_values.row.dtype, column * a.last_values.row.n)
             : static_cast<T>(a.last_values.value);
}

// V of step t, as an earlier step sees it: where no mask carries.
template <class T>
PF_DEV T value_behind(const ScanArgs& a, int64_t t, int64_t n) {
  if (a.mask.data && !grid_flag(a.mask, t, n)) return T(0);
  return grid_element<T>(a.values, t, n);
}

// --- across: a lane a column, a warp a segment -----------------------------------------------------------------------

// kPlain: float32 with columns side by side, flags of a byte.
template <bool kPlain, class T>
PF_DEV void read_column(const Grid& g, int64_t t, int64_t n, uint32_t inside, T (&x)[kSegment<T>]) {
#pragma unroll
  for (int j = 0; j < kSegment<T>; ++j) {
    x[j] = T(0);
    if (!(inside >> j & 1)) continue;
    if constexpr (kPlain) {
      x[j] = static_cast<const float*>(g.data)[(t + j) * g.t + n];
    } else {
      x[j] = grid_element<T>(g, t + j, n);
    }
  }
}
template <bool kPlain, class T>
PF_DEV uint32_t read_flags(const Grid& g, int64_t t, int64_t n, uint32_t inside) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kSegment<T>; ++j) {
    if (!(inside >> j & 1)) continue;
    const bool on = kPlain ? static_cast<const uint8_t*>(g.data)[(t + j) * g.t + n] != 0 : grid_flag(g, t + j, n);
    bits |= static_cast<uint32_t>(on) << j;
  }
  return bits;
}

// partials: with kMoments the sums of each tile's first output, by what the tile is, not by when its block came.
template <class Op, class T, bool kChained, bool kMoments, bool kPlain>
__global__ void __launch_bounds__(kAcrossWarps* kWarp, 1)
    across_kernel(const __grid_constant__ ScanArgs a, const Op op, Posts<T> posts, unsigned* ticket, int64_t groups,
                  int64_t tiles, CountedSums* partials) {
  PF_SHARED(unsigned, taken);
  if (threadIdx.x == 0) taken = ticket ? atomicInc(ticket, gridDim.x - 1) : blockIdx.x;
  __syncthreads();
  const int64_t tile = tiles - 1 - static_cast<int64_t>(taken) / groups;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t n = static_cast<int64_t>(taken) % groups * kWarp + lane;
  const bool active = n < a.columns;
  Segment<Op, T> s;
  s.n = n, s.t = (tile * kAcrossWarps + warp) * kSegment<T>;
#pragma unroll
  for (int j = 0; j < kSegment<T>; ++j) s.inside |= static_cast<uint32_t>(active && s.t + j < a.steps) << j;
  read_column<kPlain>(a.rewards, s.t, n, s.inside, s.reward);
  if constexpr (Op::kValues) read_column<kPlain>(a.values, s.t, n, s.inside, s.value);
  if constexpr (Op::kRatios) read_column<kPlain>(a.log_rhos, s.t, n, s.inside, s.log_rho);
  if (a.terminated.data) s.terminated = read_flags<kPlain, T>(a.terminated, s.t, n, s.inside);
  if (a.truncated.data) s.truncated = read_flags<kPlain, T>(a.truncated, s.t, n, s.inside);
  if (a.mask.data) s.keep = read_flags<kPlain, T>(a.mask, s.t, n, s.inside);
  T last = T(0);
  s.gamma = s.decay = T(0);
  if (active) s.read_rates(a, n), last = last_of<T>(a, n);
  const bool is_last = tile == tiles - 1, is_first = tile == 0;
  const int64_t at = tile * a.columns + n;

  PF_SHARED(T[kAcrossWarps][kWarp], first);
  PF_SHARED(uint8_t[kAcrossWarps][kWarp], has);
  T next = T(0);
  if constexpr (Op::kValues) {
    if (a.mask.data && a.carry) {  // the value behind a segment is that of the first step after it that is kept
      T mine = T(0);
      has[warp][lane] = s.first_kept(mine);
      first[warp][lane] = mine;
      __syncthreads();
      bool found = false;
      for (int w = kAcrossWarps - 1; w >= 0; --w) {
        if (has[w][lane] && w > warp) next = first[w][lane], found = true;
      }
      if (warp == 0) {
        // posted before anything is waited for, where the tile itself has it
        const bool own = has[0][lane] || found;
        if (own && !is_first && active) post(posts.next + at, has[0][lane] ? first[0][lane] : next);
      }
      T behind = last;
      bool needed = active && !is_last && !found;
      if (needed) behind = wait_for(posts.next + at + a.columns);
      if (!found) next = behind;
      if (warp == 0 && active && !is_first && !has[0][lane] && !found) post(posts.next + at, next);
    } else if (active) {
      next = s.t + kSegment<T> < a.steps ? value_behind<T>(a, s.t + kSegment<T>, n) : last;
    }
  }

  PF_SHARED(T[kAcrossWarps][kWarp], entering);  // what enters the segment; of the last one, the tile
  T out[2][kSegment<T>];
  const T end = Op::kValues ? T(0) : last;
  if constexpr (kChained) {
    if (warp == kAcrossWarps - 1) entering[warp][lane] = active && !is_last ? wait_for(posts.x + at + a.columns) : end;
#pragma unroll 1
    for (int w = kAcrossWarps - 1; w >= 0; --w) {
      __syncthreads();
      if (w != warp) continue;
      const T leaving = s.solve(op, a, next, entering[w][lane], out);
      if (w > 0) entering[w - 1][lane] = leaving;
      if (w == 0 && active && !is_first) post(posts.x + at, leaving);
    }
  } else {
    PF_SHARED(T[kAcrossWarps][kWarp], offset);
    PF_SHARED(T[kAcrossWarps][kWarp], factor);
    PF_SHARED(uint8_t[kAcrossWarps][kWarp], cut);
    const Step<T, bool> all = s.composed(op, a, next);
    offset[warp][lane] = all.a, factor[warp][lane] = all.b, cut[warp][lane] = all.cut;
    if (warp == 0) entering[0][lane] = active && !is_last ? wait_for(posts.x + at + a.columns) : end;
    __syncthreads();
    T x = entering[0][lane];
    for (int w = kAcrossWarps - 1; w > warp; --w) {
      x = advance(Step<T, bool>{offset[w][lane], factor[w][lane], cut[w][lane] != 0}, x);
    }
    if (warp == 0 && active && !is_first) post(posts.x + at, advance(all, x));
    s.solve(op, a, next, x, out);
  }
#pragma unroll
  for (int k = 0; k < Op::kOutputs; ++k) {
    T* to = static_cast<T*>(a.outputs[k]) + s.t * a.output_t + n;
#pragma unroll
    for (int j = 0; j < kSegment<T>; ++j) {
      if (s.inside >> j & 1) to[j * a.output_t] = out[k][j];
    }
  }
  if constexpr (kMoments) {
    SumsAround<T> sums;
    const int count = s.count_sums(out[0], sums);
    const auto all = sum_of_block<kAcrossWarps>(CountedSums{static_cast<double>(count), sums.wide()});
    if (threadIdx.x == 0) partials[taken] = all;
  }
}

// --- along: a warp a tile, of one row or of four ---------------------------------------------------------------------

// Where element j of a warp's tile lies in shared memory: a lane's segment, and four to spare against bank conflicts.
template <class T>
constexpr int kStaged = kWarp * (kSegment<T> + 4);
template <class T>
PF_DEV int staged(int j) {
  return j + j / kSegment<T> * 4;
}

template <class T>
PF_DEV void stage_to_lane(const T* from, int lane, T (&x)[kSegment<T>]) {
#pragma unroll
  for (int j = 0; j < kSegment<T>; ++j) x[j] = from[lane * (kSegment<T> + 4) + j];
}

// Which row and step the warp's element j is: all rows of a tile are of `steps` elements.
struct Place {
  int64_t t, n;
};
template <int kRows, class T>
PF_DEV Place place(const Place& first, int j) {
  constexpr int kSteps = kAlongSteps<T> / kRows;
  return {first.t + j % kSteps, first.n + j / kSteps};
}

// Elements that lie side by side come side by side, then each lane takes its own sixteen.
template <int kRows, bool kPlain, class T>
PF_DEV void read_row(const Grid& g, const Place& first, int64_t end, int64_t rows, int lane, T* stage,
                     T (&x)[kSegment<T>]) {
  __syncwarp();
  if constexpr (kPlain) {
#pragma unroll
    for (int i = 0; i < kSegment<T> / 4; ++i) {
      const int j = 4 * (lane + kWarp * i);
      const Place p = place<kRows, T>(first, j);
      float four[4] = {0, 0, 0, 0};
      const float* from = static_cast<const float*>(g.data) + p.t + p.n * g.n;
      if (p.n < rows && p.t + 4 <= end) {
        load4(from, four);
      } else if (p.n < rows) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (p.t + k < end) four[k] = from[k];
        }
      }
      store4(stage + staged<T>(j), four);
    }
  } else {
#pragma unroll 4
    for (int i = 0; i < kSegment<T>; ++i) {
      const int j = lane + kWarp * i;
      const Place p = place<kRows, T>(first, j);
      stage[staged<T>(j)] = p.n < rows && p.t < end ? grid_element<T>(g, p.t, p.n) : T(0);
    }
  }
  __syncwarp();
  stage_to_lane(stage, lane, x);
}

template <int kRows, bool kPlain, class T>
PF_DEV void write_row(T* to, int64_t row_stride, const Place& first, int64_t end, int64_t rows, int lane, T* stage,
                      const T (&x)[kSegment<T>]) {
  __syncwarp();
#pragma unroll
  for (int j = 0; j < kSegment<T>; ++j) stage[lane * (kSegment<T> + 4) + j] = x[j];
  __syncwarp();
  if constexpr (kPlain) {
#pragma unroll
    for (int i = 0; i < kSegment<T> / 4; ++i) {
      const int j = 4 * (lane + kWarp * i);
      const Place p = place<kRows, T>(first, j);
      float four[4];
      load4(stage + staged<T>(j), four);
      float* at = to + p.t + p.n * row_stride;
      if (p.n < rows && p.t + 4 <= end) {
        store4(at, four);
      } else if (p.n < rows) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (p.t + k < end) at[k] = four[k];
        }
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSegment<T>; ++i) {
      const int j = lane + kWarp * i;
      const Place p = place<kRows, T>(first, j);
      if (p.n < rows && p.t < end) to[p.t + p.n * row_stride] = stage[staged<T>(j)];
    }
  }
}

// Flags of a lane's sixteen steps: sixteen bytes at once where they lie so.
template <bool kPlain, class T>
PF_DEV uint32_t read_row_flags(const Grid& g, int64_t t, int64_t n, uint32_t inside) {
  if constexpr (kPlain) {
    if (inside == 0xffffu) {
      const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(g.data) + t + n * g.n);
      uint32_t bits = 0;
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < kSegment<T>; ++j) {
        bits |= static_cast<uint32_t>((words[j / 4] >> (8 * (j % 4)) & 0xffu) != 0) << j;
      }
      return bits;
    }
  }
  uint32_t bits = 0;
#pragma unroll 4
  for (int j = 0; j < kSegment<T>; ++j) {
    if (inside >> j & 1) bits |= static_cast<uint32_t>(grid_flag(g, t + j, n)) << j;
  }
  return bits;
}

// Of packed sequences: a sequence has as many slots as it could need, so that which one a slot is follows from the
// borders alone: sequence s has those from bounds[s]/512 + s on.
struct PackedTile {
  int64_t sequence, tile, begin, end;
};
PF_DEV int64_t border(const ScanArgs& a, int64_t s) {  // never outside, whatever they hold
  const int64_t at = a.bounds[s];
  return at < 0 ? 0 : at > a.steps ? a.steps : at;
}
template <class T>
PF_DEV PackedTile packed_tile(const ScanArgs& a, int64_t slot) {
  int64_t low = 0, high = a.columns;  // the last sequence whose first slot is not after `slot`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (border(a, middle) / kAlongSteps<T> + middle <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int64_t begin = border(a, low);
  return {low, slot - (begin / kAlongSteps<T> + low), begin, border(a, low + 1)};
}

// This warp's tile of the block that came as the `taken`-th, if there is one: of kRows rows. With kMoments each lane
// has the sums of its first output.
template <class Op, class T, bool kChained, int kRows, bool kMoments, bool kPlain>
PF_DEV CountedSums along_tile(const ScanArgs& a, const Op& op, const Posts<T>& posts, unsigned taken, int64_t groups,
                              int64_t tiles, T (&stages)[kAlongWarps][kStaged<T>]) {
  constexpr int kLanes = kWarp / kRows;  // of a row
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t k = static_cast<int64_t>(taken) * kAlongWarps + warp;
  Place first;
  int64_t tile, column, end, at, after;  // posts of this tile, and of the one after it in time
  bool is_last;
  if (a.bounds) {
    if (k >= groups) return {};
    const int64_t slot = groups - 1 - k;
    const PackedTile p = packed_tile<T>(a, slot);
    first = {p.begin + p.tile * kAlongSteps<T>, 0};
    if (first.t >= p.end) return {};  // a slot that its sequence does not need
    tile = p.tile, column = p.sequence, end = p.end, at = slot, after = slot + 1;
    is_last = first.t + kAlongSteps<T> >= p.end;
  } else {
    tile = tiles - 1 - k / groups;
    if (tile < 0) return {};
    first = {tile * (kAlongSteps<T> / kRows), k % groups * kRows};
    column = first.n + lane / kLanes, end = a.steps, at = tile * a.columns + column, after = at + a.columns;
    is_last = tile == tiles - 1;
  }
  const int64_t rows = a.bounds ? 1 : a.columns;
  const bool is_first = tile == 0;
  T* stage = stages[warp];
  Segment<Op, T> s;
  s.n = a.bounds ? 0 : column, s.t = first.t + lane % kLanes * kSegment<T>;
  const bool active = s.n < rows;
#pragma unroll
  for (int j = 0; j < kSegment<T>; ++j) s.inside |= static_cast<uint32_t>(active && s.t + j < end) << j;
  read_row<kRows, kPlain>(a.rewards, first, end, rows, lane, stage, s.reward);
  if constexpr (Op::kValues) read_row<kRows, kPlain>(a.values, first, end, rows, lane, stage, s.value);
  if constexpr (Op::kRatios) read_row<kRows, kPlain>(a.log_rhos, first, end, rows, lane, stage, s.log_rho);
  if (a.terminated.data) s.terminated = read_row_flags<kPlain, T>(a.terminated, s.t, s.n, s.inside);
  if (a.truncated.data) s.truncated = read_row_flags<kPlain, T>(a.truncated, s.t, s.n, s.inside);
  if (a.mask.data) s.keep = read_row_flags<kPlain, T>(a.mask, s.t, s.n, s.inside);
  T last = T(0);
  s.gamma = s.decay = T(0);
  if (active) s.read_rates(a, column), last = last_of<T>(a, column);
  const int segment = lane % kLanes;

  T next = T(0);
  if constexpr (Op::kValues) {
    if (a.mask.data && a.carry) {
      T mine = T(0);
      const bool has = s.first_kept(mine);
      bool found = false;
      for (int other = kLanes - 1; other > 0; --other) {
        const T theirs = __shfl_sync(kAllLanes, mine, other, kLanes);
        const bool have = __shfl_sync(kAllLanes, static_cast<int>(has), other, kLanes) != 0;
        if (have && other > segment) next = theirs, found = true;
      }
      if (segment == 0 && !is_first && active && (has || found)) post(posts.next + at, has ? mine : next);
      if (!found) next = active && !is_last ? wait_for(posts.next + after) : last;
      if (segment == 0 && !is_first && active && !has && !found) post(posts.next + at, next);
      __syncwarp();
    } else if (active) {
      next = s.t + kSegment<T> < end ? value_behind<T>(a, s.t + kSegment<T>, s.n) : last;
    }
  }

  T out[2][kSegment<T>];
  const T behind = Op::kValues ? T(0) : last;
  T x = T(0);
  if constexpr (kChained) {
    T entering = active && !is_last ? wait_for(posts.x + after) : behind;
#pragma unroll 1
    for (int turn = kLanes - 1; turn >= 0; --turn) {
      T leaving = T(0);
      if (segment == turn) leaving = s.solve(op, a, next, entering, out);
      __syncwarp();
      leaving = __shfl_sync(kAllLanes, leaving, turn, kLanes);
      if (segment < turn) entering = leaving;
      if (turn == 0 && segment == 0 && active && !is_first) post(posts.x + at, leaving);
    }
  } else {
    const Step<T, bool> all = s.composed(op, a, next);
    x = active && !is_last ? wait_for(posts.x + after) : behind;
    __syncwarp();
    for (int other = kLanes - 1; other > 0; --other) {
      const Step<T, bool> theirs{__shfl_sync(kAllLanes, all.a, other, kLanes),
                                 __shfl_sync(kAllLanes, all.b, other, kLanes),
                                 __shfl_sync(kAllLanes, static_cast<int>(all.cut), other, kLanes) != 0};
      if (other > segment) x = advance(theirs, x);
    }
    if (segment == 0 && active && !is_first) post(posts.x + at, advance(all, x));
    s.solve(op, a, next, x, out);
  }
#pragma unroll
  for (int i = 0; i < Op::kOutputs; ++i) {
    write_row<kRows, kPlain>(static_cast<T*>(a.outputs[i]), a.output_n, first, end, rows, lane, stage, out[i]);
  }
  if constexpr (kMoments) {
    SumsAround<T> sums;
    const int count = s.count_sums(out[0], sums);
    return {static_cast<double>(count), sums.wide()};
  }
  return {};
}

// kPlain: float32 and bytes in rows that start at sixteen bytes.
template <class Op, class T, bool kChained, int kRows, bool kMoments, bool kPlain>
__global__ void __launch_bounds__(kAlongWarps* kWarp, 1)
    along_kernel(const __grid_constant__ ScanArgs a, const Op op, Posts<T> posts, unsigned* ticket, int64_t groups,
                 int64_t tiles, CountedSums* partials) {
  PF_SHARED(unsigned, taken);
  PF_SHARED(T[kAlongWarps][kStaged<T>], stages);
  if (threadIdx.x == 0) taken = ticket ? atomicInc(ticket, gridDim.x - 1) : blockIdx.x;
  __syncthreads();
  const CountedSums sums =
      along_tile<Op, T, kChained, kRows, kMoments, kPlain>(a, op, posts, taken, groups, tiles, stages);
  if constexpr (kMoments) {
    const auto all = sum_of_block<kAlongWarps>(sums);
    if (threadIdx.x == 0) partials[taken] = all;
  }
}

// --- launching -------------------------------------------------------------------------------------------------------

// Posts, all unset, and a ticket; none of either where nothing is waited for.
template <class Op, class T>
inline cudaError_t prepare_posts(const ScanArgs& a, int64_t count, Launch& launch, Posts<T>& posts, unsigned*& ticket) {
  posts = {}, ticket = nullptr;
  if (count == 0) return cudaSuccess;
  const bool carried = Op::kValues && a.mask.data && a.carry;
  posts.x = launch.allocate<Post<T>>(count * (carried ? 2 : 1));
  posts.next = carried ? posts.x + count : nullptr;
  ticket = launch.ticket(launch.context);
  return cudaMemsetAsync(posts.x, 0, static_cast<size_t>(count * (carried ? 2 : 1)) * sizeof(Post<T>), launch.stream);
}

inline bool is_float_grid(const Grid& g, int64_t stride, int64_t other, int64_t every) {
  return !g.data || (g.dtype == DType::f32 && stride == 1 && other % every == 0 &&
                     reinterpret_cast<uintptr_t>(g.data) % static_cast<uintptr_t>(4 * every) == 0);
}
inline bool is_byte_grid(const Grid& g, int64_t stride, int64_t other, int64_t every) {
  return !g.data || ((g.dtype == DType::u8 || g.dtype == DType::boolean) && stride == 1 && other % every == 0 &&
                     reinterpret_cast<uintptr_t>(g.data) % static_cast<uintptr_t>(every) == 0);
}

// Starts kernel(..., partials); the moments, if they are wanted, in a second kernel from the sums of the first's
// blocks.
template <bool kMoments, class Kernel, class... Args>
cudaError_t start_scan(Kernel kernel, const ScanArgs& a, int64_t blocks, int threads, Launch& launch,
                       const Args&... args) {
  CountedSums* partials = kMoments ? launch.allocate<CountedSums>(blocks) : nullptr;
  const cudaError_t e = start(kernel, blocks, threads, launch.stream, a, args..., partials);
  return e == cudaSuccess && kMoments ? queue_join(partials, blocks, a.moments, launch) : e;
}

template <class Op, class T, bool kChained, bool kMoments>
cudaError_t scan_across(const ScanArgs& a, const Op& op, Launch& launch) {
  const int64_t groups = (a.columns + kWarp - 1) / kWarp, tile = kAcrossWarps * kSegment<T>;
  const int64_t tiles = (a.steps + tile - 1) / tile;
  Posts<T> posts;
  unsigned* ticket;
  const cudaError_t e = prepare_posts<Op>(a, tiles > 1 ? tiles * a.columns : 0, launch, posts, ticket);
  if (e != cudaSuccess) return e;
  bool plain = sizeof(T) == 4;
  for (const Grid* g : {&a.rewards, &a.values, &a.log_rhos}) plain &= is_float_grid(*g, g->n, 0, 1);
  for (const Grid* g : {&a.terminated, &a.truncated, &a.mask}) plain &= is_byte_grid(*g, g->n, 0, 1);
  if constexpr (sizeof(T) == 4) {
    if (plain) {
      return start_scan<kMoments>(&across_kernel<Op, T, kChained, kMoments, true>, a, groups * tiles,
                                  kAcrossWarps * kWarp, launch, op, posts, ticket, groups, tiles);
    }
  }
  return start_scan<kMoments>(&across_kernel<Op, T, kChained, kMoments, false>, a, groups * tiles, kAcrossWarps * kWarp,
                              launch, op, posts, ticket, groups, tiles);
}

template <class Op, class T, bool kChained, int kRows, bool kMoments>
cudaError_t scan_along(const ScanArgs& a, const Op& op, Launch& launch) {
  const int64_t tile = kAlongSteps<T> / kRows;
  const int64_t tiles = a.bounds ? 1 : (a.steps + tile - 1) / tile;
  const int64_t groups = a.bounds ? a.steps / kAlongSteps<T> + a.columns : (a.columns + kRows - 1) / kRows;
  const int64_t blocks = (groups * tiles + kAlongWarps - 1) / kAlongWarps;
  Posts<T> posts;
  unsigned* ticket;
  const int64_t count = a.bounds ? groups : tiles > 1 ? tiles * a.columns : 0;
  const cudaError_t e = prepare_posts<Op>(a, count, launch, posts, ticket);
  if (e != cudaSuccess) return e;
  bool plain = sizeof(T) == 4 && !a.bounds && (a.output_n % 4 == 0 || a.columns == 1);
  for (void* const to : a.outputs) plain &= reinterpret_cast<uintptr_t>(to) % 16 == 0;
  for (const Grid* g : {&a.rewards, &a.values, &a.log_rhos}) {
    plain &= is_float_grid(*g, g->t, a.columns == 1 ? 0 : g->n, 4);
  }
  for (const Grid* g : {&a.terminated, &a.truncated, &a.mask}) {
    plain &= is_byte_grid(*g, g->t, a.columns == 1 ? 0 : g->n, 16);
  }
  if constexpr (sizeof(T) == 4) {
    if (plain) {
      return start_scan<kMoments>(&along_kernel<Op, T, kChained, kRows, kMoments, true>, a, blocks, kAlongWarps * kWarp,
                                  launch, op, posts, ticket, groups, tiles);
    }
  }
  return start_scan<kMoments>(&along_kernel<Op, T, kChained, kRows, kMoments, false>, a, blocks, kAlongWarps * kWarp,
                              launch, op, posts, ticket, groups, tiles);
}

// make(T{}): the estimator with its constants as T.
template <class Make>
cudaError_t scan(const ScanArgs& a, Launch& launch, Make&& make) {
  if ((a.bounds ? a.steps : a.steps * a.columns) == 0) {
    return a.moments ? cudaMemsetAsync(a.moments, 0, 3 * sizeof(double), launch.stream) : cudaSuccess;
  }
  return by_dtype(a.is_double, [&](auto zero) {
    using T = decltype(zero);
    const auto op = make(zero);
    using Op = std::remove_const_t<decltype(op)>;
    const auto run = [&](auto chained, auto moments) {
      constexpr bool kChained = chained(), kMoments = moments();
      if (!a.bounds && a.output_n == 1 && a.columns > 1) return scan_across<Op, T, kChained, kMoments>(a, op, launch);
      if (!a.bounds && 4 * a.steps <= kAlongSteps<T>) return scan_along<Op, T, kChained, 4, kMoments>(a, op, launch);
      return scan_along<Op, T, kChained, 1, kMoments>(a, op, launch);
    };
    if constexpr (Op::kRatios) {
      if (!(a.c_clip <= 1)) return run(std::true_type{}, std::false_type{});
    }
    if constexpr (Op::kMoments) {
      if (a.moments) return run(std::false_type{}, std::true_type{});
    }
    return run(std::false_type{}, std::false_type{});
  });
}

}  // namespace PF_ISA
}  // namespace pf
