// Mean and variance in one launch, the affine map in the next. Over a process group the two run apart: moments here,
// joined by the caller, applied here.
#include "streams.cuh"

namespace pf {
namespace PF_ISA {
namespace {

// given: count, mean and m2; or nullptr: they are summed from the partials, by every block for itself.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 4)
    apply_kernel(const __grid_constant__ WhitenArgs a, const double* given, const CountedSums* partials, int count) {
  PF_SHARED(Moments, m);
  if (given) {
    if (threadIdx.x == 0) m = {given[0], given[1], given[2]};
  } else {
    const CountedSums sums = sum_of_partials<kWarps>(partials, count);
    if (threadIdx.x == 0) m = sums.sums.finish(sums.count);
  }
  __syncthreads();
  const bool enough = m.count > a.ddof;  // otherwise there is no deviation to speak of: x is left as it is
  const double variance = enough ? m.m2 / (m.count - a.ddof) : 0;
  const T mean = static_cast<T>(m.mean);
  const T divisor = a.eps_in_variance ? static_cast<T>(sqrt_of(variance + a.eps))
                                      : static_cast<T>(sqrt_of(variance)) + static_cast<T>(a.eps);
  over_stream<kPlain>(a.n, [&](int64_t i) {
    bool on[kShare<kPlain>];
    T x[kShare<kPlain>];
    read_mask<kPlain>(a.mask, i, a.n, i, on);
    read<kPlain>(a.x, i, a.n, i, T(0), x);
#pragma unroll
    for (int k = 0; k < kShare<kPlain>; ++k) {
      T y = enough ? (x[k] - mean) / divisor : x[k];
      if (enough && !a.shift_mean) y += mean;
      x[k] = on[k] ? y : T(0);
    }
    write<kPlain>(a.out, i, a.n, x);
  });
}

}  // namespace
}  // namespace PF_ISA

cudaError_t whiten(const WhitenArgs& a, Launch& launch) {
  using namespace PF_ISA;
  return by_dtype(a.is_double, [&](auto zero) {
    using T = decltype(zero);
    CountedSums* partials = nullptr;
    int count = 0;
    if (!a.have_moments) {
      const cudaError_t e = queue_moments<T>(a.x, a.mask, Stream{}, 0, a.n, launch, partials, count);
      if (e != cudaSuccess) return e;
    }
    if (!a.out.data) return queue_join(partials, count, a.moments, launch);
    const double* given = a.have_moments ? a.moments : nullptr;
    if constexpr (sizeof(T) == 4) {
      if (is_plain(a.x, DType::f32, 16) && is_plain_mask(a.mask) && is_plain(a.out, DType::f32, 16)) {
        return start(&apply_kernel<T, true>, blocks_for<true>(a.n), kThreads, launch.stream, a, given, partials, count);
      }
    }
    return start(&apply_kernel<T, false>, blocks_for<false>(a.n), kThreads, launch.stream, a, given, partials, count);
  });
}

}  // namespace pf
