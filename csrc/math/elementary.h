// exp, log and friends for any V that has the operations of csrc/cpu/vec.h, written once with + - * /, fused
// multiply-add and select, so that a value has the same bits in every lane, on every instruction set. Error bounds are
// those that tests/test_math.py measures.
#pragma once
#include "number.h"

namespace pf {
namespace PF_ISA {

// (e^r - 1 - r)/r² for |r| <= ½·ln 2.
template <class V>
PF_FN V exp_series(const V& r) {
  using T = scalar_t<V>;
  if constexpr (sizeof(T) == 4) {
    V p = fma_of(V(T(1.9875691500e-4)), r, V(T(1.3981999507e-3)));
    p = fma_of(p, r, V(T(8.3334519073e-3)));
    p = fma_of(p, r, V(T(4.1665795894e-2)));
    p = fma_of(p, r, V(T(1.6666665459e-1)));
    return fma_of(p, r, V(T(5.0000001201e-1)));
  } else {
    // clang-format off
    constexpr double kInverseFactorials[] = {
      1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0,
      1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5};
    // clang-format on
    V p = V(T(1.0 / 6227020800.0));
    for (double c : kInverseFactorials) p = fma_of(p, r, V(T(c)));
    return p;
  }
}

// x = n·ln 2 + r with n whole and |r| <= ½·ln 2; `shifted` holds n in its low bits (see pow2_of_shifted).
template <class V>
struct Reduced {
  V shifted, n, r;
};
template <class V>
PF_FN Reduced<V> reduce(const V& x) {
  using T = scalar_t<V>;
  constexpr bool kFloat = sizeof(T) == 4;
  const V magic(kFloat ? T(12582912.0) : T(6755399441055744.0));  // adding and subtracting it rounds to whole numbers
  const T high = kFloat ? T(0.693147182464599609375) : T(0.693147180559945286226764);
  const T low = kFloat ? T(-1.904654299957767e-09) : T(2.319046813846299558e-17);
  const V shifted = fma_of(x, V(T(1.44269504088896340736)), magic), n = shifted - magic;
  return {shifted, n, fma_of(n, V(-low), fma_of(n, V(-high), x))};
}

// Where e^x ends: the largest x whose e^x is taken as 0, so that results are normal numbers or 0.
template <class T>
PF_FN constexpr T exp_floor() {
  return sizeof(T) == 4 ? T(-86.5) : T(-707.5);
}

template <class V>
struct Exponential {
  V value, beyond_linear;  // e^x, and e^x - 1 - x without cancellation near 0
};

// 1 ulp (float), 1 ulp (double); `beyond_linear` 16 ulp.
template <class V>
PF_FN Exponential<V> exponential(const V& x) {
  using T = scalar_t<V>;
  constexpr bool kFloat = sizeof(T) == 4;
  const auto [shifted, n, r] = reduce(smaller_or_second(V(kFloat ? T(89) : T(710)), x));
  const V tail = exp_series(r) * (r * r), e = (tail + r) + V(T(1));
  // Twice e times half the power: 2^128 is no float.
  const V value = select(x <= V(exp_floor<T>()), V(T(0)), (e + e) * pow2_of_shifted<-1>(shifted));
  return {value, select(n == V(T(0)), tail, (value - V(T(1))) - x)};
}
template <class V>
PF_FN V exp_of(const V& x) {
  return exponential(x).value;
}

// Where e^x ends for a softmax: the least x whose e^x, relative to the largest term, is not taken as 0.
template <class T>
PF_FN constexpr T softmax_floor() {
  return sizeof(T) == 4 ? T(-87) : T(-708);
}

// e^x for softmax_floor <= x <= 0, and 0 at the floor itself, so that no subnormal slows a sum. 1 ulp. NaN stays NaN.
template <class V>
PF_FN V exp_floored(const V& x) {
  using T = scalar_t<V>;
  const auto [shifted, n, r] = reduce(x);
  const V one(T(1)), e = fma_of(fma_of(exp_series(r), r, one), r, one);
  return select(x == V(softmax_floor<T>()), V(T(0)), e * pow2_of_shifted<0>(shifted));
}

// log x: x = m·2^e with m in [sqrt ½, sqrt 2), log m = 2·atanh((m-1)/(m+1)). 0 gives -inf, negative NaN, inf inf.
template <class V>
PF_FN V log_of(const V& x) {
  using T = scalar_t<V>;
  constexpr bool kFloat = sizeof(T) == 4;
  const T inf = std::numeric_limits<T>::infinity(), tiny = std::numeric_limits<T>::min();
  const auto subnormal = x < V(tiny);
  const V scaled = select(subnormal, x * V(kFloat ? T(8388608.0) : T(4503599627370496.0)), x);
  V m, e;
  split_exponent(scaled, m, e);
  e = select(subnormal, e - V(T(kFloat ? 23 : 52)), e);
  const auto upper = m > V(T(1.41421356237309504880));
  m = select(upper, m * V(T(0.5)), m);
  e = select(upper, e + V(T(1)), e);
  const V s = (m - V(T(1))) / (m + V(T(1)));
  const V s2 = s * s;
  constexpr int kTerms = kFloat ? 5 : 11;
  V p = V(T(1) / T(2 * kTerms + 1));
  for (int k = kTerms - 1; k >= 1; --k) p = fma_of(p, s2, V(T(1) / T(2 * k + 1)));
  const V log_m = V(T(2)) * fma_of(s * s2, p, s);
  const T high = kFloat ? T(0.693359375) : T(6.93147180369123816490e-01);
  const T low = kFloat ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  V y = e * V(high) + (log_m + e * V(low));
  y = select(x == V(T(0)), V(-inf), select(x == V(inf), V(inf), y));
  return select((x < V(T(0))) | (x != x), V(std::numeric_limits<T>::quiet_NaN()), y);
}

// log(1 + x) for x in [0, 1]: log(u)·x/(u - 1) with u = 1 + x rounded takes the rounding back out.
template <class V>
PF_FN V log1p_of(const V& x) {
  using T = scalar_t<V>;
  const V u = V(T(1)) + x;
  const V gap = u - V(T(1));
  const auto lost = gap == V(T(0));
  return select(lost, x, log_of(u) * (x / select(lost, V(T(1)), gap)));
}

// log(1 + e^x), never overflowing.
template <class V>
PF_FN V softplus(const V& x) {
  using T = scalar_t<V>;
  return max_of(x, V(T(0))) + log1p_of(exp_of(-abs_of(x)));
}

}  // namespace PF_ISA
}  // namespace pf
