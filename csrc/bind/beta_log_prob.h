#pragma once
#include "log_prob.h"

namespace pf::bind {

inline Beta beta_distribution(const Tensor& alpha, const Tensor& beta, const Tensor& actions, double low, double high) {
  check_rows(alpha, "D");
  beta.required().floating().same_shape(alpha, "the shape of alpha");
  actions.required().floating().same_shape(alpha, "the shape of alpha");
  return {alpha.rows(), beta.rows(), actions.rows(), low, high};
}

inline void bind_beta_log_prob(py::module_& m) {
  m.def("beta_log_prob", [](py::handle alpha_, py::handle beta_, py::handle actions_, double low, double high,
                            py::handle log_prob_, py::handle entropy_, Resources resources) {
    const Op op("beta_log_prob");
    const Tensor alpha(op, "alpha", alpha_), beta(op, "beta", beta_), actions(op, "actions", actions_);
    const Tensor log_prob(op, "log_prob", log_prob_), entropy(op, "entropy", entropy_);
    BetaLogProbArgs a{};
    a.dist = beta_distribution(alpha, beta, actions, low, high);
    const int lead = alpha.ndim() - 1;
    a.n = alpha.numel_of(lead);
    a.is_double = alpha.is_double() || beta.is_double() || actions.is_double();
    a.log_prob = result(log_prob.required(), alpha, lead, a.is_double);
    a.entropy = result(entropy, alpha, lead, a.is_double);
    run(op, 64 * alpha.numel(), a, resources, &pf::beta_log_prob);
  });
  m.def("beta_log_prob_backward",
        [](py::handle alpha_, py::handle beta_, py::handle actions_, double low, double high, py::handle d_log_prob_,
           py::handle d_entropy_, py::handle d_alpha_, py::handle d_beta_, Resources resources) {
    const Op op("beta_log_prob");
    const Tensor alpha(op, "alpha", alpha_), beta(op, "beta", beta_), actions(op, "actions", actions_);
    const Tensor d_log_prob(op, "grad of log_prob", d_log_prob_), d_entropy(op, "grad of entropy", d_entropy_);
    const Tensor d_alpha(op, "grad of alpha", d_alpha_), d_beta(op, "grad of beta", d_beta_);
    BetaLogProbBackwardArgs a{};
    a.dist = beta_distribution(alpha, beta, actions, low, high);
    const int lead = alpha.ndim() - 1;
    a.n = alpha.numel_of(lead);
    a.is_double = alpha.is_double() || beta.is_double() || actions.is_double();
    a.d_log_prob = incoming(d_log_prob, alpha, lead);
    a.d_entropy = incoming(d_entropy, alpha, lead);
    if (d_alpha) a.d_alpha = gradient_rows(d_alpha, alpha);
    if (d_beta) a.d_beta = gradient_rows(d_beta, beta);
    run(op, 64 * alpha.numel(), a, resources, &pf::beta_log_prob_backward);
  });
}

}  // namespace pf::bind
