// The backward scan that gae, vtrace and discounted_returns share. Two walkers, one recurrence in one order of
// association (math/advantage.h): `across` holds sixteen columns in a vector and suits memory where columns are
// neighbours; `along` holds sixteen groups of steps of one column and suits memory where steps are.
#pragma once
#include "scan_tile.h"

namespace pf {
namespace PF_ISA {
namespace {

constexpr int64_t kMaxColumns = kScanTile / kGroup;    // of one block
constexpr int64_t kRunLength = 1024;                   // steps of a tile of one column
constexpr int64_t kStreamingBytes = int64_t(1) << 24;  // outputs larger than this go past the caches
constexpr int64_t kBlockElements = 1 << 14;            // below this a second thread costs more than it brings

template <class Op, class T>
PF_INLINE void solve_group(const Step<Vec<T>, Mask<T>>* s, const Vec<T>& incoming, Vec<T>* x) {
  if constexpr (Op::kAhead) {
    Ahead<Vec<T>, Mask<T>>(s).solve(s, incoming, x);
  } else {
    x[3] = advance(s[3], incoming);
    for (int j = 2; j >= 0; --j) x[j] = advance(s[j], x[j + 1]);
  }
}

template <class T>
struct ScanBuffers {
  alignas(64) T rewards[kScanTile], values[kScanTile], log_rhos[kScanTile], finals[kScanTile];
  alignas(64) uint8_t terminated[kScanTile], truncated[kScanTile], mask[kScanTile];
  alignas(64) T outputs[2][kScanTile];
};

template <class T>
struct ScanTile {
  TileView<T> rewards, values, log_rhos, finals;
  TileView<uint8_t> terminated, truncated, mask;
};

// Sparse entries are looked up only where they are read; the rest of the tile stays as it is.
template <class T>
inline void look_up(const ScanArgs& a, const ScanTile<T>& tile, const TileShape& shape, bool time_major,
                    int64_t first_flat, T* finals) {
  for (int64_t i = 0; i < shape.majors; ++i) {
    for (int64_t k = 0; k < shape.minors; ++k) {
      if (!*tile.truncated.at(i, k) || (tile.terminated && *tile.terminated.at(i, k))) continue;
      if (a.carry && tile.mask && !*tile.mask.at(i, k)) continue;
      const int64_t flat = first_flat + (time_major ? i * a.output_t + k * a.output_n : k * a.output_t);
      const int64_t* end = a.final_index + a.final_count;
      const int64_t* at = std::upper_bound(a.final_index, end, flat);
      if (at == a.final_index || at[-1] != flat) {  // the smallest one, whichever thread meets it
        for (int64_t seen = __atomic_load_n(a.missing, __ATOMIC_RELAXED);
             (seen < 0 || flat < seen) &&
             !__atomic_compare_exchange_n(a.missing, &seen, flat, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);) {
        }
        continue;
      }
      finals[i * shape.ld() + k] = static_cast<T>(a.final_value[at - 1 - a.final_index]);
    }
  }
}

template <class Op, class T>
inline ScanTile<T> open_scan(const ScanArgs& a, const TileShape& shape, bool time_major, int64_t first_flat,
                             ScanBuffers<T>& scratch) {
  const auto order = [&](const Grid& g) { return time_major ? Strides{g.t, g.n} : Strides{g.n, g.t}; };
  ScanTile<T> tile;
  tile.rewards = open_values(a.rewards, order(a.rewards), shape, scratch.rewards);
  if constexpr (Op::kValues) tile.values = open_values(a.values, order(a.values), shape, scratch.values);
  if constexpr (Op::kRatios) tile.log_rhos = open_values(a.log_rhos, order(a.log_rhos), shape, scratch.log_rhos);
  tile.terminated = open_flags(a.terminated, order(a.terminated), shape, scratch.terminated);
  tile.mask = open_flags(a.mask, order(a.mask), shape, scratch.mask);
  tile.truncated = open_flags(a.truncated, order(a.truncated), shape, scratch.truncated);
  if (!tile.truncated) return tile;
  if (a.final_count < 0) {
    tile.finals = open_values(a.final_values, order(a.final_values), shape, scratch.finals);
  } else {
    tile.finals = {scratch.finals, shape.ld()};
    look_up(a, tile, shape, time_major, first_flat, scratch.finals);
  }
  return tile;
}

// Elements [first, first + n) of what is given per column.
template <class T>
inline void read_columns(const PerColumn& p, int64_t first, int64_t n, T* to) {
  if (!p.row.data) return std::fill(to, to + n, static_cast<T>(p.value));
  with_type(p.row.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(p.row.data) + first * p.row.n;
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(data[i * p.row.n]);
  });
}

template <class Op, class T>
inline void read_rates(const ScanArgs& a, int64_t first, int64_t n, T* gamma, T* decay) {
  read_columns(a.gamma, first, n, gamma);
  if (!a.gamma.row.data && !a.lam.row.data) {
    return std::fill(decay, decay + n, static_cast<T>(Op::decay(a.gamma.value, a.lam.value)));
  }
  for (int64_t i = 0; i < n; ++i) {
    double g, l;
    read_columns(a.gamma, first + i, 1, &g), read_columns(a.lam, first + i, 1, &l);
    decay[i] = static_cast<T>(Op::decay(g, l));
  }
}

// Columns [first, first + n), n at most kMaxColumns.
template <class Op, class T, bool kPlain>
void across(const ScanArgs& a, const Op& op, int64_t first, int64_t n, bool streaming) {
  using V = Vec<T>;
  using M = Mask<T>;
  ScanBuffers<T> scratch;
  alignas(64) T trace[kMaxColumns], next[kMaxColumns], gamma[kMaxColumns], decay[kMaxColumns];
  const int64_t width = padded(n);
  std::fill(trace, trace + width, T(0));
  std::fill(next, next + width, T(0));
  std::fill(gamma, gamma + width, T(0));
  std::fill(decay, decay + width, T(0));
  read_columns(a.last_values, first, n, Op::kValues ? next : trace);
  read_rates<Op, T>(a, first, n, gamma, decay);
  T* out[2] = {static_cast<T*>(a.outputs[0]), static_cast<T*>(a.outputs[1])};

  // The first tile, at the end of the grid, is small: there vectors must not read past a run (see open_tile).
  const int64_t tallest = std::max<int64_t>(kGroup, kScanTile / width / kGroup * kGroup);
  int64_t end = a.steps, rows = n % kLanes == 0 ? tallest : std::min<int64_t>(tallest, kLanes);
  for (int64_t begin; end > 0; end = begin, rows = tallest) {
    begin = std::max<int64_t>(0, (end - 1) / kGroup * kGroup + kGroup - rows);
    const TileShape shape{begin, end - begin, first, n, a.steps, a.columns, kLanes};
    const int64_t flat = begin * a.output_t + first * a.output_n;
    const ScanTile<T> tile = open_scan<Op, T>(a, shape, true, flat, scratch);
    Presence has{bool(tile.terminated), !kPlain && tile.truncated, !kPlain && tile.mask, a.carry, false};
    for (int64_t t = (end - begin - 1) / kGroup * kGroup; t >= 0; t -= kGroup) {
      const int inside = static_cast<int>(std::min<int64_t>(kGroup, end - begin - t));
      const auto row = [&](int j) { return t + (j < inside ? j : inside - 1); };
      const auto group = [&](int64_t c, bool partial) __attribute__((always_inline)) {
        has.partial = partial;
        if (streaming) {  // the rows of the next group but one: no prefetcher guesses that they come next
          for (int j = 0; j < kGroup; ++j) {
            __builtin_prefetch(tile.rewards.at(t - 2 * kGroup + j, c), 0, 2);
            if constexpr (Op::kValues) __builtin_prefetch(tile.values.at(t - 2 * kGroup + j, c), 0, 2);
            if constexpr (Op::kRatios) __builtin_prefetch(tile.log_rhos.at(t - 2 * kGroup + j, c), 0, 2);
            if (has.terminated && c % 64 == 0) __builtin_prefetch(tile.terminated.at(t - 2 * kGroup + j, c), 0, 2);
          }
        }
        const V g = V::load(gamma + c), d = V::load(decay + c), incoming = V::load(trace + c);
        V running = V::load(next + c);
        Transition<V, M> transition[kGroup];
        Step<V, M> step[kGroup];
        M keep[kGroup] = {};
        _Pragma("GCC unroll 4") for (int j = kGroup - 1; j >= 0; --j) {
          const int64_t i = partial ? row(j) : t + j;
          Inputs<V, M> in{};
          in.reward = V::load(tile.rewards.at(i, c));
          if constexpr (Op::kValues) in.value = V::load(tile.values.at(i, c));
          if constexpr (Op::kRatios) in.log_rho = V::load(tile.log_rhos.at(i, c));
          in.next = running;
          if (has.terminated) in.terminated = load_flags<T>(tile.terminated.at(i, c));
          if (has.truncated) {
            in.truncated = load_flags<T>(tile.truncated.at(i, c));
            in.final = V::load(tile.finals.at(i, c));
          }
          if (has.mask) in.keep = keep[j] = load_flags<T>(tile.mask.at(i, c));
          if (partial) in.inside = splat_mask<T>(j < inside);
          step[j] = open_step(op, has, in, g, d, transition[j]);
          if constexpr (Op::kValues) {
            if (partial && j >= inside) continue;
            const bool over = has.mask && has.carry;
            running = over ? select(in.keep, transition[j].value, running) : transition[j].value;
          }
        }
        V x[kGroup + 1];
        x[kGroup] = incoming;
        solve_group<Op>(step, incoming, x);
        x[0].store(trace + c);
        running.store(next + c);
        _Pragma("GCC unroll 4") for (int j = 0; j < kGroup; ++j) {
          if (partial && j >= inside) break;
          V result[2];
          op.outputs(transition[j], g, x[j], x[j + 1], result);
          _Pragma("GCC unroll 2") for (int k = 0; k < Op::kOutputs; ++k) {
            if (has.mask) result[k] = select(keep[j], result[k], V(T(0)));
            T* to = out[k] + (begin + t + j) * a.output_t + first + c;
            if (streaming) {
              result[k].store(scratch.outputs[k] + (t + j) * width + c);
            } else if (c + kLanes <= n) {
              result[k].store(to);
            } else {
              store_lanes(result[k], to, n - c);
            }
          }
        }
      };
      if (inside < kGroup) {
        for (int64_t c = 0; c < n; c += kLanes) group(c, true);
      } else {
        for (int64_t c = 0; c < n; c += kLanes) group(c, false);
      }
    }
    if (!streaming) continue;
    for (int k = 0; k < Op::kOutputs; ++k)
      for (int64_t t = begin; t < end; ++t)
        store_past_cache(out[k] + t * a.output_t + first, scratch.outputs[k] + (t - begin) * width, n * sizeof(T));
  }
  if (streaming) finish_past_cache();
}

// One value in lane 0: keeps the one dependency chain of a scan off the general registers.
template <class T>
struct Lane {
  typedef T Float __attribute__((vector_size(16)));
  typedef IntOf<T> Bits __attribute__((vector_size(16)));
  static PF_INLINE Float load(const T* p) { return Float{*p}; }
  static PF_INLINE Float advance(const T* a, const T* b, const IntOf<T>* cut, Float x) {
    const Float alone = load(a), with = fma_narrow(load(b), x, alone);
    return blend_narrow(Bits{*cut}, alone, with);
  }
};

template <class T>
struct StepLanes {
  alignas(64) T a[kLanes], b[kLanes];
  alignas(64) IntOf<T> cut[kLanes];
  PF_INLINE void store(const Step<Vec<T>, Mask<T>>& s) {
    s.a.store(a);
    s.b.store(b);
    std::memcpy(cut, s.cut.r, sizeof(s.cut.r));
  }
};

// Walks the chain of one span backwards: x as it enters each group, by lane. Returns the x that leaves the span.
template <class Op, class T>
PF_INLINE typename Lane<T>::Float chain(const Step<Vec<T>, Mask<T>>* step, int groups, typename Lane<T>::Float x,
                                        Vec<T>& incoming) {
  alignas(64) T entering[kLanes] = {};
  if constexpr (Op::kAhead) {
    StepLanes<T> all;
    all.store(Ahead<Vec<T>, Mask<T>>(step).all);
    const auto one = [&](int lane) {
      entering[lane] = x[0];
      x = Lane<T>::advance(all.a + lane, all.b + lane, all.cut + lane, x);
    };
    _Pragma("GCC unroll 16") for (int g = kLanes - 1; g >= 0; --g) {
      if (g < groups) one(lane_of<T>(g));
    }
  } else {
    StepLanes<T> each[kGroup];
    for (int j = 0; j < kGroup; ++j) each[j].store(step[j]);
    for (int g = groups - 1; g >= 0; --g) {
      const int lane = lane_of<T>(g);
      entering[lane] = x[0];
      for (int j = kGroup - 1; j >= 0; --j)
        x = Lane<T>::advance(each[j].a + lane, each[j].b + lane, each[j].cut + lane, x);
    }
  }
  incoming = Vec<T>::load(entering);
  return x;
}

// `steps` steps of one column; `offset`: where they begin in the time of the grid (packed inputs).
template <class Op, class T, bool kPlain>
void along(const ScanArgs& a, const Op& op, int64_t column, int64_t offset, int64_t steps, int64_t grid_columns,
           int64_t grid_steps, ScanBuffers<T>& scratch, bool streaming) {
  using V = Vec<T>;
  using M = Mask<T>;
  alignas(64) T after[kRunLength + kSpan];  // V of the state after each step
  T last, gamma, decay;
  read_columns(a.last_values, column, 1, &last);
  read_rates<Op, T>(a, column, 1, &gamma, &decay);
  const int64_t major = a.bounds ? 0 : column;
  typename Lane<T>::Float x = {Op::kValues ? T(0) : last};
  T next = Op::kValues ? last : T(0);
  T* out[2];
  for (int k = 0; k < 2; ++k) out[k] = static_cast<T*>(a.outputs[k]) + major * a.output_n + offset;

  for (int64_t end = steps, begin; end > 0; end = begin) {
    begin = (end - 1) / kRunLength * kRunLength;
    const int64_t length = end - begin;
    const TileShape shape{major, 1, offset + begin, length, grid_columns, grid_steps, kSpan};
    const ScanTile<T> tile =
        open_scan<Op, T>(a, shape, false, major * a.output_n + (offset + begin) * a.output_t, scratch);
    Presence has{bool(tile.terminated), !kPlain && tile.truncated, !kPlain && tile.mask, a.carry, false};
    if constexpr (Op::kValues) {
      const T* value = tile.values.data;
      if (has.mask) {
        for (int64_t t = length - 1; t >= 0; --t) {
          after[t] = next;
          if (tile.mask.data[t])
            next = value[t];
          else if (!has.carry)
            next = T(0);
        }
      } else {
        std::memcpy(after, value + 1, (length - 1) * sizeof(T));
        after[length - 1] = next;
        next = value[0];
      }
    }
    for (int64_t t = (length - 1) / kSpan * kSpan; t >= 0; t -= kSpan) {
      const int64_t inside = std::min(kSpan, length - t);
      const auto span = [&](bool partial) __attribute__((always_inline)) {
        has.partial = partial;
        const V g(gamma), d(decay);
        V reward[kGroup], value[kGroup], log_rho[kGroup], final[kGroup], following[kGroup];
        load_groups(tile.rewards.data + t, reward);
        if constexpr (Op::kValues) load_groups(tile.values.data + t, value), load_groups(after + t, following);
        if constexpr (Op::kRatios) load_groups(tile.log_rhos.data + t, log_rho);
        if (has.truncated) load_groups(tile.finals.data + t, final);
        const FlagWords<T> terminated(has.terminated ? tile.terminated.data + t : scratch.terminated);
        const FlagWords<T> truncated(has.truncated ? tile.truncated.data + t : scratch.truncated);
        const FlagWords<T> mask(has.mask ? tile.mask.data + t : scratch.mask);
        Transition<V, M> transition[kGroup];
        Step<V, M> step[kGroup];
        _Pragma("GCC unroll 4") for (int j = 0; j < kGroup; ++j) {
          Inputs<V, M> in{};
          in.reward = reward[j];
          in.next = V(T(0));
          if constexpr (Op::kValues) in.value = value[j], in.next = following[j];
          if constexpr (Op::kRatios) in.log_rho = log_rho[j];
          if (has.terminated) in.terminated = terminated.step(j);
          if (has.truncated) in.truncated = truncated.step(j), in.final = final[j];
          if (has.mask) in.keep = mask.step(j);
          if (partial) in.inside = first_steps<T>() < V(static_cast<T>(inside - j));
          step[j] = open_step(op, has, in, g, d, transition[j]);
        }
        V now[kGroup + 1];
        const int groups = partial ? static_cast<int>((inside + kGroup - 1) / kGroup) : kLanes;
        x = chain<Op>(step, groups, x, now[kGroup]);
        solve_group<Op>(step, now[kGroup], now);
        _Pragma("GCC unroll 2") for (int k = 0; k < Op::kOutputs; ++k) {
          V result[kGroup];
          _Pragma("GCC unroll 4") for (int j = 0; j < kGroup; ++j) {
            V both[2];
            op.outputs(transition[j], g, now[j], now[j + 1], both);
            result[j] = has.mask ? select(mask.step(j), both[k], V(T(0))) : both[k];
          }
          if (streaming || partial) {
            store_groups(result, scratch.outputs[k] + t);
          } else {
            store_groups(result, out[k] + begin + t);
          }
          if (partial && !streaming) std::memcpy(out[k] + begin + t, scratch.outputs[k] + t, inside * sizeof(T));
        }
      };
      if (inside < kSpan) {
        span(true);
      } else {
        span(false);
      }
    }
    if (!streaming) continue;
    for (int k = 0; k < Op::kOutputs; ++k) store_past_cache(out[k] + begin, scratch.outputs[k], length * sizeof(T));
  }
}

// First of the sequences of packed inputs that begin at or after step `t`.
inline int64_t sequence_from(const ScanArgs& a, int64_t t) {
  return std::lower_bound(a.bounds, a.bounds + a.columns, t) - a.bounds;
}

template <class Op, class T, bool kPlain>
void scan_as(const ScanArgs& a, const Op& op) {
  const int64_t elements = a.bounds ? a.steps : a.steps * a.columns;
  if (elements == 0) return;
  const bool streaming = elements * Op::kOutputs * int64_t(sizeof(T)) > kStreamingBytes;
  if (!a.bounds && a.output_n == 1 && a.columns > 1) {
    const int64_t wanted = std::max<int64_t>(kBlockElements / a.steps, a.columns / 16);
    const int64_t n = std::min<int64_t>(kMaxColumns, std::max<int64_t>(kLanes, padded(wanted)));
    return for_blocks((a.columns + n - 1) / n, a.threads, [&](int64_t block) {
      across<Op, T, kPlain>(a, op, block * n, std::min(n, a.columns - block * n), streaming);
    });
  }
  if (!a.bounds) {
    const int64_t n = std::max<int64_t>(1, kBlockElements / a.steps);
    return for_blocks((a.columns + n - 1) / n, a.threads, [&](int64_t block) {
      ScanBuffers<T> scratch;
      for (int64_t c = block * n; c < std::min((block + 1) * n, a.columns); ++c)
        along<Op, T, kPlain>(a, op, c, 0, a.steps, a.columns, a.steps, scratch, streaming);
      if (streaming) finish_past_cache();
    });
  }
  for_blocks((a.steps + kBlockElements - 1) / kBlockElements, a.threads, [&](int64_t block) {
    ScanBuffers<T> scratch;
    const int64_t end = sequence_from(a, (block + 1) * kBlockElements);
    for (int64_t s = sequence_from(a, block * kBlockElements); s < end; ++s)
      along<Op, T, kPlain>(a, op, s, a.bounds[s], a.bounds[s + 1] - a.bounds[s], 1, a.steps, scratch, streaming);
    if (streaming) finish_past_cache();
  });
}

// `make(T{})`: the estimator with its constants as T.
template <class Make>
void scan(const ScanArgs& a, Make&& make) {
  [[maybe_unused]] const bool plain = !a.truncated.data && !a.mask.data;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto op = make(zero);
    using Op = std::remove_const_t<decltype(op)>;
    if constexpr (Op::kPlainToo && sizeof(T) == sizeof(float) && !kSmall) {
      if (plain) return scan_as<Op, T, true>(a, op);
    }
    scan_as<Op, T, false>(a, op);
  };
  by_dtype(a.is_double, run);
}

}  // namespace
}  // namespace PF_ISA
}  // namespace pf
