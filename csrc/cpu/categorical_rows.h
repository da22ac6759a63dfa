// Log-prob and entropy of a tile of categorical rows, and the gradient of the tile's logits. categorical_log_prob,
// multi_categorical_log_prob and categorical_ppo_loss all call these two functions. Which of the two ways a row goes
// depends on its width only, so a row alone has the same bits as in any batch.
#pragma once
#include "rows.h"
#include "wide.h"
#include "../math/categorical.h"

namespace pf {
namespace PF_ISA {

// n <= kRowTile rows, contiguous. log p = (logits - shift)/temperature - log_sum; log_sum = inf: the row gives 0.
// entropy is nullptr where not wanted; the backward reads it if and only if it is given d_entropy.
template <class T>
struct CategoricalTile {
  T *log_prob, *entropy, *shift, *log_sum;
};

// What the rows of a tile are told: its action, where its mask lies, whether it is skipped, 1/temperature.
template <class T>
struct CategoricalLabels {
  alignas(64) T inverse_temperature[kRowTile];
  alignas(64) T action_lane[kRowTile];  // the action as T, -1 where skipped: lanes compare with it
  int64_t action[kRowTile], mask_row[kRowTile];
  bool skip[kRowTile];
  bool any_skip = false;

  CategoricalLabels(const Categorical& c, int64_t first, int64_t n, const int64_t* index, const T* valid) {
    if (index) {
      gather(c.actions, index, n, action);
    } else {
      read(c.actions, first, n, action);
    }
    for (int64_t i = 0; i < n; ++i) skip[i] = false;
    if (c.has_ignore_index || valid) {
      for (int64_t i = 0; i < n; ++i) {
        skip[i] = (c.has_ignore_index && action[i] == c.ignore_index) || (valid && valid[i] == 0);
        any_skip |= skip[i];
      }
    }
    if (c.action_mask.lead.data) {
      for (int64_t i = 0; i < n; ++i) mask_row[i] = index ? index[i] : first + i;
    }
    // finite, so that the largest logit's (z - z)/temperature stays 0
    const T most = std::numeric_limits<T>::max();
    if (c.temperature.data) {
      read(c.temperature, first, n, inverse_temperature);
      for (int64_t i = 0; i < n; ++i) inverse_temperature[i] = std::min(T(1) / inverse_temperature[i], most);
      for (int64_t i = n; i < padded(n); ++i) inverse_temperature[i] = T(1);
    } else {
      const Vec<T> inverse(std::min(T(1) / static_cast<T>(c.temperature_value), most));
      for (int64_t i = 0; i < n; i += kLanes) inverse.store(inverse_temperature + i);
    }
    for (int64_t i = n; i < padded(n); ++i) action[i] = 0;
    for (int64_t i = 0; i < n; i += kLanes) {  // a number of steps that the compiler knows: it makes vectors of them
      for (int64_t k = 0; k < kLanes; ++k) action_lane[i + k] = static_cast<T>(action[i + k]);
    }
  }

  // Skips rows whose action is not one of A, and notes the first of them.
  void check(int64_t first, int64_t n, int64_t width, Offence& offence) {
    if (width <= kRowsInLanes) {
      auto out = splat_mask<T>(false);
      for (int64_t i = 0; i < n; i += kLanes) {
        const auto x = Vec<T>::load(action_lane + i);
        out = out | (x < Vec<T>(T(0))) | (x >= Vec<T>(static_cast<T>(width)));
      }
      if (!any(out)) return;
    }
    for (int64_t i = 0; i < n; ++i) {
      if (skip[i] || (action[i] >= 0 && action[i] < width)) continue;
      skip[i] = any_skip = true;
      if (offence.where < 0) offence = {first + i, action[i]};
    }
  }
};

// Sixteen rows in lanes, and as many of them as are read before the first is used: a load that spans several stores
// waits until they have left for the cache.
constexpr int64_t kRowsAhead = 4 * kLanes;

template <class T>
struct CategoricalLanes {
  alignas(64) T z[kRowsInLanes * kRowsAhead], mask[kRowsInLanes * kRowsAhead];

  // Rows [at, at + n) of the tile that starts at `first`.
  void read(const Categorical& c, const CategoricalLabels<T>& l, int64_t first, int64_t at, int64_t n) {
    const bool* skip = l.any_skip ? l.skip + at : nullptr;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, n - i);
      const bool* left_out = skip ? skip + i : nullptr;
      read_lanes(c.logits, first + at + i, nullptr, rows, left_out, z + i * c.logits.width);
      if (!c.action_mask.lead.data) continue;
      read_flag_lanes<T>(c.action_mask, 0, l.mask_row + at + i, rows, left_out, mask + i * c.logits.width);
    }
  }
};

template <class T>
inline void lanes_forward(const Categorical& c, const CategoricalLabels<T>& l, int64_t at, int64_t n, T* z,
                          const T* mask, const CategoricalTile<T>& out) {
  using V = Vec<T>;
  const V inf(std::numeric_limits<T>::infinity()), zero(T(0));
  const int64_t width = c.logits.width;
  if (c.action_mask.lead.data) {
    for (int64_t j = 0; j < width * kLanes; j += kLanes) {
      select(V::load(mask + j) != zero, V::load(z + j), -inf).store(z + j);
    }
  }
  V largest = -inf;
  for (int64_t j = 0; j < width; ++j) {  // a NaN may be lost here: it comes back through the sum
    largest = larger_or_second(V::load(z + j * kLanes), largest);
  }
  const V shift = select(largest == -inf, zero, largest), inverse = V::load(l.inverse_temperature + at);
  const V action = V::load(l.action_lane + at);
  const V one(T(1));
  V sum = zero, weighted = zero, taken = zero, column = zero;
  in_step<T, 4>(width * kLanes, [&](auto steps, int64_t j) PF_INLINE_LAMBDA {
    constexpr int N = steps();
    using W = Wide<T, N>;
    const W x = W::load(z + j), u = softmax_exponent(x, W(shift), W(inverse)), e = exp_floored(u);
    PF_IN_STEP(k) {
      sum = sum + e.v[k];
      weighted = fma_of(e.v[k], u.v[k], weighted);
      taken = select(action == column, x.v[k], taken);
      column = column + one;
    }
  });
  auto dead = sum == zero;
  if (l.any_skip) {
    alignas(64) T skipped[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) skipped[i] = i < n && l.skip[at + i] ? T(1) : T(0);
    dead = dead | (V::load(skipped) != zero);
  }
  const V log_sum = log_of(sum);
  store_part(select(dead, zero, (taken - shift) * inverse - log_sum), out.log_prob + at, n);
  if (out.entropy) store_part(select(dead, zero, softmax_entropy(log_sum, sum, weighted)), out.entropy + at, n);
  store_part(select(dead, zero, shift), out.shift + at, n);
  store_part(select(dead, inf, log_sum), out.log_sum + at, n);
}

// The gradient takes the place of the logits in z.
template <class T>
inline void lanes_backward(const Categorical& c, const CategoricalLabels<T>& l, int64_t at, int64_t n, T* z,
                           const T* mask, const CategoricalTile<T>& tile, const T* d_log_prob, const T* d_entropy) {
  using V = Vec<T>;
  const V inf(std::numeric_limits<T>::infinity()), zero(T(0));
  const bool masked = c.action_mask.lead.data;
  const V log_sum = load_part(tile.log_sum + at, n), shift = load_part(tile.shift + at, n);
  const V g = d_log_prob ? load_part(d_log_prob + at, n) : zero, h = d_entropy ? load_part(d_entropy + at, n) : zero;
  const auto dead = (log_sum == inf) | ((g == zero) & (h == zero));
  const V entropy = d_entropy ? load_part(tile.entropy + at, n) : zero, inverse = V::load(l.inverse_temperature + at);
  const V action = V::load(l.action_lane + at), at_action = g * inverse, at_entropy = h * inverse;
  const bool any_dead = any(dead);
  const V one(T(1));
  V column = zero;
  in_step<T, 4>(c.logits.width * kLanes, [&](auto steps, int64_t j) PF_INLINE_LAMBDA {
    constexpr int N = steps();
    using W = Wide<T, N>;
    const W slopes =
        softmax_grad(W::load(z + j), W(shift), W(log_sum), W(entropy), W(inverse), -W(at_action), -W(at_entropy));
    PF_IN_STEP(k) {
      V d = slopes.v[k];
      d = select(action == column, d + at_action, d);
      column = column + one;
      if (masked) d = select(V::load(mask + j + k * kLanes) != zero, d, zero);
      if (any_dead) d = select(dead, zero, d);
      d.store(z + j + k * kLanes);
    }
  });
}

// One long row, chunk by chunk: one pass over memory. Sums are relative to the largest logit so far, in double.
template <class T>
struct RowSums {
  T largest = -std::numeric_limits<T>::infinity();
  double sum = 0, weighted = 0;

  // The chunk is padded with -inf.
  void add(const T* z, int64_t n, T inverse_temperature) {
    using V = Vec<T>;
    V top[4] = {V(largest), V(largest), V(largest), V(largest)};
    int64_t j = 0;
    for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
      _Pragma("GCC unroll 4") for (int k = 0; k < 4; ++k) {
        top[k] = larger_or_second(V::load(z + j + k * kLanes), top[k]);
      }
    }
    for (; j < n; j += kLanes) top[0] = larger_or_second(V::load(z + j), top[0]);
    const V both = larger_or_second(larger_or_second(top[0], top[1]), larger_or_second(top[2], top[3]));
    const T now = fold(both, [](T a, T b) { return a > b ? a : b; });
    if (now > largest && sum != 0) {
      const double step = (static_cast<double>(largest) - now) * inverse_temperature;
      const double u = std::max(step, softmax_floor<double>());
      alignas(64) double e[kLanes];
      exp_floored(Vec<double>(u)).store(e);
      weighted = e[0] * (weighted + u * sum);
      sum *= e[0];
    }
    largest = now;
    const T shift = now == -std::numeric_limits<T>::infinity() ? T(0) : now;
    Wide<T, 4> s(T(0)), w(T(0));
    constexpr int kStep = kInStep<T>;
    for (j = 0; j + 4 * kLanes <= n; j += 4 * kLanes) {
      _Pragma("GCC unroll 4") for (int k = 0; k < 4; k += kStep) {
        using W = Wide<T, kStep>;
        const W u = softmax_exponent(W::load(z + j + k * kLanes), W(shift), W(inverse_temperature));
        const W e = exp_floored(u);
        _Pragma("GCC unroll 4") for (int i = 0; i < kStep; ++i) {
          s.v[k + i] = s.v[k + i] + e.v[i];
          w.v[k + i] = fma_of(e.v[i], u.v[i], w.v[k + i]);
        }
      }
    }
    for (; j < n; j += kLanes) {
      const V u = softmax_exponent(V::load(z + j), V(shift), V(inverse_temperature)), e = exp_floored(u);
      s.v[0] = s.v[0] + e;
      w.v[0] = fma_of(e, u, w.v[0]);
    }
    sum += sum_of_lanes((s.v[0] + s.v[1]) + (s.v[2] + s.v[3]));
    weighted += sum_of_lanes((w.v[0] + w.v[1]) + (w.v[2] + w.v[3]));
  }
};

template <class T>
inline const T* masked_chunk(const Categorical& c, int64_t offset, int64_t mask_offset, int64_t j, int64_t n, T* z,
                             T* mask) {
  using V = Vec<T>;
  const V inf(std::numeric_limits<T>::infinity());
  const T* chunk = read_chunk(c.logits, offset, j, n, -std::numeric_limits<T>::infinity(), z);
  if (!c.action_mask.lead.data) return chunk;
  read_mask_chunk(c.action_mask, mask_offset, j, n, mask);
  for (int64_t k = 0; k < n; k += kLanes) select(V::load(mask + k) != V(T(0)), V::load(chunk + k), -inf).store(z + k);
  return z;
}

template <class T>
inline void row_forward(const Categorical& c, const CategoricalLabels<T>& l, int64_t first, int64_t i,
                        const CategoricalTile<T>& out, double* sum, double* weighted) {
  const T inf = std::numeric_limits<T>::infinity();
  RowSums<T> sums;
  if (!l.skip[i]) {
    alignas(64) T z[kChunk], mask[kChunk];
    const int64_t width = c.logits.width, offset = offset_of(c.logits.lead, first + i), action = l.action[i];
    const int64_t mask_offset = c.action_mask.lead.data ? offset_of(c.action_mask.lead, l.mask_row[i]) : 0;
    for (int64_t j = 0; j < width; j += kChunk) {
      const int64_t n = std::min(kChunk, width - j);
      const T* chunk = masked_chunk(c, offset, mask_offset, j, n, z, mask);
      if (action >= j && action < j + n) out.log_prob[i] = chunk[action - j];  // for now its logit
      sums.add(chunk, padded(n), l.inverse_temperature[i]);
    }
  }
  if (sums.sum == 0) {
    out.log_prob[i] = T(0), out.shift[i] = T(0), out.log_sum[i] = inf;
  } else {
    out.log_prob[i] = (out.log_prob[i] - sums.largest) * l.inverse_temperature[i], out.shift[i] = sums.largest;
    out.log_sum[i] = T(0);
  }
  sum[i] = sums.sum, weighted[i] = sums.weighted;
}

template <class T>
inline void row_backward(const Categorical& c, const CategoricalLabels<T>& l, int64_t first, int64_t i,
                         const CategoricalTile<T>& tile, const T* d_log_prob, const T* d_entropy, const Rows& d_logits,
                         bool past_cache) {
  using V = Vec<T>;
  const T inf = std::numeric_limits<T>::infinity();
  const int64_t width = c.logits.width, offset = offset_of(c.logits.lead, first + i), action = l.action[i];
  const int64_t to = offset_of(d_logits.lead, first + i);
  const T g = d_log_prob ? d_log_prob[i] : T(0), h = d_entropy ? d_entropy[i] : T(0);
  const bool masked = c.action_mask.lead.data, dead = tile.log_sum[i] == inf || (g == 0 && h == 0);
  const int64_t mask_offset = masked ? offset_of(c.action_mask.lead, l.mask_row[i]) : 0;
  using W = Wide<T, kInStep<T>>;
  const T entropy = d_entropy ? tile.entropy[i] : T(0), shift = tile.shift[i], log_sum = tile.log_sum[i];
  const T inverse = l.inverse_temperature[i], at_action = g * inverse, at_entropy = h * inverse;
  alignas(64) T z[kChunk], mask[kChunk], d[kChunk];
  if (dead) std::fill(d, d + kChunk, T(0));
  for (int64_t j = 0; j < width; j += kChunk) {
    const int64_t n = std::min(kChunk, width - j);
    if (!dead) {
      const T* chunk = masked_chunk(c, offset, mask_offset, j, n, z, mask);
      constexpr int kStep = kInStep<T> * kLanes;
      int64_t k = 0;
      for (; k + kStep <= n; k += kStep) {
        softmax_grad(W::load(chunk + k), W(shift), W(log_sum), W(entropy), W(inverse), W(-at_action), W(-at_entropy))
            .store(d + k);
      }
      for (; k < n; k += kLanes) {
        softmax_grad(V::load(chunk + k), V(shift), V(log_sum), V(entropy), V(inverse), V(-at_action), V(-at_entropy))
            .store(d + k);
      }
      const int64_t a = action - j;
      if (a >= 0 && a < n) d[a] += at_action;
      if (masked) {
        for (int64_t k = 0; k < n; k += kLanes) {
          select(V::load(mask + k) != V(T(0)), V::load(d + k), V(T(0))).store(d + k);
        }
      }
    }
    write_chunk(d_logits, to, j, n, past_cache, d);
  }
}

// Forward of rows [first, first + n). `index`: nullptr, or the row of actions and action_mask that row first + i takes.
// `valid`: nullptr, or 0 where a row is not read and gives 0. `offence` notes the first row whose action is not in
// [0, A); such a row gives 0.
template <class T>
inline void categorical_forward(const Categorical& c, int64_t first, int64_t n, const int64_t* index, const T* valid,
                                const CategoricalTile<T>& out, Offence& offence) {
  CategoricalLabels<T> labels(c, first, n, index, valid);
  labels.check(first, n, c.logits.width, offence);
  if (c.logits.width <= kRowsInLanes) {
    CategoricalLanes<T> lanes;
    for (int64_t i = 0; i < n; i += kRowsAhead) {
      const int64_t rows = std::min(kRowsAhead, n - i), width = c.logits.width;
      lanes.read(c, labels, first, i, rows);
      for (int64_t k = 0; k < rows; k += kLanes) {
        T *z = lanes.z + k * width, *mask = lanes.mask + k * width;
        lanes_forward(c, labels, i + k, std::min<int64_t>(kLanes, rows - k), z, mask, out);
      }
    }
    return;
  }
  using W = Vec<double>;
  alignas(64) double sum[kRowTile], weighted[kRowTile];
  for (int64_t i = 0; i < n; ++i) row_forward(c, labels, first, i, out, sum, weighted);
  for (int64_t i = n; i < padded(n); ++i) sum[i] = 1, weighted[i] = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const W s = W::load(sum + i), log_sum = log_of(s);
    softmax_entropy(log_sum, s, W::load(weighted + i)).store(weighted + i);
    log_sum.store(sum + i);
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool dead = out.log_sum[i] != T(0);
    if (out.entropy) out.entropy[i] = dead ? T(0) : static_cast<T>(weighted[i]);
    if (dead) continue;
    out.log_prob[i] = static_cast<T>(out.log_prob[i] - sum[i]);
    out.log_sum[i] = static_cast<T>(sum[i]);
  }
}

// Gradient of Σ d_log_prob·log_prob + d_entropy·entropy (either nullptr: 0) with respect to the logits of the same
// rows, in the dtype of d_logits, which may be the logits' own memory. A row whose incoming gradients are both 0 gets
// 0, whatever it holds: that is how a loss leaves rows out. past_cache: the result is too large to stay cached.
template <class T>
inline void categorical_backward(const Categorical& c, int64_t first, int64_t n, const int64_t* index,
                                 const CategoricalTile<T>& tile, const T* d_log_prob, const T* d_entropy,
                                 const Rows& d_logits, bool past_cache) {
  const CategoricalLabels<T> labels(c, first, n, index, nullptr);
  if (c.logits.width <= kRowsInLanes) {
    CategoricalLanes<T> lanes;
    for (int64_t i = 0; i < n; i += kRowsAhead) {
      const int64_t rows = std::min(kRowsAhead, n - i), width = c.logits.width;
      lanes.read(c, labels, first, i, rows);
      for (int64_t k = 0; k < rows; k += kLanes) {
        const int64_t part = std::min<int64_t>(kLanes, rows - k);
        T *z = lanes.z + k * width, *mask = lanes.mask + k * width;
        lanes_backward(c, labels, i + k, part, z, mask, tile, d_log_prob, d_entropy);
        write_lanes(d_logits, first + i + k, part, z);
      }
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    row_backward(c, labels, first, i, tile, d_log_prob, d_entropy, d_logits, past_cache);
  }
  if (past_cache) finish_past_cache();
}

// Whether a gradient of n rows is larger than what a cache would keep.
inline bool is_past_cache(const Rows& d_logits, int64_t n) {
  return n * d_logits.width * size_of(d_logits.lead.dtype) > (int64_t{1} << 23);
}

}  // namespace PF_ISA
}  // namespace pf
