// exp, log and friends for scalars and for vectors, written once with + - * / and select, so that a value has the same
// bits in every lane, on every instruction set. Error bounds are those that tests/test_math.py measures.
#pragma once
#include "number.h"

namespace pf {
namespace PF_ISA {

// e^r for |r| <= ½·ln 2.
template <class V>
PF_FN V exp_reduced(const V& r) {
  using T = scalar_t<V>;
  constexpr bool kFloat = sizeof(T) == 4;
  V p;
  if constexpr (kFloat) {
    p = V(T(1.9875691500e-4)) * r + V(T(1.3981999507e-3));
    p = p * r + V(T(8.3334519073e-3));
    p = p * r + V(T(4.1665795894e-2));
    p = p * r + V(T(1.6666665459e-1));
    p = p * r + V(T(5.0000001201e-1));
  } else {
    p = V(T(1.0 / 6227020800.0));
    p = p * r + V(T(1.0 / 479001600.0));
    p = p * r + V(T(1.0 / 39916800.0));
    p = p * r + V(T(1.0 / 3628800.0));
    p = p * r + V(T(1.0 / 362880.0));
    p = p * r + V(T(1.0 / 40320.0));
    p = p * r + V(T(1.0 / 5040.0));
    p = p * r + V(T(1.0 / 720.0));
    p = p * r + V(T(1.0 / 120.0));
    p = p * r + V(T(1.0 / 24.0));
    p = p * r + V(T(1.0 / 6.0));
    p = p * r + V(T(0.5));
  }
  return (p * (r * r) + r) + V(T(1));
}

// e^x: n = round(x/ln 2), r = x - n·ln 2 in two parts, a polynomial in r, and 2^n in two halves so that the result
// over- and underflows as it should. 1 ulp (float), 1 ulp (double).
template <class V>
PF_FN V exp_of(const V& x) {
  using T = scalar_t<V>;
  constexpr bool kFloat = sizeof(T) == 4;
  const T lowest = kFloat ? T(-104) : T(-746), highest = kFloat ? T(89) : T(710);
  const T magic = kFloat ? T(12582912.0) : T(6755399441055744.0);  // adding and subtracting it rounds to an integer
  const V c = select(x < V(lowest), V(lowest), select(x > V(highest), V(highest), x));
  const V n = (c * V(T(1.44269504088896340736)) + V(magic)) - V(magic);
  const T high = kFloat ? T(0.693359375) : T(6.93147180369123816490e-01);
  const T low = kFloat ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  const V r = (c - n * V(high)) - n * V(low);
  const V e = exp_reduced(r);
  const V half = (n * V(T(0.5)) + V(magic)) - V(magic);
  return select(x != x, x, (e * pow2(half)) * pow2(n - half));
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
  constexpr bool kFloat = sizeof(T) == 4;
  const T magic = kFloat ? T(12582912.0) : T(6755399441055744.0);
  const V shifted = x * V(T(1.44269504088896340736)) + V(magic);
  const V n = shifted - V(magic);
  const T high = kFloat ? T(0.693359375) : T(6.93147180369123816490e-01);
  const T low = kFloat ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  const V r = (x - n * V(high)) - n * V(low);
  return select(x == V(softmax_floor<T>()), V(T(0)), exp_reduced(r) * pow2_of_shifted(shifted));
}

// Σ_k c[k]·x^k, k < N: pairs of terms first, so the chain of dependent operations is half as long as Horner's.
template <class V, class T, int N>
PF_FN V polynomial(const V& x, const T (&c)[N]) {
  const V x2 = x * x;
  V p = N % 2 ? V(c[N - 1]) : V(c[N - 2]) + V(c[N - 1]) * x;
#pragma GCC unroll 16
  for (int k = (N % 2 ? N - 1 : N - 2) - 2; k >= 0; k -= 2) p = p * x2 + (V(c[k]) + V(c[k + 1]) * x);
  return p;
}

// e^x - 1 - x without cancellation near 0: the series x²·Σ x^k/(k+2)! where |x| < 1/2.
template <class V>
PF_FN V exp_minus_one_minus(const V& x, const V& exp_x) {
  using T = scalar_t<V>;
  V series;
  if constexpr (sizeof(T) == 4) {
    constexpr T c[] = {T(1.0 / 2), T(1.0 / 6), T(1.0 / 24), T(1.0 / 120), T(1.0 / 720), T(1.0 / 5040), T(1.0 / 40320)};
    series = polynomial(x, c);
  } else {
    constexpr T c[] = {
        T(1.0 / 2),         T(1.0 / 6),          T(1.0 / 24),          T(1.0 / 120),          T(1.0 / 720),
        T(1.0 / 5040),      T(1.0 / 40320),      T(1.0 / 362880),      T(1.0 / 3628800),      T(1.0 / 39916800),
        T(1.0 / 479001600), T(1.0 / 6227020800), T(1.0 / 87178291200), T(1.0 / 1307674368000)};
    series = polynomial(x, c);
  }
  return select(abs_of(x) < V(T(0.5)), series * (x * x), (exp_x - V(T(1))) - x);
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
  for (int k = kTerms - 1; k >= 1; --k) p = p * s2 + V(T(1) / T(2 * k + 1));
  const V log_m = V(T(2)) * (s + (s * s2) * p);
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

// 1/(1 + e^-x).
template <class V>
PF_FN V sigmoid(const V& x) {
  using T = scalar_t<V>;
  const V e = exp_of(-abs_of(x));
  const V small = e / (V(T(1)) + e);
  return select(x >= V(T(0)), V(T(1)) / (V(T(1)) + e), select(x != x, x, small));
}

}  // namespace PF_ISA
}  // namespace pf
