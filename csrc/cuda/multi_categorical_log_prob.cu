// Categoricals side by side: each head of a row as categorical_log_prob has it, summed over the heads in their order.
// Rows of few columns come through shared memory, a thread a row; wider ones have a group of lanes that goes from head
// to head. Bytes a row, float32: 4·Σ nvec + 20·K + 8 forward, 8·Σ nvec + 20·K + 8 backward; [65536, 8 heads of 4]: 19.4
// MB and 27.8 MB, 6.5 µs and 9.3 µs at 3.0 TB/s.
#include "categorical.cuh"

namespace pf {
namespace PF_ISA {
namespace {

constexpr int kMostHeads = 256;  // that a kernel's parameters have room for

// Which columns each head has.
struct Heads {
  int count;
  int start[kMostHeads + 1];
  PF_DEV int width(int k) const { return start[k + 1] - start[k]; }
};

// Head k of row i among n: where its part of `saved` [3, K, n] lies.
PF_DEV int64_t saved_at(int part, int k, int heads, int64_t i, int64_t n) {
  return (static_cast<int64_t>(part) * heads + k) * n + i;
}
template <class T>
PF_DEV void save(const MultiCategoricalLogProbArgs& a, int k, int heads, int64_t i, const CategoricalRow<T>& row) {
  T* saved = static_cast<T*>(a.saved);
  saved[saved_at(0, k, heads, i, a.n)] = row.shift;
  saved[saved_at(1, k, heads, i, a.n)] = row.log_sum;
  saved[saved_at(2, k, heads, i, a.n)] = row.entropy;
}
template <class T>
PF_DEV void write_row(const MultiCategoricalLogProbArgs& a, int64_t i, T log_prob, T entropy) {
  static_cast<T*>(a.log_prob)[i] = log_prob;
  if (a.entropy) static_cast<T*>(a.entropy)[i] = entropy;
}
PF_DEV int action_of(const MultiCategorical& d, const Heads& heads, int k, int64_t i, Offence* offence) {
  return checked(element<int64_t>(d.actions, i, k), heads.width(k), i * heads.count + k, offence);
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 2)
    staged_kernel(const __grid_constant__ MultiCategoricalLogProbArgs a, const __grid_constant__ Heads heads) {
  PF_SHARED(StagedRows<T>, staged);
  over_tiles(a.n, [&](int64_t first, int rows) {
    staged.template read<S>(a.dist.logits, first, rows);
    __syncthreads();
    if (a.dist.action_mask.lead.data) {
      staged.mask(a.dist.action_mask, rows, [&](int row) { return first + row; });
      __syncthreads();
    }
    if (static_cast<int>(threadIdx.x) < rows) {
      const int64_t i = first + threadIdx.x;
      T log_prob = 0, entropy = 0;
      for (int k = 0; k < heads.count; ++k) {
        const int action = action_of(a.dist, heads, k, i, a.offence);
        const CategoricalRow<T> row = staged.forward(heads.start[k], heads.width(k), action, T(1));
        save(a, k, heads.count, i, row);
        log_prob += row.log_prob, entropy += row.entropy;
      }
      write_row(a, i, log_prob, entropy);
    }
    __syncthreads();
  });
}

template <int kLanes, class T, class S>
__global__ void __launch_bounds__(kThreads, 2)
    wide_kernel(const __grid_constant__ MultiCategoricalLogProbArgs a, const __grid_constant__ Heads heads) {
  constexpr int kGroups = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, leader = threadIdx.x % kWarp - lane;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups; first < a.n;
       first += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t i = first + threadIdx.x / kLanes;
    const bool there = i < a.n;
    const Line<T, S> all(a.dist.logits, a.dist.action_mask, there ? i : 0, there ? i : 0);
    const auto head = [&](int k) { return all.part(heads.start[k], heads.width(k)); };
    T log_prob = 0, entropy = 0;
    for (int begin = 0; begin < heads.count; begin += kLanes) {
      const int own = begin + lane, end = begin + kLanes < heads.count ? begin + kLanes : heads.count;
      const bool mine = there && own < heads.count;
      const int action = mine ? action_of(a.dist, heads, own, i, a.offence) : -1;
      CategoricalRow<T> row;
      if (mine && heads.width(own) <= kStagedWidth<T>) {
        const Line<T, S> line = head(own);
        row = row_of_thread([&](int c) { return line.at(c); }, line.width, action, T(1));
      }
      for (int k = begin; k < end; ++k) {
        const int width = heads.width(k), from = leader + k - begin;
        if (width > kStagedWidth<T>) {
          const int taken = __shfl_sync(kAllLanes, action, from);
          const CategoricalRow<T> found = kLanes == 8 || width <= kMostOf8 ? row_of_group<8>(head(k), taken, T(1))
                                                                           : row_of_group<kWarp>(head(k), taken, T(1));
          if (k == own) row = found;
        }
        log_prob += __shfl_sync(kAllLanes, row.log_prob, from), entropy += __shfl_sync(kAllLanes, row.entropy, from);
      }
      if (mine) save(a, own, heads.count, i, row);
    }
    if (there && lane == 0) write_row(a, i, log_prob, entropy);
  }
}

// What the backward knows of head k of row i.
template <class T>
PF_DEV LogitSlope<T> slope_of(const MultiCategoricalLogProbBackwardArgs& a, const Heads& heads, int k, int64_t i, T g,
                              T h) {
  const T* saved = static_cast<const T*>(a.saved);
  CategoricalRow<T> row;
  row.shift = saved[saved_at(0, k, heads.count, i, a.n)];
  row.log_sum = saved[saved_at(1, k, heads.count, i, a.n)];
  row.entropy = saved[saved_at(2, k, heads.count, i, a.n)];
  return {row, T(1), checked(element<int64_t>(a.dist.actions, i, k), heads.width(k), 0, nullptr), g, h};
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 2)
    staged_backward_kernel(const __grid_constant__ MultiCategoricalLogProbBackwardArgs a,
                           const __grid_constant__ Heads heads) {
  PF_SHARED(StagedRows<T>, staged);
  over_tiles(a.n, [&](int64_t first, int rows) {
    staged.template read<S>(a.dist.logits, first, rows);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < rows) {
      const int64_t i = first + threadIdx.x;
      const T g = element_or_0<T>(a.d_log_prob, i), h = element_or_0<T>(a.d_entropy, i);
      for (int k = 0; k < heads.count; ++k) {
        staged.backward(heads.start[k], heads.width(k), slope_of(a, heads, k, i, g, h));
      }
    }
    __syncthreads();
    staged.template write<S>(a.d_logits, a.dist.action_mask, first, rows, [&](int row) { return first + row; });
    __syncthreads();
  });
}

template <int kLanes, class T, class S>
__global__ void __launch_bounds__(kThreads, 2)
    wide_backward_kernel(const __grid_constant__ MultiCategoricalLogProbBackwardArgs a,
                         const __grid_constant__ Heads heads) {
  constexpr int kGroups = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kLanes; i < a.n;
       i += static_cast<int64_t>(gridDim.x) * kGroups) {
    const Line<T, S> all(a.dist.logits, a.dist.action_mask, i, i);
    const T g = element_or_0<T>(a.d_log_prob, i), h = element_or_0<T>(a.d_entropy, i);
    const int64_t to = offset_of(a.d_logits.lead, i);
    for (int k = 0; k < heads.count; ++k) {
      const bool narrow = heads.width(k) <= kStagedWidth<T>;
      if (narrow && k % kLanes != lane) continue;
      const Line<T, S> line = all.part(heads.start[k], heads.width(k));
      const LogitSlope<T> slope = slope_of(a, heads, k, i, g, h);
      const int64_t offset = to + heads.start[k] * a.d_logits.stride;
      if (narrow) {
        for (int c = 0; c < line.width; ++c) write_slope(line, a.d_logits, offset, slope, c);
      } else {
        write_slopes<kLanes>(line, a.d_logits, offset, slope, lane, -1);
      }
    }
  }
}

// False where there are more heads, or wider ones, than the kernels take.
inline bool heads_of(const MultiCategorical& d, Heads& heads, int64_t& widest) {
  if (d.actions.width > kMostHeads || d.logits.width > kMostActions) return false;
  heads.count = static_cast<int>(d.actions.width), heads.start[0] = 0, widest = 0;
  for (int k = 0; k < heads.count; ++k) {
    heads.start[k + 1] = heads.start[k] + static_cast<int>(d.nvec[k]);
    widest = widest < d.nvec[k] ? d.nvec[k] : widest;
  }
  return true;
}

// f(T{}, S{}, lanes).
template <class F>
inline cudaError_t by_heads(const MultiCategorical& d, bool is_double, bool plain, int64_t widest, F&& f) {
  return by_logits<true>(is_double, plain, d.logits.lead.dtype, [&](auto t, auto s) {
    if (d.logits.width <= kStagedWidth<decltype(t)>) return f(t, s, std::integral_constant<int, 1>{});
    if (widest <= kMostOf8) return f(t, s, std::integral_constant<int, 8>{});
    return f(t, s, std::integral_constant<int, kWarp>{});
  });
}

}  // namespace
}  // namespace PF_ISA

cudaError_t multi_categorical_log_prob(const MultiCategoricalLogProbArgs& a, Launch& launch) {
  using namespace PF_ISA;
  Heads heads;
  int64_t widest;
  if (!heads_of(a.dist, heads, widest)) return cudaErrorInvalidValue;
  const bool plain = is_plain(a.dist.logits, a.dist.action_mask, a.is_double);
  return by_heads(a.dist, a.is_double, plain, widest, [&](auto t, auto s, auto lanes) {
    using T = decltype(t);
    using S = decltype(s);
    if constexpr (lanes() == 1) {
      return start(&staged_kernel<T, S>, blocks_of_tiles(a.n), kThreads, launch.stream, a, heads);
    } else {
      const int64_t blocks = blocks_of_groups(a.n, lanes());
      return start(&wide_kernel<lanes(), T, S>, blocks, kThreads, launch.stream, a, heads);
    }
  });
}

cudaError_t multi_categorical_log_prob_backward(const MultiCategoricalLogProbBackwardArgs& a, Launch& launch) {
  using namespace PF_ISA;
  Heads heads;
  int64_t widest;
  if (!heads_of(a.dist, heads, widest)) return cudaErrorInvalidValue;
  const Rows &z = a.dist.logits, &mask = a.dist.action_mask;
  const bool plain = is_plain(z, mask, a.is_double) && is_alike(z, a.d_logits) && !mask.lead.data;
  return by_heads(a.dist, a.is_double, plain, widest, [&](auto t, auto s, auto lanes) {
    using T = decltype(t);
    using S = decltype(s);
    if constexpr (lanes() == 1) {
      return start(&staged_backward_kernel<T, S>, blocks_of_tiles(a.n), kThreads, launch.stream, a, heads);
    } else {
      const int64_t blocks = blocks_of_groups(a.n, lanes());
      return start(&wide_backward_kernel<lanes(), T, S>, blocks, kThreads, launch.stream, a, heads);
    }
  });
}

}  // namespace pf
