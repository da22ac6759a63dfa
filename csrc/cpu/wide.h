// Several vectors that go through a formula in step. A polynomial is one long chain of dependent operations, and the
// scheduler of a processor is too short to find the next vector's chain behind it: side by side they run twice as fast.
#pragma once

namespace pf {
namespace PF_ISA {

// As many vectors as four registers hold.
template <class T>
constexpr int kInStep = Registers<T>::kCount >= 4 ? 1 : 4 / Registers<T>::kCount;

template <class T, int N>
struct WideMask {
  Mask<T> m[N];
};

template <class T, int N>
struct Wide {
  using Scalar = T;
  Vec<T> v[N];

  Wide() = default;
  PF_INLINE Wide(T x) { _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k) v[k] = Vec<T>(x); }
  PF_INLINE Wide(const Vec<T>& x) { _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k) v[k] = x; }
  static PF_INLINE Wide load(const T* p) {
    Wide w;
    _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k) w.v[k] = Vec<T>::load(p + k * kLanes);
    return w;
  }
  PF_INLINE void store(T* p) const { _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k) v[k].store(p + k * kLanes); }
};

#define PF_WIDE(Result, name, expression)                                 \
  template <class T, int N>                                               \
  PF_INLINE Result<T, N> name(const Wide<T, N>& a, const Wide<T, N>& b) { \
    Result<T, N> r;                                                       \
    _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k) expression;       \
    return r;                                                             \
  }
PF_WIDE(Wide, operator+, r.v[k] = a.v[k] + b.v[k])
PF_WIDE(Wide, operator-, r.v[k] = a.v[k] - b.v[k])
PF_WIDE(Wide, operator*, r.v[k] = a.v[k] * b.v[k])
PF_WIDE(Wide, larger_or_second, r.v[k] = larger_or_second(a.v[k], b.v[k]))
PF_WIDE(WideMask, operator==, r.m[k] = a.v[k] == b.v[k])
#undef PF_WIDE

template <class T, int N>
PF_INLINE Wide<T, N> operator-(Wide<T, N> a) {
  _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k) a.v[k] = -a.v[k];
  return a;
}
template <class T, int N>
PF_INLINE Wide<T, N> select(const WideMask<T, N>& m, Wide<T, N> a, const Wide<T, N>& b) {
  _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k) a.v[k] = select(m.m[k], a.v[k], b.v[k]);
  return a;
}
template <class T, int N>
PF_INLINE Wide<T, N> pow2_of_shifted(Wide<T, N> a) {
  _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k) a.v[k] = pow2_of_shifted(a.v[k]);
  return a;
}

}  // namespace PF_ISA
}  // namespace pf
