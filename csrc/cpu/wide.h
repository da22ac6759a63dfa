// Several vectors that go through a formula in step. A polynomial is one long chain of dependent operations, and the
// scheduler of a processor is too short to find the next vector's chain behind it: side by side they run twice as fast.
#pragma once

namespace pf {
namespace PF_ISA {

// As many vectors as four registers hold.
template <class T>
constexpr int kInStep = Registers<T>::kCount >= 4 ? 1 : 4 / Registers<T>::kCount;

// The loop over a Wide<T, N>'s vectors, where N is known.
#define PF_IN_STEP(k) _Pragma("GCC unroll 8") for (int k = 0; k < N; ++k)

template <class T, int N>
struct WideMask {
  Mask<T> m[N];
};

template <class T, int N>
struct Wide {
  using Scalar = T;
  Vec<T> v[N];

  Wide() = default;
  PF_INLINE Wide(T x) { PF_IN_STEP(k) v[k] = Vec<T>(x); }
  PF_INLINE Wide(const Vec<T>& x) { PF_IN_STEP(k) v[k] = x; }
  static PF_INLINE Wide load(const T* p) {
    Wide w;
    PF_IN_STEP(k) w.v[k] = Vec<T>::load(p + k * kLanes);
    return w;
  }
  PF_INLINE void store(T* p) const { PF_IN_STEP(k) v[k].store(p + k * kLanes); }
};

#define PF_WIDE(Result, name, A, B, expression)                     \
  template <class T, int N>                                         \
  PF_INLINE Result<T, N> name(const A<T, N>& a, const B<T, N>& b) { \
    Result<T, N> r;                                                 \
    PF_IN_STEP(k) expression;                                       \
    return r;                                                       \
  }
PF_WIDE(Wide, operator+, Wide, Wide, r.v[k] = a.v[k] + b.v[k])
PF_WIDE(Wide, operator-, Wide, Wide, r.v[k] = a.v[k] - b.v[k])
PF_WIDE(Wide, operator*, Wide, Wide, r.v[k] = a.v[k] * b.v[k])
PF_WIDE(Wide, larger_or_second, Wide, Wide, r.v[k] = larger_or_second(a.v[k], b.v[k]))
PF_WIDE(Wide, smaller_or_second, Wide, Wide, r.v[k] = smaller_or_second(a.v[k], b.v[k]))
PF_WIDE(Wide, max_of, Wide, Wide, r.v[k] = max_of(a.v[k], b.v[k]))
PF_WIDE(Wide, min_of, Wide, Wide, r.v[k] = min_of(a.v[k], b.v[k]))
PF_WIDE(WideMask, operator==, Wide, Wide, r.m[k] = a.v[k] == b.v[k])
PF_WIDE(WideMask, operator!=, Wide, Wide, r.m[k] = a.v[k] != b.v[k])
PF_WIDE(WideMask, operator<, Wide, Wide, r.m[k] = a.v[k] < b.v[k])
PF_WIDE(WideMask, operator>, Wide, Wide, r.m[k] = a.v[k] > b.v[k])
PF_WIDE(WideMask, operator<=, Wide, Wide, r.m[k] = a.v[k] <= b.v[k])
PF_WIDE(WideMask, operator>=, Wide, Wide, r.m[k] = a.v[k] >= b.v[k])
PF_WIDE(WideMask, operator&, WideMask, WideMask, r.m[k] = a.m[k] & b.m[k])
PF_WIDE(WideMask, operator|, WideMask, WideMask, r.m[k] = a.m[k] | b.m[k])
#undef PF_WIDE

template <class T, int N>
PF_INLINE WideMask<T, N> operator!(const WideMask<T, N>& a) {
  WideMask<T, N> r;
  PF_IN_STEP(k) r.m[k] = !a.m[k];
  return r;
}
template <class T, int N>
PF_INLINE Wide<T, N> operator-(const Wide<T, N>& a) {
  Wide<T, N> r;
  PF_IN_STEP(k) r.v[k] = -a.v[k];
  return r;
}
template <class T, int N>
PF_INLINE Wide<T, N> abs_of(const Wide<T, N>& a) {
  Wide<T, N> r;
  PF_IN_STEP(k) r.v[k] = abs_of(a.v[k]);
  return r;
}
template <class T, int N>
PF_INLINE Wide<T, N> select(const WideMask<T, N>& m, const Wide<T, N>& a, const Wide<T, N>& b) {
  Wide<T, N> r;
  PF_IN_STEP(k) r.v[k] = select(m.m[k], a.v[k], b.v[k]);
  return r;
}
template <class T, int N>
PF_INLINE Wide<T, N> fma_of(const Wide<T, N>& a, const Wide<T, N>& b, const Wide<T, N>& c) {
  Wide<T, N> r;
  PF_IN_STEP(k) r.v[k] = fma_of(a.v[k], b.v[k], c.v[k]);
  return r;
}
template <int kPlus, class T, int N>
PF_INLINE Wide<T, N> pow2_of_shifted(const Wide<T, N>& a) {
  Wide<T, N> r;
  PF_IN_STEP(k) r.v[k] = pow2_of_shifted<kPlus>(a.v[k]);
  return r;
}

// One vector after the other, so that a sum does not depend on how many go in step.
template <class T, int N>
PF_INLINE void add_each(Vec<T>& sum, const Wide<T, N>& x) {
  PF_IN_STEP(k) sum = sum + x.v[k];
}
template <class T, int N>
PF_INLINE void count_each(Vec<T>& sum, const WideMask<T, N>& m) {
  const Vec<T> one(T(1));
  PF_IN_STEP(k) sum = select(m.m[k], sum + one, sum);
}

// f(steps, i) for the vectors of a tile of n, as many in step as there are, at most kMost: Wide<T, steps()> at i.
template <class T, int kMost, class F>
PF_INLINE void in_step(int64_t n, F&& f) {
  constexpr int kStep = std::min(kInStep<T>, kMost);
  int64_t i = 0;
  for (; i + kStep * kLanes <= n; i += kStep * kLanes) f(std::integral_constant<int, kStep>{}, i);
  if constexpr (kStep > 2) {
    if (i + 2 * kLanes <= n) f(std::integral_constant<int, 2>{}, i), i += 2 * kLanes;
  }
  if constexpr (kStep > 1) {
    for (; i < n; i += kLanes) f(std::integral_constant<int, 1>{}, i);
  } else if (i < n) {
    f(std::integral_constant<int, 1>{}, i);
  }
}

}  // namespace PF_ISA
}  // namespace pf
