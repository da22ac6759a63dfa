// The policy loss of one token and its derivative: PPO's, and the others that LossConfig.policy names.
#pragma once
#include "elementary.h"

namespace pf {
namespace PF_ISA {

// LossParams in the compute dtype, with "off" told apart once. Loops take a copy of their own, which stays in
// registers.
template <class T>
struct LossNumbers {
  T clip_lo, clip_hi, dual_clip, ratio_cap, log_ratio_clamp, huber_delta, value_clip, kl_clamp, kl_value_clamp,
      rollout_low, rollout_high;
  int value_loss, value_clip_mode, kl, kl_gradient, kl_weight, rollout_correction;
  bool has_dual_clip, has_ratio_cap, has_log_ratio_clamp, has_value_clip, has_kl_clamp, has_kl_value_clamp;
  LossNumbers() = default;
  PF_FN explicit LossNumbers(const LossParams& p)
      : clip_lo(T(1.0 - p.clip_low)), clip_hi(T(1.0 + p.clip_high)), dual_clip(T(p.dual_clip)),
        ratio_cap(T(p.ratio_cap)), log_ratio_clamp(T(p.log_ratio_clamp)), huber_delta(T(p.huber_delta)),
        value_clip(T(p.value_clip)), kl_clamp(T(p.kl_clamp)), kl_value_clamp(T(p.kl_value_clamp)),
        rollout_low(T(p.rollout_low)), rollout_high(T(p.rollout_high)), value_loss(p.value_loss),
        value_clip_mode(p.value_clip_mode), kl(p.kl), kl_gradient(p.kl_gradient), kl_weight(p.kl_weight),
        rollout_correction(p.rollout_correction), has_dual_clip(p.dual_clip == p.dual_clip),
        has_ratio_cap(p.ratio_cap == p.ratio_cap), has_log_ratio_clamp(p.log_ratio_clamp == p.log_ratio_clamp),
        has_value_clip(p.value_clip == p.value_clip), has_kl_clamp(p.kl_clamp == p.kl_clamp),
        has_kl_value_clamp(p.kl_value_clamp == p.kl_value_clamp) {}
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

// Of the other policies, beside LossNumbers: apart from it, so that PPO's loops do not carry them.
template <class T>
struct PolicyNumbers {
  T clip_low, clip_high, tau_positive, tau_negative, dro_beta;
  int policy;
  PolicyNumbers() = default;
  PF_FN explicit PolicyNumbers(const LossParams& p)
      : clip_low(T(p.clip_low)), clip_high(T(p.clip_high)), tau_positive(T(p.sapo_tau_positive)),
        tau_negative(T(p.sapo_tau_negative)), dro_beta(T(p.dro_beta)), policy(p.policy) {}
};

// A token as the other policies read it: x = log_prob, d inside the log-ratio clamp or not, r = e^d.
template <class V>
struct PolicyToken {
  V log_prob, old_log_prob, log_ratio, ratio, advantage;
};

// Whether the derivative goes through r, so that the log-ratio clamp ends it.
PF_FN bool through_ratio(int policy) { return policy == kPpo || policy == kSapo || policy == kCpi; }

// -4/τ·A·σ(τ(r - 1)), τ by the sign of A; its derivative is -4·A·r·σ·(1 - σ), and 0 where 1 - σ is: 0·inf cannot
// happen.
template <class V, class T>
PF_FN void sapo(const PolicyToken<V>& x, const PolicyNumbers<T>& c, V& loss, V& grad) {
  const V zero(T(0)), one(T(1)), minus_a = -x.advantage;
  const V tau = select(x.advantage > zero, V(c.tau_positive), V(c.tau_negative)), z = tau * (x.ratio - one);
  const V e = exp_of(-abs_of(z)), near = one / (one + e), far = e * near;
  const auto positive = z >= zero;
  const V gate = select(positive, near, select(z < zero, far, z)), rest = select(positive, far, near);
  loss = minus_a * (gate * (V(T(4)) / tau));
  grad = select(rest == zero, minus_a * zero, minus_a * (V(T(4)) * (gate * rest) * x.ratio));
}

// Where the probability p of the token went too far from q, its old one: above for A > 0, below for the others. NaN is
// nowhere too far: it shows in the loss.
template <class V, class T>
PF_FN void too_far(const PolicyToken<V>& x, const PolicyNumbers<T>& c, decltype(x.ratio < x.ratio)& low,
                   decltype(x.ratio < x.ratio)& high) {
  const V zero(T(0)), one(T(1)), p = exp_of(x.log_prob), q = exp_of(x.old_log_prob);
  const auto up = x.advantage > zero, down = x.advantage <= zero;
  if (c.policy == kDppoTv) {
    const V gap = p - q;
    high = up & (gap > V(c.clip_high)), low = down & (gap < V(-c.clip_low));
  } else {
    const V tiny(T(1e-8)), other = log_of(((one - q) + tiny) / ((one - p) + tiny));
    const V kl = q * (x.old_log_prob - x.log_prob) + (one - q) * other;
    high = up & (kl > V(c.clip_high)) & (p > q), low = down & (kl > V(c.clip_low)) & (p < q);
  }
}

// Every policy but PPO's. `low` and `high`: where r is outside the clip range; for DPPO, what is left out.
template <class V, class T>
PF_FN auto policy_term(const PolicyToken<V>& x, const LossNumbers<T>& c, const PolicyNumbers<T>& other) {
  const V zero(T(0)), lo(c.clip_lo), hi(c.clip_hi), minus_a = -x.advantage;
  auto low = x.ratio<lo, high = x.ratio> hi;
  V loss, grad;
  if (other.policy == kCispo) {
    grad = minus_a * select(low, lo, select(high, hi, x.ratio));
    loss = grad * x.log_prob;
  } else if (other.policy == kSapo) {
    sapo(x, other, loss, grad);
  } else if (other.policy == kDppoTv || other.policy == kDppoKl) {
    too_far(x, other, low, high);
    grad = minus_a * (c.has_ratio_cap ? min_of(x.ratio, V(c.ratio_cap)) : x.ratio);
    loss = select(low | high, zero, grad * x.log_prob), grad = select(low | high, zero, grad);
  } else if (other.policy == kDro) {
    const V pull = V(other.dro_beta) * x.log_ratio, d = x.log_prob - x.old_log_prob;
    loss = minus_a * x.log_prob + V(T(0.5)) * (pull * x.log_ratio);
    grad = minus_a + (c.has_log_ratio_clamp ? select(d == x.log_ratio, pull, zero) : pull);
  } else if (other.policy == kReinforce) {
    loss = minus_a * x.log_prob, grad = minus_a;
  } else {
    loss = grad = minus_a * x.ratio;
  }
  auto nowhere = low & high;
  return Surrogate<V, decltype(nowhere)>{loss, grad, low, high, nowhere};
}

}  // namespace PF_ISA
}  // namespace pf
