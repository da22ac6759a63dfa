#pragma once
#include <vector>

#include "log_prob.h"

namespace pf::bind {

// The distribution of [..., D] means, every part checked. Shared with normal_ppo_loss, which may gather actions from
// `stored` rows.
inline Normal normal(const Tensor& mean, const Tensor& log_std, const Tensor& actions, bool squash,
                     int64_t stored = -1) {
  check_rows(mean, "D");
  actions.required().floating();
  if (stored < 0) {
    actions.same_shape(mean, "the shape of mean");
  } else if (actions.ndim() < 1 || actions.size(-1) != mean.size(-1) ||
             actions.numel_of(actions.ndim() - 1) != stored) {
    actions.fail(text("have ", stored, " rows of ", mean.size(-1), ", got ", actions.shape_text()));
  }
  log_std.required().floating();
  Normal d;
  d.mean = mean.rows();
  d.log_std = broadcast_rows(log_std, mean, "the shape of mean");
  d.actions = actions.rows();
  d.squash = squash;
  return d;
}

// Scratch for the gradient [D] of a log_std that all rows share, to which `at` then points; else nothing.
inline std::vector<double> shared_sums(const Tensor& d_log_std, const Tensor& mean, double*& at) {
  std::vector<double> sums;  // a GPU's lie there
  if (d_log_std && d_log_std.ndim() == 1 && mean.ndim() != 1) {
    d_log_std.shape_is({mean.size(-1)}, "[D]");
    if (!kOnGpu) sums.resize(kMaxRowBlocks * mean.size(-1));
    at = sums.data();
  } else {
    d_log_std.same_shape(mean, "the shape of mean");
  }
  return sums;
}

inline void bind_normal_log_prob(py::module_& m) {
  m.def("normal_log_prob", [](py::handle mean_, py::handle log_std_, py::handle actions_, bool squash,
                              py::handle log_prob_, py::handle entropy_, Resources resources) {
    const Op op("normal_log_prob");
    const Tensor mean(op, "mean", mean_), log_std(op, "log_std", log_std_), actions(op, "actions", actions_);
    const Tensor log_prob(op, "log_prob", log_prob_), entropy(op, "entropy", entropy_);
    NormalLogProbArgs a{};
    a.dist = normal(mean, log_std, actions, squash);
    const int lead = mean.ndim() - 1;
    a.n = mean.numel_of(lead);
    a.is_double = mean.is_double() || log_std.is_double() || actions.is_double();
    a.log_prob = result(log_prob.required(), mean, lead, a.is_double);
    a.entropy = result(entropy, mean, lead, a.is_double);
    run(op, mean.numel(), a, resources, &pf::normal_log_prob);
  });
  // d_log_std [D]: of a log_std that all rows share.
  m.def("normal_log_prob_backward",
        [](py::handle mean_, py::handle log_std_, py::handle actions_, bool squash, py::handle d_log_prob_,
           py::handle d_entropy_, py::handle d_mean_, py::handle d_log_std_, Resources resources) {
    const Op op("normal_log_prob");
    const Tensor mean(op, "mean", mean_), log_std(op, "log_std", log_std_), actions(op, "actions", actions_);
    const Tensor d_log_prob(op, "grad of log_prob", d_log_prob_), d_entropy(op, "grad of entropy", d_entropy_);
    const Tensor d_mean(op, "grad of mean", d_mean_), d_log_std(op, "grad of log_std", d_log_std_);
    NormalLogProbBackwardArgs a{};
    a.dist = normal(mean, log_std, actions, squash);
    const int lead = mean.ndim() - 1;
    a.n = mean.numel_of(lead);
    a.is_double = mean.is_double() || log_std.is_double() || actions.is_double();
    a.d_log_prob = incoming(d_log_prob, mean, lead);
    a.d_entropy = incoming(d_entropy, mean, lead);
    if (d_mean) a.d_mean = gradient_rows(d_mean, mean);
    d_log_std.floating();
    const std::vector<double> sums = shared_sums(d_log_std, mean, a.sums);
    if (d_log_std) a.d_log_std = d_log_std.rows();
    run(op, mean.numel(), a, resources, &pf::normal_log_prob_backward);
  });
}

}  // namespace pf::bind
