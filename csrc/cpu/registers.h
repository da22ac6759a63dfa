// The registers of an instruction set, and a·b + c rounded once, the one operation that not every set has. Where it is
// missing its bits are made: float goes by way of double, whose product of two floats is exact and whose sum is rounded
// to odd, so that rounding once more to float is right (Boldo and Melquiond 2008); double asks libm. Ten times slower,
// on processors of before 2013.
#pragma once

namespace pf {
namespace PF_ISA {

constexpr int kLanes = 16;

// The integer as wide as T.
template <class T>
using IntOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
struct Registers {
  using Int = IntOf<T>;
  static constexpr int kCount = kLanes * sizeof(T) / PF_VECTOR_BYTES;
  static constexpr int kPer = PF_VECTOR_BYTES / sizeof(T);
  typedef T Float __attribute__((vector_size(PF_VECTOR_BYTES)));
  typedef Int Bits __attribute__((vector_size(PF_VECTOR_BYTES)));
  typedef T LooseFloat __attribute__((vector_size(PF_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

// Unrolled and inlined; not so for the base level beside better ones, which only processors of before 2013 run: there
// it would triple the time that the package takes to build.
#if PF_X86 && PF_LEVEL == 0
#define PF_EACH(i) for (int i = 0; i < Registers<T>::kCount; ++i)
#define PF_INLINE inline
#define PF_INLINE_LAMBDA
constexpr bool kSmall = true;  // nor has it versions of its own for what is common
#else
#define PF_EACH(i) _Pragma("GCC unroll 8") for (int i = 0; i < Registers<T>::kCount; ++i)
#define PF_INLINE inline __attribute__((always_inline))
#define PF_INLINE_LAMBDA __attribute__((always_inline))
constexpr bool kSmall = false;
#endif

#if PF_LEVEL == 4
PF_INLINE __m512 fma_register(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
PF_INLINE __m512d fma_register(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif PF_LEVEL == 3
PF_INLINE __m256 fma_register(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
PF_INLINE __m256d fma_register(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#else
PF_INLINE Registers<double>::Float fma_register(Registers<double>::Float a, Registers<double>::Float b,
                                                Registers<double>::Float c) {
  for (int i = 0; i < Registers<double>::kPer; ++i) a[i] = __builtin_fma(a[i], b[i], c[i]);
  return a;
}
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
PF_INLINE Registers<float>::Float fma_register(Registers<float>::Float a, Registers<float>::Float b,
                                               Registers<float>::Float c) {
  for (int i = 0; i < Registers<float>::kPer; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return a;
}
#else
inline Registers<float>::Float fma_register(Registers<float>::Float a, Registers<float>::Float b,
                                            Registers<float>::Float c) {
  using R = Registers<double>;
  typedef float Half __attribute__((vector_size(R::kPer * sizeof(float))));
  struct Halves {
    Half h[2];
  };
  const auto x = __builtin_bit_cast(Halves, a), y = __builtin_bit_cast(Halves, b), z = __builtin_bit_cast(Halves, c);
  Halves result;
  for (int i = 0; i < 2; ++i) {
    const R::Float product = __builtin_convertvector(x.h[i], R::Float) * __builtin_convertvector(y.h[i], R::Float);
    const R::Float added = __builtin_convertvector(z.h[i], R::Float), sum = product + added;
    const R::Float other = sum - product, lost = (product - (sum - other)) + (added - other);
    const R::Bits bits = __builtin_bit_cast(R::Bits, sum), even = (bits & 1) - 1;
    const R::Bits inexact = (lost > 0) | (lost < 0), outward = (lost > 0) == (sum > 0);  // NaN: neither
    const R::Bits step = outward ? R::Bits{} + 1 : R::Bits{} - 1;
    result.h[i] = __builtin_convertvector(__builtin_bit_cast(R::Float, bits + (step & even & inexact)), Half);
  }
  return __builtin_bit_cast(Registers<float>::Float, result);
}
#endif
#endif

// The same on sixteen bytes, whatever the set, and m ? a : b there.
#if PF_LEVEL >= 3
PF_INLINE __m128 fma_narrow(__m128 a, __m128 b, __m128 c) { return _mm_fmadd_ps(a, b, c); }
PF_INLINE __m128d fma_narrow(__m128d a, __m128d b, __m128d c) { return _mm_fmadd_pd(a, b, c); }
template <class M>
PF_INLINE __m128 blend_narrow(const M& m, __m128 a, __m128 b) {
  return _mm_blendv_ps(b, a, __builtin_bit_cast(__m128, m));
}
template <class M>
PF_INLINE __m128d blend_narrow(const M& m, __m128d a, __m128d b) {
  return _mm_blendv_pd(b, a, __builtin_bit_cast(__m128d, m));
}
#else
template <class V>
PF_INLINE V fma_narrow(V a, V b, V c) {
  return fma_register(a, b, c);
}
template <class M, class V>
PF_INLINE V blend_narrow(const M& m, V a, V b) {
  return m ? a : b;
}
#endif

}  // namespace PF_ISA
}  // namespace pf
