// Sums in a fixed order: lanes by halves, warps and blocks in their order. No atomics on numbers: the same bits in
// every run. A type that is summed has `merge(other)` and may be copied as words.
#pragma once
#include "memory.cuh"
#include "../math/moments.h"

namespace pf {
namespace PF_ISA {

// What the lane `by` further on has.
template <class P>
PF_DEV P from_lane_after(const P& x, int by) {
  static_assert(sizeof(P) % 4 == 0);
  P y;
  uint32_t words[sizeof(P) / 4];
  __builtin_memcpy(words, &x, sizeof(P));
#pragma unroll
  for (size_t i = 0; i < sizeof(P) / 4; ++i) words[i] = __shfl_down_sync(kAllLanes, words[i], by);
  __builtin_memcpy(&y, words, sizeof(P));
  return y;
}

template <class T>
PF_DEV T max_of_warp(T x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x = larger_or_second(x, __shfl_xor_sync(kAllLanes, x, other));
  return x;
}
template <class T>
PF_DEV T sum_of_warp(T x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(kAllLanes, x, other);
  return x;
}

// The block's sum, whole in thread 0. Every thread calls; kWarps is the block's.
template <int kWarps, class P>
PF_DEV P sum_of_block(P x) {
  PF_SHARED(P[kWarps], of_warp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
  for (int by = 16; by > 0; by /= 2) x.merge(from_lane_after(x, by));
  __syncthreads();  // a second sum in one kernel finds the first one read
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int w = 1; w < kWarps; ++w) x.merge(of_warp[w]);
  }
  return x;
}

// True in every thread of the last block to come, which then sees what all others wrote before.
PF_DEV bool is_last_block(unsigned* ticket) {
  PF_SHARED(unsigned, taken);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) taken = atomicInc(ticket, gridDim.x - 1);  // wraps to 0 by itself
  __syncthreads();
  const bool last = taken == gridDim.x - 1;
  __threadfence();
  return last;
}

// The sum of partials[count], whole in thread 0: each thread its own, in order, then the block.
template <int kWarps, class P>
PF_DEV P sum_of_partials(const P* partials, int count) {
  P x{};
  for (int i = threadIdx.x; i < count; i += kWarps * kWarp) x.merge(partials[i]);
  return sum_of_block<kWarps>(x);
}

// --- moments ---------------------------------------------------------------------------------------------------------

struct CountedSums {
  double count = 0;
  ShiftedSums sums;
  PF_DEV void merge(const CountedSums& o) {
    sums.merge(count, o.sums, o.count);
    count += o.count;
  }
};

// All partials as [count, mean, m2]: a block joins a stretch of them, the last block to come joins those.
constexpr int kJoined = 512, kMostJoins = 64;
template <int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp)
    join_kernel(const CountedSums* partials, int64_t count, CountedSums* of_block, unsigned* ticket, double* moments) {
  const int64_t each = (count + gridDim.x - 1) / gridDim.x, first = each * blockIdx.x;
  const int64_t here = first + each < count ? each : count - first;
  CountedSums sums = sum_of_partials<kWarps>(partials + first, static_cast<int>(here));
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) of_block[blockIdx.x] = sums;
    if (!is_last_block(ticket)) return;
    sums = sum_of_partials<kWarps>(of_block, static_cast<int>(gridDim.x));
  }
  if (threadIdx.x != 0) return;
  const Moments m = sums.sums.finish(sums.count);
  moments[0] = m.count, moments[1] = m.mean, moments[2] = m.m2;
}

template <int kWarps = 8>
cudaError_t queue_join(const CountedSums* partials, int64_t count, double* moments, Launch& launch) {
  const int64_t wanted = (count + kJoined - 1) / kJoined, blocks = wanted < kMostJoins ? wanted : kMostJoins;
  CountedSums* of_block = blocks > 1 ? launch.allocate<CountedSums>(blocks) : nullptr;
  unsigned* ticket = blocks > 1 ? launch.ticket(launch.context) : nullptr;
  return start(&join_kernel<kWarps>, blocks, kWarps * kWarp, launch.stream, partials, count, of_block, ticket, moments);
}

}  // namespace PF_ISA
}  // namespace pf
