// A thread's share of a stream: four neighbours where all streams are plain, so that loads are of sixteen bytes, else
// one element of any dtype and strides, gathered by an index or not.
#pragma once
#include "reduce.cuh"

namespace pf {
namespace PF_ISA {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kMostBlocks = 512;

template <bool kPlain>
constexpr int kShare = kPlain ? 4 : 1;

// Blocks for n elements: which element falls to which thread depends on n alone.
template <bool kPlain>
inline int64_t blocks_for(int64_t n) {
  const int64_t tile = kThreads * kShare<kPlain>, blocks = (n + tile - 1) / tile;
  return blocks < 1 ? 1 : blocks > kMostBlocks ? kMostBlocks : blocks;
}

// f(i): the thread's elements [i, i + kShare), of which those below n exist; together the threads of the grid go
// through all of them.
template <bool kPlain, class F>
PF_DEV void over_stream(int64_t n, F&& f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kShare<kPlain>;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kShare<kPlain>;
  for (; i < n; i += step) f(i);
}

// Elements i... of a stream, or what `absent` says. `at`: which element the i-th is, where gathered.
template <bool kPlain, class T>
PF_DEV void read(const Stream& s, int64_t i, int64_t n, int64_t at, T absent, T (&x)[kShare<kPlain>]) {
#pragma unroll
  for (int k = 0; k < kShare<kPlain>; ++k) x[k] = absent;
  if (!s.data) return;
  if constexpr (kPlain) {
    const float* p = static_cast<const float*>(s.data) + i;
    if (i + 4 <= n) return load4(p, x);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k < n) x[k] = p[k];
    }
  } else {
    x[0] = element<T>(s, at);
  }
}
template <bool kPlain>
PF_DEV void read_mask(const Stream& s, int64_t i, int64_t n, int64_t at, bool (&on)[kShare<kPlain>]) {
#pragma unroll
  for (int k = 0; k < kShare<kPlain>; ++k) on[k] = i + k < n;
  if (!s.data) return;
  if constexpr (kPlain) {
    const auto* p = static_cast<const uint8_t*>(s.data) + i;
    if (i + 4 <= n) {
      const uint32_t four = *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
      for (int k = 0; k < 4; ++k) on[k] = (four >> (8 * k) & 0xffu) != 0;
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) on[k] = i + k < n && p[k] != 0;
    }
  } else {
    on[0] = flag(s.data, s.dtype, offset_of(s, at));
  }
}
template <bool kPlain, class T>
PF_DEV void write(const Stream& s, int64_t i, int64_t n, const T (&x)[kShare<kPlain>]) {
  if constexpr (kPlain) {
    float* p = static_cast<float*>(const_cast<void*>(s.data)) + i;
    if (i + 4 <= n) return store4(p, x);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + k < n) p[k] = x[k];
    }
  } else {
    put(s, i, x[0]);  // results are contiguous
  }
}

inline bool is_plain_mask(const Stream& s) { return is_plain(s, DType::boolean, 4) || is_plain(s, DType::u8, 4); }

// Which stored element the i-th of the minibatch is; -1 where the index is none of them, and that is noted.
PF_DEV int64_t gathered(const Stream& index, int64_t i, int64_t stored, Offence* offence) {
  if (!index.data) return i;
  const int64_t at = element<int64_t>(index, i);
  if (at >= 0 && at < stored) return at;
  refuse(offence, i, at);
  return -1;
}

// --- moments of a stream ---------------------------------------------------------------------------------------------

// The valid elements of x [n], gathered by `index` or not: a partial sum for each block.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    moments_kernel(const __grid_constant__ Stream x, const __grid_constant__ Stream mask,
                   const __grid_constant__ Stream index, int64_t stored, int64_t n, CountedSums* partials) {
  CountedSums mine;
  over_stream<kPlain>(n, [&](int64_t i) {
    const int64_t at = gathered(index, i, stored, nullptr);
    if (at < 0) return;
    bool on[kShare<kPlain>];
    T v[kShare<kPlain>];
    read_mask<kPlain>(mask, i, n, at, on);
    read<kPlain>(x, i, n, at, T(0), v);
#pragma unroll
    for (int k = 0; k < kShare<kPlain>; ++k) {
      if (!on[k]) continue;
      mine.sums.add(static_cast<double>(v[k]), mine.count == 0);
      mine.count += 1;
    }
  });
  mine = sum_of_block<kWarps>(mine);
  if (threadIdx.x == 0) partials[blockIdx.x] = mine;
}

// Queues it; `blocks` says how many partials there are.
template <class T>
inline cudaError_t queue_moments(const Stream& x, const Stream& mask, const Stream& index, int64_t stored, int64_t n,
                                 Launch& launch, CountedSums*& partials, int& blocks) {
  const bool plain = sizeof(T) == 4 && !index.data && is_plain(x, DType::f32, 16) && is_plain_mask(mask);
  const int64_t wanted = plain ? blocks_for<true>(n) : blocks_for<false>(n);
  blocks = static_cast<int>(wanted);
  partials = launch.allocate<CountedSums>(wanted);
  if constexpr (sizeof(T) == 4) {
    if (plain) {
      return start(&moments_kernel<T, true>, wanted, kThreads, launch.stream, x, mask, index, stored, n, partials);
    }
  }
  return start(&moments_kernel<T, false>, wanted, kThreads, launch.stream, x, mask, index, stored, n, partials);
}

}  // namespace PF_ISA
}  // namespace pf
