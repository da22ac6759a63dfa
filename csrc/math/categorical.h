// Softmax of one row, written on what a pass over it leaves: the largest logit, s = Σ e^u and w = Σ u·e^u with
// u = (logit - largest)/temperature <= 0. Both terms of the entropy are >= 0: nothing cancels.
#pragma once
#include "elementary.h"

namespace pf {
namespace PF_ISA {

// u, with -inf held at the floor, where e^u is 0 and u·e^u still a number.
template <class V>
PF_FN V softmax_exponent(const V& logit, const V& shift, const V& inverse_temperature) {
  using T = scalar_t<V>;
  return larger_or_second(V(softmax_floor<T>()), (logit - shift) * inverse_temperature);
}

template <class V>
PF_FN V softmax_entropy(const V& log_sum, const V& sum, const V& weighted) {
  return log_sum - weighted / sum;
}

// d/d logit of g·log_prob + h·entropy, but for the +g/temperature of the action taken:
// -(g + h·(log p + entropy))·p/temperature. minus_g, minus_h: -g/temperature, -h/temperature.
template <class V>
PF_FN V softmax_grad(const V& logit, const V& shift, const V& log_sum, const V& entropy, const V& inverse_temperature,
                     const V& minus_g, const V& minus_h) {
  using T = scalar_t<V>;
  const V log_p = larger_or_second(V(softmax_floor<T>()), fma_of(logit - shift, inverse_temperature, -log_sum));
  return fma_of(minus_h, log_p + entropy, minus_g) * exp_floored(log_p);
}

}  // namespace PF_ISA
}  // namespace pf
