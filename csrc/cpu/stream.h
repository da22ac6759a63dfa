// Streams to and from tiles: kernels compute on contiguous T in L1; dtype, strides and gathers end here. A tile that
// already lies as T, contiguous and whole, is not copied.
#pragma once

namespace pf {
namespace PF_ISA {

PF_INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  return __builtin_bit_cast(float, bits);
}
PF_INLINE uint16_t to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  PF_INLINE explicit BFloat16(float x) : bits(to_bf16(x)) {}
  PF_INLINE explicit BFloat16(double x) : bits(to_bf16(static_cast<float>(x))) {}
  PF_INLINE operator float() const { return from_bf16(bits); }
};

// Calls f with a null pointer of the C++ type that `dtype` stores.
template <class F>
PF_INLINE void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<const float*>(nullptr));
    case DType::f64: return f(static_cast<const double*>(nullptr));
    case DType::bf16: return f(static_cast<const BFloat16*>(nullptr));
    case DType::f16: return f(static_cast<const _Float16*>(nullptr));
    case DType::i64: return f(static_cast<const int64_t*>(nullptr));
    case DType::i32: return f(static_cast<const int32_t*>(nullptr));
    case DType::i16: return f(static_cast<const int16_t*>(nullptr));
    case DType::i8: return f(static_cast<const int8_t*>(nullptr));
    case DType::u8:
    case DType::boolean: return f(static_cast<const uint8_t*>(nullptr));
  }
}

// The same for what gradients are stored as; the pointer is to non-const.
template <class F>
PF_INLINE void with_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64: return f(static_cast<double*>(nullptr));
    case DType::bf16: return f(static_cast<BFloat16*>(nullptr));
    case DType::f16: return f(static_cast<_Float16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16:
    case DType::i16: return 2;
    default: return 1;
  }
}

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::f32 : DType::f64;
}

// Offset, in elements, of flat element i.
inline int64_t offset_of(const Stream& s, int64_t i) {
  int64_t offset = 0;
  for (int d = s.ndim - 1; d > 0; --d) {
    offset += (i % s.shape[d]) * s.stride[d];
    i /= s.shape[d];
  }
  return s.ndim > 0 ? offset + i * s.stride[0] : 0;
}

template <class From, class To>
inline void copy_strided(const From* __restrict from, int64_t stride, int64_t n, To* __restrict to) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i * stride]);
  }
}

// Elements [first, first + n) of the stream, converted.
template <class To>
inline void read(const Stream& s, int64_t first, int64_t n, To* to) {
  const int64_t inner = s.ndim > 0 ? s.shape[s.ndim - 1] : 1, stride = s.ndim > 0 ? s.stride[s.ndim - 1] : 0;
  with_type(s.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(s.data);
    if (s.ndim <= 1) return copy_strided(data + first * stride, stride, n, to);
    while (n > 0) {  // run by run along the innermost dimension
      const int64_t run = std::min(n, inner - first % inner);
      copy_strided(data + offset_of(s, first), stride, run, to);
      first += run, to += run, n -= run;
    }
  });
}

// The elements that `index` (n flat positions) names.
template <class To>
inline void gather(const Stream& s, const int64_t* index, int64_t n, To* to) {
  with_type(s.dtype, [&](auto* type) {
    auto* data = static_cast<decltype(type)>(s.data);
    if (s.ndim <= 1) {
      const int64_t stride = s.ndim == 1 ? s.stride[0] : 0;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(data[index[i] * stride]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(data[offset_of(s, index[i])]);
    }
  });
}

inline bool is_plain(const Stream& s, DType dtype) {
  return s.dtype == dtype && s.ndim <= 1 && (s.ndim == 0 || s.stride[0] == 1);
}

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A tile as T, readable up to a whole number of vectors; `scratch` holds it if it must be copied. nullptr: absent.
template <class T>
inline const T* read_tile(const Stream& s, int64_t first, int64_t n, const int64_t* index, T* scratch) {
  if (!s.data) return nullptr;
  if (!index && n % kLanes == 0 && is_plain(s, dtype_of<T>())) return static_cast<const T*>(s.data) + first;
  if (index) {
    gather(s, index, n, scratch);
  } else {
    read(s, first, n, scratch);
  }
  for (int64_t i = n; i < padded(n); ++i) scratch[i] = T(0);
  return scratch;
}

// Asks for as many bytes a page further on, into L2: the processor's own prefetcher stops at pages.
template <int kToWrite>
PF_INLINE void ask_ahead(const void* from, int64_t bytes) {
  const char* next = static_cast<const char*>(from) + 4096;
  _Pragma("GCC unroll 4") for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(next + b, kToWrite, 2);
}

// Contiguous output from T: where the kernel may write directly, and the conversion where it may not.
template <class T>
inline T* tile_to_write(const Stream& s, int64_t first, int64_t n, T* scratch) {
  return s.dtype == dtype_of<T>() && n % kLanes == 0 ? const_cast<T*>(static_cast<const T*>(s.data)) + first : scratch;
}
template <class T>
inline void write(const Stream& s, int64_t first, int64_t n, const T* from) {
  void* data = const_cast<void*>(s.data);
  switch (s.dtype) {
    case DType::f32: return copy_strided(from, 1, n, static_cast<float*>(data) + first);
    case DType::f64: return copy_strided(from, 1, n, static_cast<double*>(data) + first);
    case DType::f16: return copy_strided(from, 1, n, static_cast<_Float16*>(data) + first);
    case DType::bf16: {
      auto* to = static_cast<uint16_t*>(data) + first;
      for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(static_cast<float>(from[i]));
      return;
    }
    default: return;
  }
}
template <class T>
inline void finish_tile(const Stream& s, int64_t first, int64_t n, const T* tile, const T* scratch) {
  if (tile == scratch) write(s, first, n, tile);
}

}  // namespace PF_ISA
}  // namespace pf
