// Log-prob and entropy of categorical rows: the logits are read once forward, and read once and their gradient written
// once backward.
// Bytes a row, bfloat16: 2·A + 24 forward, 4·A + 28 backward; [8192, 151936]: 2.5 GB and 5.0 GB, 0.83 ms and 1.66 ms at
// 3.0 TB/s.
#include "categorical.cuh"

namespace pf {
namespace PF_ISA {
namespace {

template <class T>
PF_DEV void write_row(const CategoricalLogProbArgs& a, int64_t i, const CategoricalRow<T>& row) {
  static_cast<T*>(a.log_prob)[i] = row.log_prob;
  if (a.entropy) static_cast<T*>(a.entropy)[i] = row.entropy;
  static_cast<T*>(a.saved)[i] = row.shift, static_cast<T*>(a.saved)[a.n + i] = row.log_sum;
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 3)
    staged_kernel(const __grid_constant__ CategoricalLogProbArgs a, T inverse_temperature) {
  PF_SHARED(StagedRows<T>, staged);
  const bool masked = a.dist.action_mask.lead.data;
  over_tiles(a.n, [&](int64_t first, int rows) {
    staged.template read<S>(a.dist.logits, first, rows);
    __syncthreads();
    if (masked) {
      staged.mask(a.dist.action_mask, rows, [&](int row) { return first + row; });
      __syncthreads();
    }
    if (static_cast<int>(threadIdx.x) < rows) {
      const int64_t i = first + threadIdx.x;
      const int action = action_of(a.dist, i, i, a.offence);
      const T inverse = inverse_of_row(a.dist, i, inverse_temperature);
      write_row(a, i, staged.forward(0, static_cast<int>(a.dist.logits.width), action, inverse));
    }
    __syncthreads();
  });
}

template <int kLanes, class T, class S>
__global__ void __launch_bounds__(kThreads, kLanes == kThreads ? 3 : 2)
    wide_kernel(const __grid_constant__ CategoricalLogProbArgs a, T inverse_temperature) {
  constexpr int kGroups = kThreads / kLanes;
  const bool leads = threadIdx.x % kLanes == 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups; first < a.n;
       first += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t i = first + threadIdx.x / kLanes;
    const bool there = i < a.n;
    const int action = there ? action_of(a.dist, i, i, leads ? a.offence : nullptr) : -1;
    const T inverse = there ? inverse_of_row(a.dist, i, inverse_temperature) : T(1);
    const Line<T, S> line(a.dist.logits, a.dist.action_mask, there ? i : 0, there ? i : 0);
    const CategoricalRow<T> row = row_of_group<kLanes>(line, action, inverse);
    if (there && leads) write_row(a, i, row);
  }
}

// What the backward knows of row i.
template <class T>
PF_DEV LogitSlope<T> slope_of(const CategoricalLogProbBackwardArgs& a, int64_t i, T inverse_temperature) {
  const T* saved = static_cast<const T*>(a.saved);
  CategoricalRow<T> row;
  row.shift = saved[i], row.log_sum = saved[a.n + i];
  if (a.d_entropy.data) row.entropy = static_cast<const T*>(a.entropy)[i];
  const int64_t action = element<int64_t>(a.dist.actions, i);
  const int known = action >= 0 && action < a.dist.logits.width ? static_cast<int>(action) : -1;
  return {row, inverse_of_row(a.dist, i, inverse_temperature), known, element_or_0<T>(a.d_log_prob, i),
          element_or_0<T>(a.d_entropy, i)};
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, 3)
    staged_backward_kernel(const __grid_constant__ CategoricalLogProbBackwardArgs a, T inverse_temperature) {
  PF_SHARED(StagedRows<T>, staged);
  over_tiles(a.n, [&](int64_t first, int rows) {
    staged.template read<S>(a.dist.logits, first, rows);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < rows) {
      const LogitSlope<T> slope = slope_of(a, first + threadIdx.x, inverse_temperature);
      staged.backward(0, static_cast<int>(a.dist.logits.width), slope);
    }
    __syncthreads();
    staged.template write<S>(a.d_logits, a.dist.action_mask, first, rows, [&](int row) { return first + row; });
    __syncthreads();
  });
}

template <int kLanes, class T, class S>
__global__ void __launch_bounds__(kThreads, kLanes == kThreads ? 3 : 2)
    wide_backward_kernel(const __grid_constant__ CategoricalLogProbBackwardArgs a, T inverse_temperature,
                         int64_t pieces) {
  constexpr int kGroups = kThreads / kLanes;
  const int64_t n = a.n * pieces;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kLanes; k < n;
       k += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t i = pieces == 1 ? k : quotient(k, pieces), piece = k - i * pieces;
    const Line<T, S> line(a.dist.logits, a.dist.action_mask, i, i);
    write_slopes<kLanes>(line, a.d_logits, offset_of(a.d_logits.lead, i), slope_of(a, i, inverse_temperature),
                         static_cast<int>(threadIdx.x % kLanes), kLanes == kThreads ? piece : -1);
  }
}

}  // namespace
}  // namespace PF_ISA

cudaError_t categorical_log_prob(const CategoricalLogProbArgs& a, Launch& launch) {
  using namespace PF_ISA;
  const Rows& z = a.dist.logits;
  return by_logits<true>(a.is_double, is_plain(z, a.dist.action_mask, a.is_double), z.lead.dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    const T inverse = inverse_of(static_cast<T>(a.dist.temperature_value));
    return by_width<T>(z.width, [&](auto lanes) {
      if constexpr (lanes() == 1) {
        return start(&staged_kernel<T, S>, blocks_of_tiles(a.n), kThreads, launch.stream, a, inverse);
      } else {
        const int64_t blocks = blocks_of_groups(a.n, lanes());
        return start(&wide_kernel<lanes(), T, S>, blocks, kThreads, launch.stream, a, inverse);
      }
    });
  });
}

cudaError_t categorical_log_prob_backward(const CategoricalLogProbBackwardArgs& a, Launch& launch) {
  using namespace PF_ISA;
  const Rows& z = a.dist.logits;
  const bool plain =
      is_plain(z, a.dist.action_mask, a.is_double) && is_alike(z, a.d_logits) && !a.dist.action_mask.lead.data;
  return by_logits<true>(a.is_double, plain, z.lead.dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    const T inverse = inverse_of(static_cast<T>(a.dist.temperature_value));
    return by_width<T>(z.width, [&](auto lanes) {
      if constexpr (lanes() == 1) {
        return start(&staged_backward_kernel<T, S>, blocks_of_tiles(a.n), kThreads, launch.stream, a, inverse);
      } else {
        const int64_t pieces = lanes() == kThreads ? pieces_of<T, S>(z.width) : 1;
        const int64_t blocks = blocks_of_groups(a.n * pieces, lanes());
        return start(&wide_backward_kernel<lanes(), T, S>, blocks, kThreads, launch.stream, a, inverse, pieces);
      }
    });
  });
}

}  // namespace pf
