// Tiles of kThreads rows, or of a few of their columns: all threads of a block go through the elements, neighbours to
// neighbours, so that loads and stores are whole lines whatever the width; then every thread has a row of its own.
#pragma once
#include "streams.cuh"

namespace pf {
namespace PF_ISA {

// Elements of any dtype and strides, where a kernel is not compiled for the dtype of contiguous ones.
struct Any {};

template <class S>
constexpr DType kDType = DType::f32;
template <>
constexpr DType kDType<BFloat16> = DType::bf16;
template <>
constexpr DType kDType<Half> = DType::f16;

template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

// Sixteen bytes at once, in one instruction whatever the compiler thinks of the branch beside it.
PF_DEV uint4 load16(const void* p) {
#if PF_SIMT
  return *static_cast<const uint4*>(p);
#else
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p)));
  return v;
#endif
}
PF_DEV void store16(void* p, const uint4& v) {
#if PF_SIMT
  *static_cast<uint4*>(p) = v;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}

PF_DEV void words_of(const uint4& v, uint32_t (&w)[4]) { w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w; }

// Sixteen bytes of memory to numbers and back.
PF_DEV void unpack(const uint4& v, const float*, float (&x)[4]) {
  x[0] = of_bits(static_cast<int32_t>(v.x)), x[1] = of_bits(static_cast<int32_t>(v.y));
  x[2] = of_bits(static_cast<int32_t>(v.z)), x[3] = of_bits(static_cast<int32_t>(v.w));
}
PF_DEV void unpack(const uint4& v, const BFloat16*, float (&x)[8]) {
  uint32_t w[4];
  words_of(v, w);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = of_bits(static_cast<int32_t>(w[i] << 16));
    x[2 * i + 1] = of_bits(static_cast<int32_t>(w[i] & 0xffff0000u));
  }
}
PF_DEV void unpack(const uint4& v, const Half*, float (&x)[8]) {
  uint32_t w[4];
  words_of(v, w);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = number(Half{static_cast<uint16_t>(w[i])});
    x[2 * i + 1] = number(Half{static_cast<uint16_t>(w[i] >> 16)});
  }
}

template <class S>
PF_DEV uint32_t pair_of(float low, float high) {
  return static_cast<uint32_t>(Stored<S, float>::from(low).bits) |
         static_cast<uint32_t>(Stored<S, float>::from(high).bits) << 16;
}
#if !PF_SIMT && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
template <>
PF_DEV uint32_t pair_of<BFloat16>(float low, float high) {
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}
template <>
PF_DEV uint32_t pair_of<Half>(float low, float high) {
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}
#endif
PF_DEV uint4 packed(const float*, const float (&x)[4]) {
  return {static_cast<uint32_t>(bits_of(x[0])), static_cast<uint32_t>(bits_of(x[1])),
          static_cast<uint32_t>(bits_of(x[2])), static_cast<uint32_t>(bits_of(x[3]))};
}
template <class S>
PF_DEV uint4 packed(const S*, const float (&x)[8]) {
  return {pair_of<S>(x[0], x[1]), pair_of<S>(x[2], x[3]), pair_of<S>(x[4], x[5]), pair_of<S>(x[6], x[7])};
}

// Whether rows lie one after the other, from an address that sixteen bytes may be read at; absent ones do.
inline bool is_packed(const Rows& r, DType dtype) {
  return !r.lead.data || (r.lead.dtype == dtype && r.stride == 1 &&
                          (r.lead.ndim == 0 || (r.lead.ndim == 1 && r.lead.stride[0] == r.width)) &&
                          reinterpret_cast<uintptr_t>(r.lead.data) % 16 == 0);
}

PF_DEV int64_t offset_of(const Rows& r, int64_t row, int64_t column) {
  return offset_of(r.lead, row) + column * r.stride;
}
template <class T>
PF_DEV T element(const Rows& r, int64_t row, int64_t column) {
  return element<T>(r.lead.data, r.lead.dtype, offset_of(r, row, column));
}
PF_DEV bool flag(const Rows& r, int64_t row, int64_t column) {
  return flag(r.lead.data, r.lead.dtype, offset_of(r, row, column));
}
template <class T>
PF_DEV void put(const Rows& r, int64_t row, int64_t column, T x) {
  put(r.lead, offset_of(r, row, column), x);
}
// One number a row, 0 where absent.
template <class T>
PF_DEV T element_or_0(const Stream& s, int64_t i) {
  return s.data ? element<T>(s, i) : T(0);
}

// Where a thread is in a tile of rows x width elements, which it goes through kShare at a time.
struct Place {
  int row, column, width;

  PF_DEV void next() {
    if (++column == width) column = 0, ++row;
  }
};
// f(e, place): the thread's elements [e, e + kShare) of the n first of a tile of rows that are `width` long.
template <int kShare, class F>
PF_DEV void over_elements(int n, int width, F&& f) {
  constexpr int kStep = kThreads * kShare;
  const int down = kStep / width, right = kStep % width;
  int e = threadIdx.x * kShare;
  Place p{e / width, e % width, width};
  for (; e < n; e += kStep) {
    f(e, p);
    p.row += down, p.column += right;
    if (p.column >= width) p.column -= width, ++p.row;
  }
}
// The same of all elements, of which those below rows·width exist.
template <int kShare, class F>
PF_DEV void over_tile(int rows, int width, F&& f) {
  over_elements<kShare>(rows * width, width, f);
}

// Blocks for the tiles of n rows; where blocks leave sums behind, at least one and not too many.
inline int64_t blocks_of_tiles(int64_t n) {
  const int64_t tiles = (n + kThreads - 1) / kThreads, most = int64_t{1} << 30;
  return tiles < most ? tiles : most;
}
inline int64_t few_blocks(int64_t blocks) { return blocks < 1 ? 1 : blocks < kMostBlocks ? blocks : kMostBlocks; }
// f(first, rows) for the block's tiles of n rows.
template <class F>
PF_DEV void over_tiles(int64_t n, F&& f) {
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < n;
       first += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t left = n - first;
    f(first, static_cast<int>(left < kThreads ? left : kThreads));
  }
}

// What lane `of` has, of a struct that may be copied as words. Every lane of the warp calls.
template <class P>
PF_DEV P from_lane(const P& x, int of) {
  static_assert(sizeof(P) % 4 == 0);
  P y;
  uint32_t words[sizeof(P) / 4];
  __builtin_memcpy(words, &x, sizeof(P));
#pragma unroll
  for (size_t i = 0; i < sizeof(P) / 4; ++i) words[i] = __shfl_sync(kAllLanes, words[i], of);
  __builtin_memcpy(&y, words, sizeof(P));
  return y;
}

// --- terms of a tile, summed along its rows or its columns -----------------------------------------------------------

// Blocks of a kernel that keeps much in registers: in double, each has them to itself.
template <class T>
constexpr int kResident = sizeof(T) == 4 ? 2 : 1;

// As many columns at a time as shared memory has room for twice. A stride of one more: a warp's rows, or a warp's
// columns, then lie in different banks.
template <class T>
constexpr int kColumns = 64 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kTermStride = kColumns<T> + 1;
template <class T>
using Terms = T[kThreads * kTermStride<T>];

// f(j, width): the columns [j, j + width) of `all`, kColumns at a time.
template <class T, class F>
PF_DEV void over_columns(int64_t all, F&& f) {
  for (int64_t j = 0; j < all; j += kColumns<T>) {
    f(j, static_cast<int>(all - j < kColumns<T> ? all - j : int64_t{kColumns<T>}));
  }
}
// The terms of row threadIdx.x, added to `sum` in order.
template <class T>
PF_DEV T plus_terms(T sum, const Terms<T>& terms, int width) {
  for (int k = 0; k < width; ++k) sum += terms[threadIdx.x * kTermStride<T> + k];
  return sum;
}

// Every thread calls: term(row, column) of rows x width <= kThreads/16 columns, summed over the rows. Thread k < width
// gets column k's, in the order of the rows, segment by segment.
template <class F>
PF_DEV double sum_of_columns(int rows, int width, F&& term) {
  constexpr int kWide = kThreads / 16;
  PF_SHARED(double[kThreads], of_segment);
  const int column = threadIdx.x % kWide, segment = threadIdx.x / kWide, size = (rows + 15) / 16;
  double sum = 0;
  if (column < width) {
    const int end = (segment + 1) * size < rows ? (segment + 1) * size : rows;
    for (int row = segment * size; row < end; ++row) sum += term(row, column);
  }
  __syncthreads();  // a second sum in one kernel finds the first one read
  of_segment[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  if (segment == 0) {
#pragma unroll 1
    for (int s = 0; s < 16; ++s) sum += of_segment[s * kWide + column];
  }
  return sum;
}

// The columns of partials[blocks][width], each summed over the blocks, to a gradient [width]. Every thread of one block
// calls.
PF_DEV void write_sums_of_columns(const double* partials, int blocks, const Rows& to) {
  constexpr int kWide = kThreads / 16;
  for (int64_t j = 0; j < to.width; j += kWide) {
    const int width = static_cast<int>(to.width - j < kWide ? to.width - j : int64_t{kWide});
    const double sum =
        sum_of_columns(blocks, width, [&](int block, int k) { return partials[block * to.width + j + k]; });
    if (threadIdx.x < static_cast<unsigned>(width)) put(to, 0, j + threadIdx.x, sum);
  }
}

}  // namespace PF_ISA
}  // namespace pf
