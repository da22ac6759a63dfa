// Every op's bindings, and what Python must know of the kernels: the same for each extension module.
#pragma once
#include "bernoulli_log_prob.h"
#include "beta_log_prob.h"
#include "categorical_log_prob.h"
#include "categorical_ppo_loss.h"
#include "discounted_returns.h"
#include "gae.h"
#include "multi_categorical_log_prob.h"
#include "normal_log_prob.h"
#include "normal_ppo_loss.h"
#include "ppo_loss.h"
#include "vtrace.h"
#include "whiten.h"

namespace pf::bind {

inline void bind_ops(py::module_& m) {
  py::class_<pf::LossParams>(m, "LossParams", py::module_local())
      .def(py::init(&loss_params), py::arg("numbers"), py::arg("choices"), py::arg("on_device") = py::none());
  py::tuple stats(static_cast<size_t>(pf::kStatCount));
  const char* names[] = {
#define X(name) #name,
      PF_STATS(X)
#undef X
  };
  for (int i = 0; i < pf::kStatCount; ++i) stats[i] = names[i];
  m.attr("STATS") = stats;
  bind_ppo_loss(m);
  bind_whiten(m);
  bind_categorical_log_prob(m);
  bind_categorical_ppo_loss(m);
  bind_normal_log_prob(m);
  bind_normal_ppo_loss(m);
  bind_multi_categorical_log_prob(m);
  bind_bernoulli_log_prob(m);
  bind_beta_log_prob(m);
  bind_gae(m);
  bind_vtrace(m);
  bind_discounted_returns(m);
}

}  // namespace pf::bind
