// One dimension of a diagonal normal, from z = (action - mean)/std.
#pragma once
#include "elementary.h"

namespace pf {
namespace PF_ISA {

constexpr double kHalfLog2Pi = 0.91893853320467274178;

template <class V>
PF_FN V normal_log_density(const V& z, const V& log_std) {
  using T = scalar_t<V>;
  return V(T(-0.5)) * (z * z) - (log_std + V(T(kHalfLog2Pi)));
}

template <class V>
PF_FN V normal_entropy(const V& log_std) {
  using T = scalar_t<V>;
  return log_std + V(T(0.5 + kHalfLog2Pi));
}

// log(1 - tanh² x) without cancellation: 2·(log 2 - x - softplus(-2x)).
template <class V>
PF_FN V log_tanh_slope(const V& x) {
  using T = scalar_t<V>;
  return V(T(2)) * ((V(T(0.69314718055994530942)) - x) - softplus(V(T(-2)) * x));
}

}  // namespace PF_ISA
}  // namespace pf
