// Contiguous conversions between storage types and the compute type, sixteen elements at a time.
#pragma once

namespace pf {
namespace PF_ISA {

// Loads sixteen elements. Types without a vector path go through the scalar conversion.
template <class T, class From>
PF_INLINE Vec<T> load16(const From* from) {
  if constexpr (std::is_same_v<T, From>) {
    return Vec<T>::load(from);
  } else {
    alignas(64) T x[kLanes];
    for (int i = 0; i < kLanes; ++i) x[i] = static_cast<T>(from[i]);
    return Vec<T>::load(x);
  }
}
template <>
PF_INLINE Vec<float> load16<float, BFloat16>(const BFloat16* from) {
  using R = Registers<float>;
  typedef uint16_t Half __attribute__((vector_size(R::kPer * 2), aligned(2), may_alias));
  typedef uint32_t Word __attribute__((vector_size(PF_VECTOR_BYTES)));
  Vec<float> v;
  _Pragma("GCC unroll 8") for (int i = 0; i < R::kCount; ++i) {
    const Half h = *reinterpret_cast<const Half*>(from + i * R::kPer);
    v.r[i] = __builtin_bit_cast(R::Float, __builtin_convertvector(h, Word) << 16);
  }
  return v;
}

// Stores sixteen elements, rounded to nearest, ties to even.
template <class T, class To>
PF_INLINE void store16(const Vec<T>& v, To* to) {
  alignas(64) T x[kLanes];
  v.store(x);
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<To>(x[i]);
}
template <>
PF_INLINE void store16<float, float>(const Vec<float>& v, float* to) {
  v.store(to);
}
template <>
PF_INLINE void store16<double, double>(const Vec<double>& v, double* to) {
  v.store(to);
}
template <>
PF_INLINE void store16<float, BFloat16>(const Vec<float>& v, BFloat16* to) {
  using R = Registers<float>;
  typedef uint16_t Half __attribute__((vector_size(R::kPer * 2)));
  typedef uint16_t LooseHalf __attribute__((vector_size(R::kPer * 2), aligned(2), may_alias));
  typedef uint32_t Word __attribute__((vector_size(PF_VECTOR_BYTES)));
  _Pragma("GCC unroll 8") for (int i = 0; i < R::kCount; ++i) {
    const Word bits = __builtin_bit_cast(Word, v.r[i]);
    const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Word nan = (bits >> 16) | 0x40u;
    const Word chosen = (v.r[i] != v.r[i]) ? nan : rounded;
    *reinterpret_cast<LooseHalf*>(to + i * R::kPer) = __builtin_convertvector(chosen, Half);
  }
}

#if PF_LEVEL >= 3  // F16C
template <>
PF_INLINE Vec<float> load16<float, _Float16>(const _Float16* from) {
  Vec<float> v;
#if PF_LEVEL == 4
  v.r[0] = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  v.r[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  v.r[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)));
#endif
  return v;
}
template <>
PF_INLINE void store16<float, _Float16>(const Vec<float>& v, _Float16* to) {
#if PF_LEVEL == 4
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, v.r[0], _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v.r[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(v.r[1], _MM_FROUND_TO_NEAREST_INT));
#endif
}
#endif

// n elements; what is past the last whole vector goes one by one.
template <class T, class From>
inline void convert_in(const From* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) load16<T>(from + i).store(to + i);
  for (; i < n; ++i) to[i] = static_cast<T>(from[i]);
}
template <class T, class To>
inline void convert_out(const T* from, int64_t n, To* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store16(Vec<T>::load(from + i), to + i);
  for (; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

#if PF_X86
#if PF_LEVEL == 4
PF_INLINE void stream_register(float* to, __m512 x) { _mm512_stream_ps(to, x); }
PF_INLINE void stream_register(double* to, __m512d x) { _mm512_stream_pd(to, x); }
#elif PF_LEVEL == 3
PF_INLINE void stream_register(float* to, __m256 x) { _mm256_stream_ps(to, x); }
PF_INLINE void stream_register(double* to, __m256d x) { _mm256_stream_pd(to, x); }
#else
PF_INLINE void stream_register(float* to, __m128 x) { _mm_stream_ps(to, x); }
PF_INLINE void stream_register(double* to, __m128d x) { _mm_stream_pd(to, x); }
#endif
// One vector past the cache; `to` lies on a line's border.
template <class T>
PF_INLINE void store_past_cache(T* to, const Vec<T>& x) {
  PF_EACH(i) stream_register(to + i * Registers<T>::kPer, x.r[i]);
}

// Past the cache, for results too large to stay in it: no line is read before it is written. sfence() when done.
inline void store_past_cache(void* to, const void* from, int64_t bytes) {
  auto* out = static_cast<char*>(to);
  auto* in = static_cast<const char*>(from);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(out) & 63);
  std::memcpy(out, in, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    _Pragma("GCC unroll 4") for (int k = 0; k < 64; k += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + i + k),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i + k)));
    }
  }
  std::memcpy(out + i, in + i, bytes - i);
}
inline void finish_past_cache() { _mm_sfence(); }
#else
template <class T>
PF_INLINE void store_past_cache(T* to, const Vec<T>& x) {
  x.store(to);
}
inline void store_past_cache(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }
inline void finish_past_cache() {}
#endif

}  // namespace PF_ISA
}  // namespace pf
