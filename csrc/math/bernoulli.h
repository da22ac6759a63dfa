// One Bernoulli from its logit. `one`: whether the action is a 1.
#pragma once
#include "elementary.h"

namespace pf {
namespace PF_ISA {

// log σ(z) or log σ(-z): the side is chosen first, so 0·inf cannot happen.
template <class V, class M>
PF_FN V bernoulli_log_mass(const V& z, const M& one) {
  return -softplus(select(one, -z, z));
}

// softplus(z) - z·σ(z), even in z; 0 where the outcome is certain.
template <class V>
PF_FN V bernoulli_entropy(const V& z) {
  using T = scalar_t<V>;
  const V size = abs_of(z), inf(std::numeric_limits<T>::infinity());
  const auto certain = size == inf;
  const V x = select(certain, V(T(0)), size);
  return select(certain, V(T(0)), log1p_of(exp_of(-x)) + x * sigmoid(-x));
}

// d/dz of g·log_mass + h·entropy: g·(action - σ(z)) - h·z·σ(z)·σ(-z).
template <class V, class M>
PF_FN V bernoulli_grad(const V& z, const M& one, const V& g, const V& h) {
  using T = scalar_t<V>;
  const V up = sigmoid(z), down = sigmoid(-z);
  const auto certain = abs_of(z) == V(std::numeric_limits<T>::infinity());
  return g * select(one, down, -up) - h * select(certain, V(T(0)), (z * up) * down);
}

}  // namespace PF_ISA
}  // namespace pf
