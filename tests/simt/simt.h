// Runs CUDA sources on a CPU: what the compiler and the runtime would supply, for plain g++. A launch runs its blocks
// as fibers of one thread, several blocks at a time in an order that a seed decides, so that a block which waits for
// another one waits, and a barrier that not every thread reaches is found. Shared memory starts as NaN. Built with
// AddressSanitizer and UBSan, it finds what a kernel reads or writes beside its tensors.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "the harness stopped"; }

namespace pf::simt {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();

enum class Meeting { barrier, shuffle, vote, warp };
// Waits until every thread of the block (barrier) or of `mask` in the warp is at the same kind of meeting; `value` is
// what this thread brings, and the return value what thread `of` of the warp brought. of < 0: nothing.
uint64_t meet(Meeting kind, unsigned mask, uint64_t value, int of);
unsigned ballot(unsigned mask, bool on);
// Lets others run: a loop that waits for memory must call it.
void pause();
// Memory of the block, one piece for each place that asks; poisoned when the block starts.
void* shared(const void* place, size_t bytes);

// What went wrong in a launch, or nullptr.
const char* complaint();
void set_schedule(unsigned seed, int resident_blocks);
cudaError_t run(unsigned grid, unsigned block, const std::function<void()>& thread);

template <class T>
T shuffle(unsigned mask, T x, int of) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = meet(Meeting::shuffle, mask, bits, of);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}
inline int lane() { return static_cast<int>(thread_index().x % 32); }

}  // namespace pf::simt

#define threadIdx (pf::simt::thread_index())
#define blockIdx (pf::simt::block_index())
#define blockDim (pf::simt::block_size())
#define gridDim (pf::simt::grid_size())

inline void __syncthreads() { pf::simt::meet(pf::simt::Meeting::barrier, ~0u, 0, -1); }
inline void __syncwarp(unsigned mask = ~0u) { pf::simt::meet(pf::simt::Meeting::warp, mask, 0, -1); }
template <class T>
T __shfl_sync(unsigned mask, T x, int of, int width = 32) {
  return pf::simt::shuffle(mask, x, pf::simt::lane() / width * width + of % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int other, int width = 32) {
  const int of = pf::simt::lane() ^ other;
  return pf::simt::shuffle(mask, x, of / width == pf::simt::lane() / width ? of : pf::simt::lane());
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
  const int lane = pf::simt::lane(), of = lane + by;
  return pf::simt::shuffle(mask, x, of / width == lane / width ? of : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
  const int lane = pf::simt::lane(), of = lane - by;
  return pf::simt::shuffle(mask, x, of >= lane / width * width ? of : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool on) { return pf::simt::ballot(mask, on); }
inline bool __any_sync(unsigned mask, bool on) { return pf::simt::ballot(mask, on) != 0; }
inline bool __all_sync(unsigned mask, bool on) { return pf::simt::ballot(mask, on) == mask; }

inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}
inline void __threadfence() {}
inline void __threadfence_system() {}
template <class T>
T atomicAdd(T* at, T by) {
  const T old = *at;
  *at = old + by;
  return old;
}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned old = *at;
  *at = old >= most ? 0 : old + 1;
  return old;
}
inline unsigned long long atomicCAS_system(unsigned long long* at, unsigned long long expected,
                                           unsigned long long wanted) {
  const unsigned long long old = *at;
  if (old == expected) *at = wanted;
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}
