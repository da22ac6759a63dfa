// What the formulas of csrc/math need of a number, for plain float and double; csrc/cpu/vec.h gives the same for SIMD
// vectors. A formula is a template over V and never asks which it has.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define PF_FN __host__ __device__ __forceinline__
#elif defined(PF_INLINE)
#define PF_FN PF_INLINE
#else
#define PF_FN inline __attribute__((always_inline))
#endif

namespace pf {
namespace PF_ISA {

template <class V>
struct ScalarOf {
  using type = typename V::Scalar;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};
template <class V>
using scalar_t = typename ScalarOf<V>::type;

#define PF_SCALAR(T)                                             \
  PF_FN T select(bool m, T a, T b) { return m ? a : b; }         \
  PF_FN T max_of(T a, T b) { return (a > b || a != a) ? a : b; } \
  PF_FN T min_of(T a, T b) { return (a < b || a != a) ? a : b; } \
  PF_FN T larger_or_second(T a, T b) { return a > b ? a : b; }   \
  PF_FN T smaller_or_second(T a, T b) { return a < b ? a : b; }  \
  PF_FN T abs_of(T a) { return a < 0 ? -a : (a == 0 ? T(0) : a); }
PF_SCALAR(float)
PF_SCALAR(double)
#undef PF_SCALAR

PF_FN float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
PF_FN double fma_of(double a, double b, double c) { return fma(a, b, c); }
PF_FN float sqrt_of(float a) { return sqrtf(a); }
PF_FN double sqrt_of(double a) { return sqrt(a); }

// The bits of a number and back. nvcc's host compilers and its device code both take this for a move.
PF_FN int32_t bits_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
PF_FN int64_t bits_of(double x) {
  int64_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}
PF_FN float of_bits(int32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
PF_FN double of_bits(int64_t bits) {
  double x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// 2^(k + kPlus) with k in the low bits of `shifted` = k + 1.5·2^mantissa, and x = m·2^e with m in [1, 2): see vec.h.
template <int kPlus, class T>
PF_FN T pow2_of_shifted(T shifted) {
  using Int = decltype(bits_of(shifted));
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = (sizeof(T) == 4 ? 127 : 1023) + kPlus;
  return of_bits(static_cast<Int>((static_cast<uint64_t>(bits_of(shifted)) << kMantissa) +
                                  (static_cast<uint64_t>(kBias) << kMantissa)));
}
template <class T>
PF_FN void split_exponent(T x, T& mantissa, T& exponent) {
  using Int = decltype(bits_of(x));
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  const Int bits = bits_of(x);
  exponent = static_cast<T>((bits >> kMantissa) - Int(kBias));
  mantissa = of_bits(static_cast<Int>((bits & ((Int(1) << kMantissa) - 1)) | (Int(kBias) << kMantissa)));
}

}  // namespace PF_ISA
}  // namespace pf
