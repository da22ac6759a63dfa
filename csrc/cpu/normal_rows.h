// Log-prob and entropy of a tile of diagonal normals, and the gradients of the tile's mean and log_std. normal_log_prob
// and normal_ppo_loss call these two functions. Sixteen rows lie in the lanes, up to kRowsInLanes dimensions at a time;
// a row's sums run over its dimensions in order, whatever tile or lane it is in.
#pragma once
#include "rows.h"
#include "../math/normal.h"

namespace pf {
namespace PF_ISA {

// n <= kRowTile rows, contiguous; entropy is nullptr where not wanted.
template <class T>
struct NormalTile {
  T *log_prob, *entropy;
};

// Whether all rows have one log_std: then its exp is taken once a tile, and its gradient is a sum over the rows.
inline bool is_shared(const Rows& x) {
  for (int d = 0; d < x.lead.ndim; ++d) {
    if (x.lead.stride[d] != 0) return false;
  }
  return true;
}

// A tile's dimensions [j, j + width) in lanes, sixteen rows at a time.
template <class T>
struct NormalLanes {
  using V = Vec<T>;
  alignas(64) T mean[kRowsInLanes * kLanes], action[kRowsInLanes * kLanes], log_std[kRowsInLanes * kLanes];
  alignas(64) T shared_log_std[kRowsInLanes], shared_inverse_std[padded(kRowsInLanes)];
  Rows means, actions, log_stds;
  int64_t width;
  bool shared;

  NormalLanes(const Normal& d, int64_t j)
      : width(std::min(kRowsInLanes, d.mean.width - j)), shared(is_shared(d.log_std)) {
    means = columns(d.mean, j, width), actions = columns(d.actions, j, width);
    log_stds = columns(d.log_std, j, width);
    if (!shared) return;
    read_chunk_to(log_stds, 0, width, shared_log_std);
    for (int64_t k = width; k < padded(width); ++k) shared_log_std[k] = T(0);
    for (int64_t k = 0; k < width; k += kLanes) {
      exp_of(-V::load(shared_log_std + k)).store(shared_inverse_std + k);
    }
  }
  void read(int64_t first, int64_t n, const int64_t* index) {
    read_lanes<T>(means, first, nullptr, n, nullptr, mean);
    read_lanes<T>(actions, first, index, n, nullptr, action);
    if (!shared) read_lanes<T>(log_stds, first, nullptr, n, nullptr, log_std);
  }
  PF_INLINE void at(int64_t k, V& z, V& log_s, V& inverse_std) const {
    log_s = shared ? V(shared_log_std[k]) : V::load(log_std + k * kLanes);
    inverse_std = shared ? V(shared_inverse_std[k]) : exp_of(-log_s);
    z = (V::load(action + k * kLanes) - V::load(mean + k * kLanes)) * inverse_std;
  }
};

// Forward of rows [first, first + n). `index`: nullptr, or the row of actions that row first + i takes.
template <class T>
inline void normal_forward(const Normal& d, int64_t first, int64_t n, const int64_t* index, const NormalTile<T>& out) {
  using V = Vec<T>;
  alignas(64) T log_prob[kRowTile] = {}, entropy[kRowTile] = {};
  for (int64_t j = 0; j < d.mean.width; j += kRowsInLanes) {
    NormalLanes<T> lanes(d, j);
    for (int64_t i = 0; i < n; i += kLanes) {
      lanes.read(first + i, std::min<int64_t>(kLanes, n - i), index ? index + i : nullptr);
      V total = V::load(log_prob + i), h = V::load(entropy + i);
      for (int64_t k = 0; k < lanes.width; ++k) {
        V z, log_std, inverse_std;
        lanes.at(k, z, log_std, inverse_std);
        total = total + normal_log_density(z, log_std);
        if (d.squash) total = total - log_tanh_slope(V::load(lanes.action + k * kLanes));
        h = h + normal_entropy(log_std);
      }
      total.store(log_prob + i), h.store(entropy + i);
    }
  }
  for (int64_t i = 0; i < n; ++i) out.log_prob[i] = log_prob[i];
  if (!out.entropy) return;
  for (int64_t i = 0; i < n; ++i) out.entropy[i] = d.squash ? -log_prob[i] : entropy[i];
}

// Gradients of Σ d_log_prob·log_prob + d_entropy·entropy (either nullptr: 0) for the same rows. d_mean, d_log_std: in
// their own dtype, absent where not wanted. d_log_std_sum: [D], to which a shared log_std's gradient is added, nullptr
// where log_std has rows of its own. A row whose incoming gradients are both 0 gets 0, whatever it holds.
template <class T>
inline void normal_backward(const Normal& d, int64_t first, int64_t n, const int64_t* index, const T* d_log_prob,
                            const T* d_entropy, const Rows& d_mean, const Rows& d_log_std, double* d_log_std_sum) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1));
  for (int64_t j = 0; j < d.mean.width; j += kRowsInLanes) {
    NormalLanes<T> lanes(d, j);
    const Rows to_mean = columns(d_mean, j, lanes.width), to_log_std = columns(d_log_std, j, lanes.width);
    alignas(64) T sums[kRowsInLanes * kLanes];
    if (d_log_std_sum) std::fill(sums, sums + lanes.width * kLanes, T(0));
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t rows = std::min<int64_t>(kLanes, n - i);
      lanes.read(first + i, rows, index ? index + i : nullptr);
      V g = d_log_prob ? load_part(d_log_prob + i, rows) : zero, h = d_entropy ? load_part(d_entropy + i, rows) : zero;
      if (d.squash) g = g - h, h = zero;  // the entropy there is -log_prob
      const auto dead = (g == zero) & (h == zero);
      for (int64_t k = 0; k < lanes.width; ++k) {
        V z, log_std, inverse_std;
        lanes.at(k, z, log_std, inverse_std);
        const V to_z = select(dead, zero, g * z);
        if (d_mean.lead.data) select(dead, zero, to_z * inverse_std).store(lanes.mean + k * kLanes);
        const V slope = select(dead, zero, to_z * z - g + h);
        if (d_log_std_sum) {
          (V::load(sums + k * kLanes) + slope).store(sums + k * kLanes);
        } else {
          slope.store(lanes.log_std + k * kLanes);
        }
      }
      if (d_mean.lead.data) write_lanes(to_mean, first + i, rows, lanes.mean);
      if (d_log_std.lead.data && !d_log_std_sum) write_lanes(to_log_std, first + i, rows, lanes.log_std);
    }
    for (int64_t k = 0; d_log_std_sum && k < lanes.width; ++k) {
      d_log_std_sum[j + k] += static_cast<double>(sum_of_lanes(V::load(sums + k * kLanes)));
    }
  }
}

}  // namespace PF_ISA
}  // namespace pf
