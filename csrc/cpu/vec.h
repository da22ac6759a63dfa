// Sixteen lanes of float or double on whatever registers the instruction set has: Vec<T> is 1 to 8 of them, so that
// every set does the same operations on the same lanes in the same order, and with -ffp-contract=off (fused only where
// the text says fma_of) gives the same bits. Include only from inside an op's translation unit (see unit.cpp): the
// whole file lives in the ISA's namespace.
#pragma once

namespace pf {
namespace PF_ISA {

template <class T>
struct Mask {  // all ones or all zeros per lane
  typename Registers<T>::Bits r[Registers<T>::kCount];
};

template <class T>
struct Vec {
  using Scalar = T;
  typename Registers<T>::Float r[Registers<T>::kCount];

  Vec() = default;
  PF_INLINE Vec(T x) {
    PF_EACH(i) r[i] = x - typename Registers<T>::Float{};
  }
  static PF_INLINE Vec load(const T* p) {
    Vec v;
    PF_EACH(i) v.r[i] = *reinterpret_cast<const typename Registers<T>::LooseFloat*>(p + i * Registers<T>::kPer);
    return v;
  }
  PF_INLINE void store(T* p) const {
    PF_EACH(i) *reinterpret_cast<typename Registers<T>::LooseFloat*>(p + i * Registers<T>::kPer) = r[i];
  }
};

#define PF_BINARY(op)                                       \
  template <class T>                                        \
  PF_INLINE Vec<T> operator op(Vec<T> a, const Vec<T>& b) { \
    PF_EACH(i) a.r[i] = a.r[i] op b.r[i];                   \
    return a;                                               \
  }                                                         \
  template <class T>                                        \
  PF_INLINE Vec<T> operator op(Vec<T> a, T b) {             \
    return a op Vec<T>(b);                                  \
  }                                                         \
  template <class T>                                        \
  PF_INLINE Vec<T> operator op(T a, const Vec<T>& b) {      \
    return Vec<T>(a) op b;                                  \
  }
PF_BINARY(+)
PF_BINARY(-)
PF_BINARY(*)
PF_BINARY(/)
#undef PF_BINARY

#define PF_COMPARE(op)                                              \
  template <class T>                                                \
  PF_INLINE Mask<T> operator op(const Vec<T>& a, const Vec<T>& b) { \
    Mask<T> m;                                                      \
    PF_EACH(i) m.r[i] = a.r[i] op b.r[i];                           \
    return m;                                                       \
  }                                                                 \
  template <class T>                                                \
  PF_INLINE Mask<T> operator op(const Vec<T>& a, T b) {             \
    return a op Vec<T>(b);                                          \
  }
PF_COMPARE(<)
PF_COMPARE(>)
PF_COMPARE(<=)
PF_COMPARE(>=)
PF_COMPARE(==)
PF_COMPARE(!=)
#undef PF_COMPARE

#define PF_LOGIC(op)                                           \
  template <class T>                                           \
  PF_INLINE Mask<T> operator op(Mask<T> a, const Mask<T>& b) { \
    PF_EACH(i) a.r[i] = a.r[i] op b.r[i];                      \
    return a;                                                  \
  }
PF_LOGIC(&)
PF_LOGIC(|)
#undef PF_LOGIC

template <class T>
PF_INLINE Mask<T> operator!(Mask<T> a) {
  PF_EACH(i) a.r[i] = ~a.r[i];
  return a;
}

template <class T>
PF_INLINE Vec<T> operator-(Vec<T> a) {
  PF_EACH(i) a.r[i] = -a.r[i];
  return a;
}

template <class T>
PF_INLINE Vec<T> select(const Mask<T>& m, Vec<T> a, const Vec<T>& b) {
  PF_EACH(i) a.r[i] = m.r[i] ? a.r[i] : b.r[i];
  return a;
}

template <class T>
PF_INLINE Mask<T> splat_mask(bool on) {
  Mask<T> m;
  PF_EACH(i) m.r[i] = typename Registers<T>::Bits{} - static_cast<typename Registers<T>::Int>(on);
  return m;
}

// NaN in either operand comes through, as in torch.maximum and torch.minimum.
template <class T>
PF_INLINE Vec<T> max_of(const Vec<T>& a, const Vec<T>& b) {
  return select((a > b) | (a != a), a, b);
}
template <class T>
PF_INLINE Vec<T> min_of(const Vec<T>& a, const Vec<T>& b) {
  return select((a < b) | (a != a), a, b);
}

// One instruction: a > b ? a : b, so b where either is NaN.
template <class T>
PF_INLINE Vec<T> larger_or_second(Vec<T> a, const Vec<T>& b) {
  PF_EACH(i) a.r[i] = a.r[i] > b.r[i] ? a.r[i] : b.r[i];
  return a;
}

template <class T>
PF_INLINE Vec<T> smaller_or_second(Vec<T> a, const Vec<T>& b) {
  PF_EACH(i) a.r[i] = a.r[i] < b.r[i] ? a.r[i] : b.r[i];
  return a;
}

// a·b + c rounded once. Processors without the instruction are given its bits: float by way of double (registers.h).
template <class T>
PF_INLINE Vec<T> fma_of(Vec<T> a, const Vec<T>& b, const Vec<T>& c) {
  PF_EACH(i) a.r[i] = fma_register(a.r[i], b.r[i], c.r[i]);
  return a;
}

template <class T>
PF_INLINE Vec<T> abs_of(Vec<T> a) {
  PF_EACH(i) {
    using B = typename Registers<T>::Bits;
    B bits = __builtin_bit_cast(B, a.r[i]) & std::numeric_limits<typename Registers<T>::Int>::max();
    a.r[i] = __builtin_bit_cast(typename Registers<T>::Float, bits);
  }
  return a;
}

template <class T>
PF_INLINE bool any(const Mask<T>& m) {
  typename Registers<T>::Bits all = m.r[0];
  _Pragma("GCC unroll 8") for (int i = 1; i < Registers<T>::kCount; ++i) all |= m.r[i];
  IntOf<T> bits = 0;
  _Pragma("GCC unroll 16") for (int i = 0; i < Registers<T>::kPer; ++i) bits |= all[i];
  return bits != 0;
}

// Lanes of a tile that hold something: those below n, or those whose mask (padded with zeros) is not 0.
template <class T>
PF_INLINE Mask<T> tile_valid(const T* mask, int64_t i, int64_t n) {
  if (mask) return Vec<T>::load(mask + i) != Vec<T>(T(0));
  if (i + kLanes <= n) return splat_mask<T>(true);
  static constexpr T kIota[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return Vec<T>::load(kIota) < Vec<T>(static_cast<T>(n - i));
}

// The bit-level pieces that exp and log stand on: 2^k for an integer-valued k, and x = m·2^e.

// 2^(k + kPlus) with k in the low bits of `shifted` = k + 1.5·2^mantissa; k + kPlus in [-126, 127], [-1022, 1023].
template <int kPlus, class T>
PF_INLINE Vec<T> pow2_of_shifted(Vec<T> shifted) {
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = (sizeof(T) == 4 ? 127 : 1023) + kPlus;
  using Int = typename Registers<T>::Int;
  PF_EACH(i) {
    using B = typename Registers<T>::Bits;
    const B bits = (__builtin_bit_cast(B, shifted.r[i]) << kMantissa) + (Int(kBias) << kMantissa);
    shifted.r[i] = __builtin_bit_cast(typename Registers<T>::Float, bits);
  }
  return shifted;
}

// x positive and normal: mantissa in [1, 2) and exponent as a float.
template <class T>
PF_INLINE void split_exponent(const Vec<T>& x, Vec<T>& mantissa, Vec<T>& exponent) {
  constexpr int kMantissa = sizeof(T) == 4 ? 23 : 52, kBias = sizeof(T) == 4 ? 127 : 1023;
  using Int = typename Registers<T>::Int;
  PF_EACH(i) {
    using B = typename Registers<T>::Bits;
    auto v = x.r[i];
    B bits = __builtin_bit_cast(B, v);
    B e = (bits >> kMantissa) - Int(kBias);
    B m = (bits & ((Int(1) << kMantissa) - 1)) | (Int(kBias) << kMantissa);
    mantissa.r[i] = __builtin_bit_cast(typename Registers<T>::Float, m);
    exponent.r[i] = __builtin_convertvector(e, typename Registers<T>::Float);
  }
}

// Sums over many tiles: sixteen lanes in double, folded once at the very end.
struct LaneSum {
  double lane[kLanes] = {};

  template <class T>
  PF_INLINE void add(const Vec<T>& x) {
    constexpr int kPer = PF_VECTOR_BYTES / sizeof(double);
    typedef T Narrow __attribute__((vector_size(kPer * sizeof(T)), aligned(sizeof(T)), may_alias));
    typedef double Wide __attribute__((vector_size(PF_VECTOR_BYTES), aligned(8), may_alias));
    T from[kLanes];
    x.store(from);
    _Pragma("GCC unroll 8") for (int i = 0; i < kLanes; i += kPer) {
      const Narrow narrow = *reinterpret_cast<const Narrow*>(from + i);
      *reinterpret_cast<Wide*>(lane + i) += __builtin_convertvector(narrow, Wide);
    }
  }
  void add_scalar(double x) { lane[0] += x; }
  void merge(const LaneSum& other) {
    for (int i = 0; i < kLanes; ++i) lane[i] += other.lane[i];
  }
  double total() const {
    double sum = 0;
    for (double x : lane) sum += x;
    return sum;
  }
};

// Lane by lane in one fixed tree, so the sum does not depend on the register width.
template <class T, class F>
PF_INLINE T fold(const Vec<T>& a, F&& combine) {
  T lane[kLanes];
  a.store(lane);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = combine(lane[i], lane[i + width]);
  return lane[0];
}
template <class T>
PF_INLINE T sum_of_lanes(const Vec<T>& a) {
  return fold(a, [](T x, T y) { return x + y; });
}

}  // namespace PF_ISA
}  // namespace pf
