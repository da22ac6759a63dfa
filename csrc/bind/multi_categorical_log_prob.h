#pragma once
#include "log_prob.h"

namespace pf::bind {

inline MultiCategorical multi_categorical(const Tensor& logits, const Tensor& actions, const Tensor& action_mask,
                                          const std::vector<int64_t>& nvec) {
  check_rows(logits, "Σ nvec");
  if (actions.required().ndim() != logits.ndim()) {
    actions.fail(text("be [..., K] with the rows of logits ", logits.shape_text(), ", got ", actions.shape_text()));
  }
  for (int d = 0; d < logits.ndim() - 1; ++d) {
    if (actions.size(d) != logits.size(d)) {
      actions.fail(text("be [..., K] with the rows of logits ", logits.shape_text(), ", got ", actions.shape_text()));
    }
  }
  action_mask.same_shape(logits, "the shape of logits");
  int64_t total = 0;
  for (int64_t n : nvec) {
    if (n < 1) throw py::value_error(text(logits.op(), ": nvec must hold numbers >= 1, got ", n));
    total += n;
  }
  if (actions.size(-1) != static_cast<int64_t>(nvec.size()) || logits.size(-1) != total) {
    throw py::value_error(text(logits.op(), ": nvec must have ", actions.size(-1),
                               " entries, as actions has, that sum to ", logits.size(-1), ", as logits has, got ",
                               nvec.size(), " that sum to ", total));
  }
  return {logits.rows(), action_mask.rows(), actions.rows(), nvec.data()};
}

inline void bind_multi_categorical_log_prob(py::module_& m) {
  m.def("multi_categorical_log_prob",
        [](py::handle logits_, py::handle actions_, py::handle mask_, const py::sequence& nvec_, py::handle log_prob_,
           py::handle entropy_, py::handle saved_, Resources resources) {
    const Op op("multi_categorical_log_prob");
    const Tensor logits(op, "logits", logits_), actions(op, "actions", actions_), mask(op, "action_mask", mask_);
    const Tensor log_prob(op, "log_prob", log_prob_), entropy(op, "entropy", entropy_), saved(op, "saved", saved_);
    const auto nvec = integers(nvec_);
    MultiCategoricalLogProbArgs a{};
    a.dist = multi_categorical(logits, actions, mask, nvec);
    const int lead = logits.ndim() - 1;
    const int64_t heads = static_cast<int64_t>(nvec.size());
    a.n = logits.numel_of(lead);
    a.is_double = logits.is_double();
    a.log_prob = result(log_prob.required(), logits, lead, a.is_double);
    a.entropy = result(entropy, logits, lead, a.is_double);
    a.saved = saved.required()
                  .dtype_is(log_prob.dtype(), "the compute dtype")
                  .shape_is({3, heads, a.n}, "[3, K, rows]")
                  .contiguous()
                  .data();
    const Labels labels(op, "actions");
    a.offence = labels.at();
    run(op, logits.numel(), a, resources, &pf::multi_categorical_log_prob);
    if (const Offence& offence = labels.found(); labels.refused()) {
      actions.fail(text("be in [0, ", nvec[offence.where % heads], ") for head ", offence.where % heads, ", got ",
                        offence.value, " at row ", offence.where / heads));
    }
  });
  m.def("multi_categorical_log_prob_backward",
        [](py::handle logits_, py::handle actions_, py::handle mask_, const py::sequence& nvec_, py::handle saved_,
           py::handle d_log_prob_, py::handle d_entropy_, py::handle d_logits_, Resources resources) {
    const Op op("multi_categorical_log_prob");
    const Tensor logits(op, "logits", logits_), actions(op, "actions", actions_), mask(op, "action_mask", mask_);
    const Tensor saved(op, "saved", saved_), d_log_prob(op, "grad of log_prob", d_log_prob_);
    const Tensor d_entropy(op, "grad of entropy", d_entropy_), d_logits(op, "grad of logits", d_logits_);
    const auto nvec = integers(nvec_);
    MultiCategoricalLogProbBackwardArgs a{};
    a.dist = multi_categorical(logits, actions, mask, nvec);
    const int lead = logits.ndim() - 1;
    a.n = logits.numel_of(lead);
    a.is_double = logits.is_double();
    a.saved = saved.required()
                  .dtype_is(a.is_double ? DType::f64 : DType::f32, "the compute dtype")
                  .shape_is({3, static_cast<int64_t>(nvec.size()), a.n}, "[3, K, rows]")
                  .contiguous()
                  .data();
    a.d_log_prob = incoming(d_log_prob, logits, lead);
    a.d_entropy = incoming(d_entropy, logits, lead);
    a.d_logits = gradient_rows(d_logits, logits);
    run(op, logits.numel(), a, resources, &pf::multi_categorical_log_prob_backward);
  });
}

}  // namespace pf::bind
