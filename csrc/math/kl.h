// Per-token estimates of KL(policy || reference) from u = ref_log_prob - log_prob, and d/d log_prob.
// joschu.net/blog/kl-approx.html.
#pragma once
#include "elementary.h"
#include "surrogate.h"

namespace pf {
namespace PF_ISA {

// `ratio` and `moves`, whether it has a derivative, are read for a KL weighted by the ratio. !kWeighted: there is
// neither a weight nor another estimate's gradient.
template <bool kWeighted = true, class V, class M, class T>
PF_FN void kl_term(V u, const V& ratio, const M& moves, const LossNumbers<T>& c, V& k, V& grad) {
  const V zero(T(0)), one(T(1)), unclamped = u;
  auto alive = u == u;
  alive = alive | !alive;
  if (c.has_kl_clamp) {
    const V bound(c.kl_clamp);
    alive = !((u < -bound) | (u > bound));
    u = clamp_of(u, -bound, bound);
  }
  if (c.kl == kK1) {
    k = -u, grad = one;
  } else if (c.kl == kAbs) {
    k = abs_of(u), grad = select(u > zero, -one, select(u < zero, one, zero));
  } else if (c.kl == kK2) {
    k = V(T(0.5)) * u * u, grad = -u;
  } else {
    const auto e = exponential(u);
    k = e.beyond_linear, grad = one - e.value;
  }
  if (kWeighted && c.kl_weight == kKlRatio) {
    grad = ratio * select(moves, grad + k, grad);
    k = ratio * k;
  } else if (kWeighted && c.kl_weight == kKlScore) {
    grad = grad + k;
  }
  if (c.has_kl_value_clamp) {
    const V bound(c.kl_value_clamp);
    alive = alive & !((k < -bound) | (k > bound));
    k = clamp_of(k, -bound, bound);
  }
  grad = select(alive, grad, zero);
  if (kWeighted && c.kl_gradient == kGradientOfK2) grad = -unclamped;
}

}  // namespace PF_ISA
}  // namespace pf
