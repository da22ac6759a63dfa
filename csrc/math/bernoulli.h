// One Bernoulli from its logit. `one`: whether the action is a 1.
#pragma once
#include "elementary.h"

namespace pf {
namespace PF_ISA {

// log_mass: log σ(z) or log σ(-z); the side is chosen first, so 0·inf cannot happen. entropy: softplus(z) - z·σ(z),
// even in z; 0 where the outcome is certain. Both stand on t = e^-|z|: softplus(z) = max(z, 0) + log(1 + t).
template <class V>
struct BernoulliTerm {
  V log_mass, entropy;
};
template <class V, class M>
PF_FN BernoulliTerm<V> bernoulli_term(const V& z, const M& one) {
  using T = scalar_t<V>;
  const V zero(T(0)), size = abs_of(z), t = exp_of(-size), log_sum = log1p_of(t);
  const auto certain = size == V(std::numeric_limits<T>::infinity());
  return {-(max_of(select(one, -z, z), zero) + log_sum), select(certain, zero, log_sum + size * (t / (V(T(1)) + t)))};
}

// d/dz of g·log_mass + h·entropy: g·(action - σ(z)) - h·z·σ(z)·σ(-z).
template <class V, class M>
PF_FN V bernoulli_grad(const V& z, const M& one, const V& g, const V& h) {
  using T = scalar_t<V>;
  const V zero(T(0)), size = abs_of(z), t = exp_of(-size), sum = V(T(1)) + t, large = V(T(1)) / sum, small = t / sum;
  const auto positive = z >= zero;
  const V up = select(positive, large, small), down = select(positive, small, large);
  const auto certain = size == V(std::numeric_limits<T>::infinity());
  return g * select(one, down, -up) - h * select(certain, zero, (z * up) * down);
}

}  // namespace PF_ISA
}  // namespace pf
