// Elements of any dtype and strides to and from registers.
#pragma once
#include "unit.cuh"

namespace pf {
namespace PF_ISA {

// --- where an element lies -------------------------------------------------------------------------------------------

// i/d for 0 <= i < 2^53 and d > 0, without the call that a 64-bit division is: by a reciprocal that two steps of
// Newton's make good to a unit, and that unit.
PF_DEV int64_t quotient(int64_t i, int64_t d) {
  if ((i | d) >> 32 == 0) return static_cast<uint32_t>(i) / static_cast<uint32_t>(d);
  const double x = static_cast<double>(d);
#if PF_SIMT
  const float near = 1.0f / static_cast<float>(x);
#else
  float near;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(static_cast<float>(x)));
#endif
  double r = near;
  r = fma_of(r, fma_of(-x, r, 1.0), r), r = fma_of(r, fma_of(-x, r, 1.0), r);
  int64_t q = static_cast<int64_t>(static_cast<double>(i) * r);
  if (i - q * d < 0) --q;
  if (i - q * d >= d) ++q;
  return q;
}

// Offset, in elements, of flat element i.
PF_DEV int64_t offset_of(const Stream& s, int64_t i) {
  if (s.ndim <= 1) return i * s.stride[0];  // of no dimension at all the stride is 0
  int64_t offset = 0;
#pragma unroll 1
  for (int d = s.ndim - 1; d > 0; --d) {
    const int64_t q = quotient(i, s.shape[d]);
    offset += (i - q * s.shape[d]) * s.stride[d];
    i = q;
  }
  return offset + i * s.stride[0];
}

// --- half precision --------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

PF_DEV float number(BFloat16 x) { return of_bits(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16)); }
PF_DEV float number(Half x) {
#if PF_SIMT
  _Float16 h;
  std::memcpy(&h, &x, sizeof(h));
  return h;
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#endif
}
template <class T>
PF_DEV T number(T x) {
  return x;
}

// To nearest, ties to even; NaN stays NaN.
template <class To, class T>
struct Stored {
  static PF_DEV To from(T x) { return static_cast<To>(x); }
};
template <class T>
struct Stored<BFloat16, T> {
  static PF_DEV BFloat16 from(T x) {
    const uint32_t bits = static_cast<uint32_t>(bits_of(static_cast<float>(x)));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded)};
  }
};
template <class T>
struct Stored<Half, T> {
  static PF_DEV Half from(T x) {
#if PF_SIMT
    const _Float16 h = static_cast<_Float16>(static_cast<float>(x));
    Half y;
    std::memcpy(&y, &h, sizeof(y));
    return y;
#else
    Half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(static_cast<float>(x)));
    return y;
#endif
  }
};

// --- one element of whatever there is --------------------------------------------------------------------------------

template <class T>
PF_DEV T element(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32: return static_cast<T>(static_cast<const float*>(data)[at]);
    case DType::f64: return static_cast<T>(static_cast<const double*>(data)[at]);
    case DType::bf16: return static_cast<T>(number(static_cast<const BFloat16*>(data)[at]));
    case DType::f16: return static_cast<T>(number(static_cast<const Half*>(data)[at]));
    case DType::i64: return static_cast<T>(static_cast<const int64_t*>(data)[at]);
    case DType::i32: return static_cast<T>(static_cast<const int32_t*>(data)[at]);
    case DType::i16: return static_cast<T>(static_cast<const int16_t*>(data)[at]);
    case DType::i8: return static_cast<T>(static_cast<const int8_t*>(data)[at]);
    default: return static_cast<T>(static_cast<const uint8_t*>(data)[at]);
  }
}
template <class T>
PF_DEV T element(const Stream& s, int64_t i) {
  return element<T>(s.data, s.dtype, offset_of(s, i));
}
// Whether a flag, of any dtype, is set: not 0, and NaN is not 0.
PF_DEV bool flag(const void* data, DType dtype, int64_t at) {
  if (dtype >= DType::u8) return static_cast<const uint8_t*>(data)[at] != 0;
  return element<double>(data, dtype, at) != 0;
}

template <class T>
PF_DEV void put(const Stream& s, int64_t at, T x) {
  void* data = const_cast<void*>(s.data);
  switch (s.dtype) {
    case DType::f64: static_cast<double*>(data)[at] = static_cast<double>(x); return;
    case DType::bf16: static_cast<BFloat16*>(data)[at] = Stored<BFloat16, T>::from(x); return;
    case DType::f16: static_cast<Half*>(data)[at] = Stored<Half, T>::from(x); return;
    default: static_cast<float*>(data)[at] = static_cast<float>(x); return;
  }
}

// --- sixteen bytes at once -------------------------------------------------------------------------------------------

PF_DEV void load4(const float* p, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
PF_DEV void store4(float* p, const float (&x)[4]) { *reinterpret_cast<float4*>(p) = float4{x[0], x[1], x[2], x[3]}; }

// Contiguous, in the dtype that four elements at once are read in, and where such reads may start.
inline bool is_plain(const Stream& s, DType dtype, int64_t align) {
  return !s.data || (s.dtype == dtype && (s.ndim == 0 || (s.ndim == 1 && s.stride[0] == 1)) &&
                     reinterpret_cast<uintptr_t>(s.data) % static_cast<uintptr_t>(align) == 0);
}

// --- labels ----------------------------------------------------------------------------------------------------------

// Notes a label that is refused, the first to come, in memory of the CPU, which looks for where >= 0.
PF_DEV void refuse(Offence* to, int64_t where, int64_t value) {
  if (!to) return;
  auto* claim = reinterpret_cast<unsigned long long*>(&to->where);
  if (atomicCAS_system(claim, static_cast<unsigned long long>(-1), static_cast<unsigned long long>(-2)) !=
      static_cast<unsigned long long>(-1)) {
    return;
  }
  *static_cast<volatile int64_t*>(&to->value) = value;
  __threadfence_system();
  *static_cast<volatile int64_t*>(&to->where) = where;
}

}  // namespace PF_ISA
}  // namespace pf
