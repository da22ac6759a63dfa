#pragma once
#include "categorical_log_prob.h"
#include "loss.h"

namespace pf::bind {

inline void bind_categorical_ppo_loss(py::module_& m) {
  m.def("categorical_ppo_loss",
        [](const LossParams& params, py::handle logits_, py::handle actions_, py::handle mask_, py::handle index,
           py::handle old_log_prob, py::handle advantages, py::handle values, py::handle old_values, py::handle returns,
           py::handle ref_log_prob, py::handle rollout_log_prob, py::handle mask, py::handle weights,
           double denominator, bool sum, py::handle loss, py::handle stats, py::handle d_logits_,
           py::handle grad_values, Resources resources) {
    const Op op("categorical_ppo_loss");
    const Tensor logits(op, "logits", logits_), actions(op, "actions", actions_), action_mask(op, "action_mask", mask_);
    const Tensor d_logits(op, "grad of logits", d_logits_), none(op, "temperature", py::none());
    const LossInputs inputs(op, old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob,
                            mask, weights, index, loss, stats, grad_values);
    check_rows(logits, "A");
    const int lead = logits.ndim() - 1;
    CategoricalPpoLossArgs a{};
    a.loss = inputs.args(params, logits, lead, "the shape of the rows", denominator, sum,
                         logits.is_double() || inputs.values.is_double());
    a.dist = categorical(logits, actions, action_mask, none, 1.0, py::none(),
                         inputs.index ? inputs.old_log_prob.numel() : -1);
    if (d_logits) a.d_logits = gradient_rows(d_logits.contiguous(), logits);
    const Labels labels(op, "actions");
    a.offence = labels.at();
    run(op, a.loss.n * a.dist.logits.width, a, resources, &pf::categorical_ppo_loss);
    if (labels.refused()) refuse(actions, labels.found(), a.dist.logits.width, "number of actions");
  });
}

}  // namespace pf::bind
