#pragma once
#include "loss.h"
#include "normal_log_prob.h"

namespace pf::bind {

inline void bind_normal_ppo_loss(py::module_& m) {
  // grad of log_std [D]: of one that all rows share.
  m.def("normal_ppo_loss",
        [](const LossParams& params, py::handle mean_, py::handle log_std_, py::handle actions_, bool squash,
           py::handle index, py::handle old_log_prob, py::handle advantages, py::handle values, py::handle old_values,
           py::handle returns, py::handle ref_log_prob, py::handle rollout_log_prob, py::handle mask,
           py::handle weights, double denominator, bool sum, py::handle loss, py::handle stats, py::handle d_mean_,
           py::handle d_log_std_, py::handle grad_values, Resources resources) {
    const Op op("normal_ppo_loss");
    const Tensor mean(op, "mean", mean_), log_std(op, "log_std", log_std_), actions(op, "actions", actions_);
    const Tensor d_mean(op, "grad of mean", d_mean_), d_log_std(op, "grad of log_std", d_log_std_);
    const LossInputs inputs(op, old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob,
                            mask, weights, index, loss, stats, grad_values);
    check_rows(mean, "D");
    const int lead = mean.ndim() - 1;
    NormalPpoLossArgs a{};
    a.loss = inputs.args(params, mean, lead, "the shape of the rows", denominator, sum,
                         mean.is_double() || log_std.is_double() || inputs.values.is_double());
    a.dist = normal(mean, log_std, actions, squash, inputs.index ? inputs.old_log_prob.numel() : -1);
    if (d_mean) a.d_mean = gradient_rows(d_mean.contiguous(), mean);
    if (d_log_std) a.d_log_std = gradient_rows(d_log_std.contiguous(), log_std);
    const std::vector<double> sums = shared_sums(d_log_std, mean, a.sums);
    run(op, mean.numel(), a, resources, &pf::normal_ppo_loss);
  });
}

}  // namespace pf::bind
