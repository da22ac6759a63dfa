// Gradients times what autograd brings, in place. It brings 1 nearly always, but only the GPU knows: then nothing
// moves.
#include "streams.cuh"

namespace pf {
namespace PF_ISA {
namespace {

__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleArgs a) {
  const double factor = element<double>(a.factor, 0);
  if (factor == 1.0) return;
#pragma unroll
  for (int k = 0; k < kMaxScaled; ++k) {
    if (!a.grads[k].data) return;
    const bool is_double = a.grads[k].dtype == DType::f64;
    over_stream<false>(a.n[k], [&](int64_t i) {
      if (is_double) {
        put(a.grads[k], i, element<double>(a.grads[k], i) * factor);
      } else {
        put(a.grads[k], i, element<float>(a.grads[k], i) * static_cast<float>(factor));
      }
    });
  }
}

}  // namespace
}  // namespace PF_ISA

cudaError_t scale(const ScaleArgs& a, Launch& launch) {
  using namespace PF_ISA;
  int64_t most = 0;
  for (const int64_t n : a.n) most = n > most ? n : most;
  if (most == 0) return cudaSuccess;
  return start(&scale_kernel, blocks_for<false>(most), kThreads, launch.stream, a);
}

}  // namespace pf
