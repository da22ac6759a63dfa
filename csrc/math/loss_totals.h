// From sums over tokens to the loss and its statistics, and what the whole batch must agree on before.
#pragma once
#include "moments.h"

namespace pf {
namespace PF_ISA {

// What the whole batch must agree on before the first gradient is written.
template <class T>
struct LossScale {
  T weight;        // 1/denominator
  bool normalize;  // (A - shift)·inverse
  T shift, inverse;
};

// From count, mean and deviations of the advantages; only the count where they are not normalised.
template <class T>
PF_FN LossScale<T> scale_of(const Moments& m, double given_denominator, bool sum, bool normalize, int ddof,
                            double eps) {
  LossScale<T> scale{};
  const bool given = given_denominator == given_denominator;
  const double denominator = given ? given_denominator : sum ? 1.0 : m.count > 1.0 ? m.count : 1.0;
  scale.weight = static_cast<T>(1.0 / denominator);
  scale.normalize = normalize && m.count > ddof;
  if (scale.normalize) {
    scale.shift = static_cast<T>(m.mean);
    scale.inverse = static_cast<T>(1.0 / (sqrt_of(m.m2 / (m.count - ddof)) + eps));
  }
  return scale;
}

struct LossTotals {
  double policy, value, entropy, kl, k3, log_ratio, low, high, dual, value_clipped, ratio, ratio2, count, ratio_min,
      ratio_max;
  Moments returns, residuals;  // for the explained variance
};

// stat[kStatCount]; returns the loss. `weight` is LossScale's.
PF_FN double statistics(const LossTotals& s, double weight, bool has_values, bool has_kl, double value_coef,
                        double entropy_coef, double kl_coef, double* stat) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), n = s.count > 1.0 ? s.count : 1.0;
  stat[k_policy_loss] = weight * s.policy, stat[k_value_loss] = weight * s.value;
  stat[k_entropy] = weight * s.entropy, stat[k_kl] = weight * s.kl;
  stat[k_approx_kl] = s.k3 / n, stat[k_old_approx_kl] = -s.log_ratio / n;
  stat[k_clip_fraction_low] = s.low / n, stat[k_clip_fraction_high] = s.high / n;
  stat[k_clip_fraction] = stat[k_clip_fraction_low] + stat[k_clip_fraction_high];
  stat[k_dual_clip_fraction] = s.dual / n, stat[k_value_clip_fraction] = s.value_clipped / n;
  stat[k_ratio_mean] = s.ratio / n;
  const double poison = s.ratio != s.ratio ? s.ratio : 0;  // comparisons passed over a NaN ratio, its sum did not
  stat[k_ratio_min] = s.count > 0 ? s.ratio_min + poison : 0,
  stat[k_ratio_max] = s.count > 0 ? s.ratio_max + poison : 0;
  stat[k_ess] = s.count > 0 ? s.ratio * (s.ratio / (n * s.ratio2)) : 0;
  stat[k_explained_variance] = s.returns.m2 > 0 ? 1.0 - s.residuals.m2 / s.returns.m2 : nan;
  double loss = stat[k_policy_loss];
  if (has_values) loss += value_coef * stat[k_value_loss];
  loss -= entropy_coef * stat[k_entropy];
  if (has_kl) loss += kl_coef * stat[k_kl];
  return loss;
}

}  // namespace PF_ISA
}  // namespace pf
