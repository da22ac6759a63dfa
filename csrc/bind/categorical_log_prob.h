#pragma once
#include "log_prob.h"

namespace pf::bind {

// The distribution of [..., A] logits, every part checked. Shared with categorical_ppo_loss, which may gather actions
// and action_mask from `stored` rows.
inline Categorical categorical(const Tensor& logits, const Tensor& actions, const Tensor& action_mask,
                               const Tensor& temperature_rows, double temperature, py::handle ignore_index,
                               int64_t stored = -1) {
  check_rows(logits, "A");
  const int lead = logits.ndim() - 1;
  actions.required();
  if (stored < 0) {
    actions.same_shape(logits, "the shape of the rows", lead);
    action_mask.same_shape(logits, "the shape of logits");
  } else {
    if (actions.numel() != stored) actions.fail(text("have ", stored, " elements, got ", actions.shape_text()));
    if (action_mask && (action_mask.ndim() < 1 || action_mask.size(-1) != logits.size(-1) ||
                        action_mask.numel_of(action_mask.ndim() - 1) != stored)) {
      action_mask.fail(text("have ", stored, " rows of ", logits.size(-1), ", got ", action_mask.shape_text()));
    }
  }
  temperature_rows.floating().same_shape(logits, "the shape of the rows", lead);
  Categorical c;
  c.logits = logits.rows();
  if (c.logits.width < 1 && logits.numel_of(lead) > 0)
    logits.fail("have at least one action, got " + logits.shape_text());
  c.actions = actions.stream();
  c.action_mask = action_mask.rows();
  c.temperature = temperature_rows.stream();
  c.temperature_value = temperature;
  c.has_ignore_index = !ignore_index.is_none();
  if (c.has_ignore_index) c.ignore_index = ignore_index.cast<int64_t>();
  return c;
}

inline void bind_categorical_log_prob(py::module_& m) {
  m.def("categorical_log_prob",
        [](py::handle logits_, py::handle actions_, py::handle mask_, py::handle rows_, double temperature,
           py::handle ignore_index, py::handle log_prob_, py::handle entropy_, py::handle saved_, Resources resources) {
    const Op op("categorical_log_prob");
    const Tensor logits(op, "logits", logits_), actions(op, "actions", actions_), mask(op, "action_mask", mask_);
    const Tensor rows(op, "temperature", rows_), log_prob(op, "log_prob", log_prob_), entropy(op, "entropy", entropy_);
    const Tensor saved(op, "saved", saved_);
    CategoricalLogProbArgs a{};
    a.dist = categorical(logits, actions, mask, rows, temperature, ignore_index);
    const int lead = logits.ndim() - 1;
    a.n = logits.numel_of(lead);
    a.is_double = logits.is_double();
    a.log_prob = result(log_prob.required(), logits, lead, a.is_double);
    a.entropy = result(entropy, logits, lead, a.is_double);
    a.saved = saved.required()
                  .dtype_is(log_prob.dtype(), "the compute dtype")
                  .shape_is({2, a.n}, "[2, rows]")
                  .contiguous()
                  .data();
    const Labels labels(op, "actions");
    a.offence = labels.at();
    run(op, a.n * a.dist.logits.width, a, resources, &pf::categorical_log_prob);
    if (labels.refused()) refuse(actions, labels.found(), a.dist.logits.width, "number of actions");
  });
  m.def("categorical_log_prob_backward",
        [](py::handle logits_, py::handle actions_, py::handle mask_, py::handle rows_, double temperature,
           py::handle entropy_, py::handle saved_, py::handle d_log_prob_, py::handle d_entropy_, py::handle d_logits_,
           Resources resources) {
    const Op op("categorical_log_prob");
    const Tensor logits(op, "logits", logits_), actions(op, "actions", actions_), mask(op, "action_mask", mask_);
    const Tensor rows(op, "temperature", rows_), entropy(op, "entropy", entropy_), saved(op, "saved", saved_);
    const Tensor d_log_prob(op, "grad of log_prob", d_log_prob_), d_entropy(op, "grad of entropy", d_entropy_);
    const Tensor d_logits(op, "grad of logits", d_logits_);
    CategoricalLogProbBackwardArgs a{};
    a.dist = categorical(logits, actions, mask, rows, temperature, py::none());
    const int lead = logits.ndim() - 1;
    a.n = logits.numel_of(lead);
    a.is_double = logits.is_double();
    const DType dtype = a.is_double ? DType::f64 : DType::f32;
    if (d_entropy) entropy.required();
    a.entropy = result(entropy, logits, lead, a.is_double);
    a.saved = saved.required().dtype_is(dtype, "the compute dtype").shape_is({2, a.n}, "[2, rows]").contiguous().data();
    a.d_log_prob = incoming(d_log_prob, logits, lead);
    a.d_entropy = incoming(d_entropy, logits, lead);
    a.d_logits = gradient_rows(d_logits, logits);
    if (has_overlap(d_logits)) d_logits.fail("have elements of its own: some share memory, strides overlap");
    run(op, a.n * a.dist.logits.width, a, resources, &pf::categorical_log_prob_backward);
  });
  m.def("has_overlap", [](py::handle x) { return has_overlap(Tensor(Op("has_overlap"), "x", x)); }, py::arg("x"),
        "Whether elements of a tensor may share memory.");
}

}  // namespace pf::bind
