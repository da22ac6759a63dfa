// Log-prob and entropy of a tile of diagonal normals, and the gradients of the tile's mean and log_std: threads compute
// terms element by element, kColumns dimensions of kThreads rows at a time, and then each sums a row's, in order.
// normal_log_prob and normal_ppo_loss both call these.
#pragma once
#include "rows.cuh"
#include "../math/normal.h"

namespace pf {
namespace PF_ISA {

struct NormalRows {
  Normal dist;
  Rows d_mean, d_log_std;
  bool shared;  // all rows have one log_std
  bool sums_rows;  // d_log_std is [D], a sum over the rows
  double* of_columns;  // then: [blocks, D], each block's part of it
};

template <class T>
struct NormalTile {
  Terms<T> log_prob, entropy;  // in the backward `log_prob` has the slopes that are summed over the rows
  T log_std[kColumns<T>], inverse_std[kColumns<T>];
  T g[kThreads], h[kThreads];  // d loss / d log_prob and d entropy of a row
};

// Columns [j, j + width) of rows [first, first + rows).
struct Span {
  int64_t first, j;
  int rows, width;
};

// A thread's share of a span's elements.
template <bool kPlain, class T>
struct Normals {
  T z[kShare<kPlain>], action[kShare<kPlain>], log_std[kShare<kPlain>], inverse_std[kShare<kPlain>];
};

// f(e, place, normals) for a thread's shares of the span. action_row(row): where the actions of the tile's row lie, -1:
// nowhere. Every thread calls; all have waited since the tile was last read.
template <bool kPlain, class T, class R, class F>
PF_DEV void over_normals(const NormalRows& d, NormalTile<T>& tile, const Span& s, R&& action_row, F&& f) {
  constexpr int N = kShare<kPlain>;
  if (d.shared && threadIdx.x < static_cast<unsigned>(s.width)) {  // one exp for all rows
    const T log_std = element<T>(d.dist.log_std, 0, s.j + threadIdx.x);
    tile.log_std[threadIdx.x] = log_std, tile.inverse_std[threadIdx.x] = exp_of(-log_std);
  }
  __syncthreads();
  const int64_t begin = s.first * s.width, end = begin + s.rows * s.width;
  over_tile<N>(s.rows, s.width, [&](int e, Place p) {
    T mean[N];
    Normals<kPlain, T> x;
    if constexpr (kPlain) {
      read<true>(d.dist.mean.lead, begin + e, end, 0, T(0), mean);
      read<true>(d.dist.actions.lead, begin + e, end, 0, T(0), x.action);
      if (!d.shared) read<true>(d.dist.log_std.lead, begin + e, end, 0, T(0), x.log_std);
    } else {
      const int64_t i = s.first + p.row, at = action_row(p.row), column = s.j + p.column;
      mean[0] = element<T>(d.dist.mean, i, column);
      x.action[0] = at < 0 ? T(0) : element<T>(d.dist.actions, at, column);
      if (!d.shared) x.log_std[0] = element<T>(d.dist.log_std, i, column);
    }
    Place q = p;
#pragma unroll
    for (int k = 0; k < N; ++k, q.next()) {
      if (d.shared) {
        x.log_std[k] = tile.log_std[q.column], x.inverse_std[k] = tile.inverse_std[q.column];
      } else {
        x.inverse_std[k] = exp_of(-x.log_std[k]);
      }
      x.z[k] = (x.action[k] - mean[k]) * x.inverse_std[k];
    }
    f(e, p, x);
  });
}

// Row threadIdx.x of the tile; 0 of what the tile does not have.
template <class T>
struct NormalRow {
  T log_prob = 0, entropy = 0;
};
template <bool kPlain, class T, class R>
PF_DEV NormalRow<T> normal_forward(const NormalRows& d, NormalTile<T>& tile, int64_t first, int rows, R&& action_row) {
  NormalRow<T> row;
  const bool squash = d.dist.squash;
  over_columns<T>(d.dist.mean.width, [&](int64_t j, int width) {
    over_normals<kPlain>(d, tile, Span{first, j, rows, width}, action_row, [&](int e, Place p, const auto& x) {
#pragma unroll
      for (int k = 0; k < kShare<kPlain>; ++k, p.next()) {
        if (e + k >= rows * width) break;
        const int at = p.row * kTermStride<T> + p.column;
        const T density = normal_log_density(x.z[k], x.log_std[k]);
        tile.log_prob[at] = squash ? density - log_tanh_slope(x.action[k]) : density;
        if (!d.shared) tile.entropy[at] = normal_entropy(x.log_std[k]);
      }
    });
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < rows) {
      row.log_prob = plus_terms(row.log_prob, tile.log_prob, width);
      if (d.shared) {
        for (int k = 0; k < width; ++k) row.entropy += normal_entropy(tile.log_std[k]);
      } else {
        row.entropy = plus_terms(row.entropy, tile.entropy, width);
      }
    }
    __syncthreads();
  });
  if (squash) row.entropy = -row.log_prob;
  return row;
}

// Row threadIdx.x has these gradients; one whose both are 0 gives 0, whatever it holds.
template <class T>
PF_DEV void set_gradients(const NormalRows& d, NormalTile<T>& tile, T g, T h) {
  tile.g[threadIdx.x] = d.dist.squash ? g - h : g;  // the entropy is -log_prob there
  tile.h[threadIdx.x] = d.dist.squash ? T(0) : h;
}
// Gradients of the tile's rows, whose own threads have set theirs, and not yet waited.
template <bool kPlain, class T, class R>
PF_DEV void normal_backward(const NormalRows& d, NormalTile<T>& tile, int64_t first, int rows, R&& action_row) {
  constexpr int N = kShare<kPlain>;
  over_columns<T>(d.dist.mean.width, [&](int64_t j, int width) {
    over_normals<kPlain>(d, tile, Span{first, j, rows, width}, action_row, [&](int e, Place p, const auto& x) {
      T d_mean[N], slope[N];
      Place q = p;
#pragma unroll
      for (int k = 0; k < N; ++k, q.next()) {
        d_mean[k] = slope[k] = T(0);
        if (e + k >= rows * width) continue;
        const T g = tile.g[q.row], h = tile.h[q.row];
        if (g != 0 || h != 0) {
          const T to_z = g * x.z[k];
          d_mean[k] = to_z * x.inverse_std[k], slope[k] = to_z * x.z[k] - g + h;
        }
        if (d.sums_rows) tile.log_prob[q.row * kTermStride<T> + q.column] = slope[k];
      }
      const bool wants_log_std = d.d_log_std.lead.data && !d.sums_rows;
      if constexpr (kPlain) {
        const int64_t begin = first * width, end = begin + rows * width;
        if (d.d_mean.lead.data) write<true>(d.d_mean.lead, begin + e, end, d_mean);
        if (wants_log_std) write<true>(d.d_log_std.lead, begin + e, end, slope);
      } else {
        if (d.d_mean.lead.data) put(d.d_mean, first + p.row, j + p.column, d_mean[0]);
        if (wants_log_std) put(d.d_log_std, first + p.row, j + p.column, slope[0]);
      }
    });
    __syncthreads();
    if (!d.sums_rows) return;
    const double sum = sum_of_columns(
        rows, width, [&](int row, int k) { return static_cast<double>(tile.log_prob[row * kTermStride<T> + k]); });
    if (threadIdx.x < static_cast<unsigned>(width)) {
      d.of_columns[blockIdx.x * d.dist.mean.width + j + threadIdx.x] += sum;
    }
  });
}
// Every thread of every block calls, before the first tile.
template <class T>
PF_DEV void clear_columns(const NormalRows& d) {
  if (!d.sums_rows) return;
  over_columns<T>(d.dist.mean.width, [&](int64_t j, int width) {
    if (threadIdx.x < static_cast<unsigned>(width)) {
      d.of_columns[blockIdx.x * d.dist.mean.width + j + threadIdx.x] = 0;
    }
  });
}

// --- on the host -----------------------------------------------------------------------------------------------------

inline NormalRows normal_rows(const Normal& dist, const Rows& d_mean, const Rows& d_log_std, int64_t blocks,
                              Launch& launch) {
  NormalRows d{dist, d_mean, d_log_std, true, false, nullptr};
  for (int k = 0; k < dist.log_std.lead.ndim; ++k) d.shared = d.shared && dist.log_std.lead.stride[k] == 0;
  d.sums_rows = d_log_std.lead.data && d_log_std.lead.ndim == 0;
  if (d.sums_rows) d.of_columns = launch.allocate<double>(blocks * dist.mean.width);
  return d;
}
// Whether a tile's elements may be read and written four at a time.
inline bool is_plain(const NormalRows& d) {
  const auto packed = [](const Rows& r) { return is_packed(r, DType::f32); };
  return d.dist.mean.width <= kColumns<float> && packed(d.dist.mean) && packed(d.dist.actions) && packed(d.d_mean) &&
         (d.shared || packed(d.dist.log_std)) && (d.sums_rows || packed(d.d_log_std));
}

}  // namespace PF_ISA
}  // namespace pf
