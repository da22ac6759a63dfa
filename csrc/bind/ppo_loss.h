#pragma once
#include "loss.h"

namespace pf::bind {

inline void bind_ppo_loss(py::module_& m) {
  m.def("ppo_loss", [](const LossParams& params, py::handle log_prob_, py::handle old_log_prob, py::handle advantages,
                       py::handle values, py::handle old_values, py::handle returns, py::handle entropy_,
                       py::handle ref_log_prob, py::handle rollout_log_prob, py::handle mask, py::handle weights,
                       double denominator, bool sum, py::handle loss, py::handle stats, py::handle grad_log_prob_,
                       py::handle grad_values, py::handle grad_entropy_, Resources resources) {
    const Op op("ppo_loss");
    const Tensor log_prob(op, "log_prob", log_prob_), entropy(op, "entropy", entropy_);
    const Tensor grad_log_prob(op, "grad_log_prob", grad_log_prob_), grad_entropy(op, "grad_entropy", grad_entropy_);
    const LossInputs inputs(op, old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob,
                            mask, weights, py::none(), loss, stats, grad_values);
    log_prob.required().floating();
    entropy.floating().same_shape(log_prob, "the shape of log_prob");
    const bool is_double = log_prob.is_double() || inputs.values.is_double() || entropy.is_double();
    PpoLossArgs a{};
    a.loss = inputs.args(params, log_prob, log_prob.ndim(), "the shape of log_prob", denominator, sum, is_double);
    a.loss.entropy = entropy.stream();
    a.loss.grad_entropy = LossInputs::gradient(grad_entropy, entropy);
    a.log_prob = log_prob.stream();
    a.grad_log_prob = LossInputs::gradient(grad_log_prob, log_prob);
    run(op, a.loss.n, a, resources, &pf::ppo_loss);
  });
}

}  // namespace pf::bind
