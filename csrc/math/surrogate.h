// The clipped policy loss of one token and its derivative, and the log-ratio it starts from.
#pragma once
#include "number.h"

namespace pf {
namespace PF_ISA {

// LossParams in the compute dtype, with "off" told apart once. Loops take a copy of their own, which stays in
// registers.
template <class T>
struct LossNumbers {
  T clip_lo, clip_hi, dual_clip, ratio_cap, log_ratio_clamp, huber_delta, value_clip, kl_clamp, kl_value_clamp,
      rollout_low, rollout_high;
  int value_loss, value_clip_mode, kl, rollout_correction;
  bool has_dual_clip, has_ratio_cap, has_log_ratio_clamp, has_value_clip, has_kl_clamp, has_kl_value_clamp;
  LossNumbers() = default;
  PF_FN explicit LossNumbers(const LossParams& p)
      : clip_lo(T(1.0 - p.clip_low)), clip_hi(T(1.0 + p.clip_high)), dual_clip(T(p.dual_clip)),
        ratio_cap(T(p.ratio_cap)), log_ratio_clamp(T(p.log_ratio_clamp)), huber_delta(T(p.huber_delta)),
        value_clip(T(p.value_clip)), kl_clamp(T(p.kl_clamp)), kl_value_clamp(T(p.kl_value_clamp)),
        rollout_low(T(p.rollout_low)), rollout_high(T(p.rollout_high)), value_loss(p.value_loss),
        value_clip_mode(p.value_clip_mode), kl(p.kl), rollout_correction(p.rollout_correction),
        has_dual_clip(p.dual_clip == p.dual_clip), has_ratio_cap(p.ratio_cap == p.ratio_cap),
        has_log_ratio_clamp(p.log_ratio_clamp == p.log_ratio_clamp), has_value_clip(p.value_clip == p.value_clip),
        has_kl_clamp(p.kl_clamp == p.kl_clamp), has_kl_value_clamp(p.kl_value_clamp == p.kl_value_clamp) {}
};

// torch.clamp: the bounds themselves are inside, and NaN stays NaN.
template <class V>
PF_FN V clamp_of(const V& x, const V& low, const V& high) {
  return select(x < low, low, select(x > high, high, x));
}

// Subgradient of torch.maximum(a, b) with respect to a: 1, 0, and ½ where they tie.
template <class V>
PF_FN V share_of_max(const V& a, const V& b) {
  using T = scalar_t<V>;
  return select(a > b, V(T(1)), select(a == b, V(T(0.5)), V(T(0))));
}

template <class V, class M>
struct Surrogate {
  V loss, grad;  // grad: d loss / d log_prob
  M low, high, dual_clipped;
};

// max(-A·min(r, cap), -A·clip(r, lo, hi)); where A < 0 at most -c·A. r = e^d with d inside the log-ratio clamp or not.
// The derivative of -A·r is -A·r again: nothing is multiplied where the clip took over, so 0·inf cannot happen.
template <class V, class T>
PF_FN auto surrogate(const V& ratio, const V& advantage, const LossNumbers<T>& c) {
  const V zero(T(0)), lo(c.clip_lo), hi(c.clip_hi), minus_a = -advantage;
  const auto low = ratio<lo, high = ratio> hi;
  const V clipped = minus_a * select(low, lo, select(high, hi, ratio));
  V unclipped = minus_a * ratio;
  V loss, grad;
  if (c.has_ratio_cap) {
    const V cap(c.ratio_cap), below_cap = select(ratio <= cap, unclipped, zero);
    const V passed = select(low | high, zero, unclipped);
    unclipped = minus_a * min_of(ratio, cap);
    const V share = share_of_max(unclipped, clipped);
    grad = share * below_cap + (V(T(1)) - share) * passed;
  } else {
    grad = select((low | high) & !(unclipped > clipped), zero, unclipped);
  }
  loss = larger_or_second(clipped, unclipped);  // NaN where either is: a finite clip of a NaN ratio there is not
  auto dual_clipped = low & high;               // no lane
  if (c.has_dual_clip) {
    const V ceiling = V(c.dual_clip) * minus_a;
    const auto negative = minus_a > zero;
    dual_clipped = negative & (loss > ceiling);
    grad = select(dual_clipped, zero, select(negative & (loss == ceiling), grad * V(T(0.5)), grad));
    loss = select(dual_clipped, ceiling, loss);
  }
  return Surrogate<V, decltype(dual_clipped)>{loss, grad, low, high, dual_clipped};
}

}  // namespace PF_ISA
}  // namespace pf
