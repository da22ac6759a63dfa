#pragma once
#include "log_prob.h"

namespace pf::bind {

inline void bind_bernoulli_log_prob(py::module_& m) {
  m.def("bernoulli_log_prob",
        [](py::handle logits_, py::handle actions_, py::handle log_prob_, py::handle entropy_, Resources resources) {
    const Op op("bernoulli_log_prob");
    const Tensor logits(op, "logits", logits_), actions(op, "actions", actions_);
    const Tensor log_prob(op, "log_prob", log_prob_), entropy(op, "entropy", entropy_);
    check_rows(logits, "D");
    actions.required().same_shape(logits, "the shape of logits");
    const int lead = logits.ndim() - 1;
    const bool is_double = logits.is_double();
    BernoulliLogProbArgs a{logits.rows(),
                           actions.rows(),
                           logits.numel_of(lead),
                           result(log_prob.required(), logits, lead, is_double),
                           result(entropy, logits, lead, is_double),
                           is_double,
                           0};
    run(op, logits.numel(), a, resources, &pf::bernoulli_log_prob);
  });
  m.def("bernoulli_log_prob_backward", [](py::handle logits_, py::handle actions_, py::handle d_log_prob_,
                                          py::handle d_entropy_, py::handle d_logits_, Resources resources) {
    const Op op("bernoulli_log_prob");
    const Tensor logits(op, "logits", logits_), actions(op, "actions", actions_);
    const Tensor d_log_prob(op, "grad of log_prob", d_log_prob_), d_entropy(op, "grad of entropy", d_entropy_);
    const Tensor d_logits(op, "grad of logits", d_logits_);
    check_rows(logits, "D");
    actions.required().same_shape(logits, "the shape of logits");
    const int lead = logits.ndim() - 1;
    BernoulliLogProbBackwardArgs a{logits.rows(),
                                   actions.rows(),
                                   logits.numel_of(lead),
                                   incoming(d_log_prob, logits, lead),
                                   incoming(d_entropy, logits, lead),
                                   gradient_rows(d_logits, logits),
                                   logits.is_double(),
                                   0};
    run(op, logits.numel(), a, resources, &pf::bernoulli_log_prob_backward);
  });
}

}  // namespace pf::bind
