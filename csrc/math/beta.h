// One Beta in double, from libm and two series: its cost is lgamma, and few dimensions have it.
#pragma once
#include "number.h"

namespace pf {
namespace PF_ISA {

PF_FN double log_gamma(double x) {
#if defined(__GLIBC__) && !defined(__CUDA_ARCH__)
  int sign;
  return ::lgamma_r(x, &sign);  // lgamma writes a global
#else
  return std::lgamma(x);
#endif
}

// ψ(x) for x > 0: ψ(x) = ψ(x + 1) - 1/x up to 10, then the asymptotic series (Abramowitz and Stegun 6.3.18).
PF_FN double digamma(double x) {
  if (!(x > 0)) return std::numeric_limits<double>::quiet_NaN();
  double shift = 0;
  for (; x < 10; x += 1) shift += 1 / x;
  const double y = 1 / (x * x);
  const double series =
      y * (1.0 / 12 - y * (1.0 / 120 - y * (1.0 / 252 - y * (1.0 / 240 - y * (1.0 / 132 - y * (691.0 / 32760))))));
  return std::log(x) - 0.5 / x - series - shift;
}

// ψ'(x) for x > 0, in the same way (6.4.12).
PF_FN double trigamma(double x) {
  if (!(x > 0)) return std::numeric_limits<double>::quiet_NaN();
  double shift = 0;
  for (; x < 10; x += 1) shift += 1 / (x * x);
  const double y = 1 / (x * x);
  const double series =
      y * (1.0 / 6 - y * (1.0 / 30 - y * (1.0 / 42 - y * (1.0 / 30 - y * (5.0 / 66 - y * (691.0 / 2730))))));
  return (1 + series) / x + 0.5 * y + shift;
}

// a·log x as torch.xlogy has it: 0 where a is 0, unless x is NaN.
PF_FN double x_log_y(double a, double x, double log_x) { return a == 0 && x == x ? 0 : a * log_x; }

struct BetaTerm {
  double log_prob, entropy;
};
// x in [0, 1]; log_width = log(high - low).
PF_FN BetaTerm beta_term(double alpha, double beta, double x, double log_width) {
  const double total = alpha + beta;
  const double log_norm = log_gamma(alpha) + log_gamma(beta) - log_gamma(total) + log_width;
  const double up = x_log_y(alpha - 1, x, std::log(x)), down = x_log_y(beta - 1, x, std::log1p(-x));
  return {up + down - log_norm,
          log_norm - (alpha - 1) * digamma(alpha) - (beta - 1) * digamma(beta) + (total - 2) * digamma(total)};
}

struct BetaGrad {
  double alpha, beta;
};
// Of g·log_prob + h·entropy.
PF_FN BetaGrad beta_grad(double alpha, double beta, double x, double g, double h) {
  const double total = alpha + beta;
  const double log_x = alpha == 1 && x <= 0 ? 0 : std::log(x), log_rest = beta == 1 && x >= 1 ? 0 : std::log1p(-x);
  BetaGrad d{0, 0};
  if (g != 0) {
    const double common = digamma(total);
    d.alpha = g * ((log_x - digamma(alpha)) + common);
    d.beta = g * ((log_rest - digamma(beta)) + common);
  }
  if (h != 0) {
    const double common = (total - 2) * trigamma(total);
    d.alpha += h * (common - (alpha - 1) * trigamma(alpha));
    d.beta += h * (common - (beta - 1) * trigamma(beta));
  }
  return d;
}

}  // namespace PF_ISA
}  // namespace pf
