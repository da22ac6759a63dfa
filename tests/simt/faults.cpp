// Kernels with a fault each: the harness must find it.
#include <pybind11/pybind11.h>

#include "cuda/reduce.cuh"

namespace pf {
namespace PF_ISA {
namespace {

__global__ void sums_of_warps(float* out) { out[threadIdx.x] = sum_of_warp(static_cast<float>(threadIdx.x)); }
__global__ void barrier_for_some(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void shuffle_for_some(float* out) {
  if (threadIdx.x % 32 < 5) out[threadIdx.x] = __shfl_sync(kAllLanes, 1.0f, 0);
}
__global__ void waits_for_a_later_block(float* out) {
  if (blockIdx.x != gridDim.x - 1 && threadIdx.x == 0) {
    while (*static_cast<volatile float*>(out) == 0) PF_PAUSE();
  }
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) *static_cast<volatile float*>(out) = 1;
}
__global__ void writes_past_the_end(float* out, int n) { out[threadIdx.x + static_cast<unsigned>(n)] = 1; }
__global__ void reads_shared_memory_before_it_is_written(float* out) {
  PF_SHARED(float[64], x);
  out[threadIdx.x] = x[threadIdx.x];
}

}  // namespace
}  // namespace PF_ISA
}  // namespace pf

PYBIND11_MODULE(_simt_faults, m) {
  using namespace pf;
  using namespace pf::cuda;
  const auto run = [](auto kernel, int blocks, intptr_t out, auto... rest) {
    const cudaError_t e = start(kernel, blocks, 64, nullptr, reinterpret_cast<float*>(out), rest...);
    return std::string(e == cudaSuccess ? "" : simt::complaint());
  };
  m.def("sums_of_warps", [=](intptr_t out) { return run(&sums_of_warps, 1, out); });
  m.def("barrier_for_some", [=](intptr_t out) { return run(&barrier_for_some, 1, out); });
  m.def("shuffle_for_some", [=](intptr_t out) { return run(&shuffle_for_some, 1, out); });
  m.def("waits_for_a_later_block",
        [=](intptr_t out, int blocks) { return run(&waits_for_a_later_block, blocks, out); });
  m.def("writes_past_the_end", [=](intptr_t out, int n) { return run(&writes_past_the_end, 1, out, n); });
  m.def("reads_shared", [=](intptr_t out) { return run(&reads_shared_memory_before_it_is_written, 1, out); });
  m.def("set_schedule", &simt::set_schedule);
}
