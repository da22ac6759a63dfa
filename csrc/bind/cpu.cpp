// The extension module ppo_fast._C: CPU kernels over DLPack tensors. Plain functions; Python allocates what they fill.
#include <cstdlib>

#include "../cpu/dispatch.h"
#include "bernoulli_log_prob.h"
#include "beta_log_prob.h"
#include "categorical_log_prob.h"
#include "categorical_ppo_loss.h"
#include "multi_categorical_log_prob.h"
#include "normal_log_prob.h"
#include "normal_ppo_loss.h"
#include "discounted_returns.h"
#include "gae.h"
#include "ppo_loss.h"
#include "vtrace.h"
#include "whiten.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace pf::bind;
  m.doc() = "CPU kernels of ppo_fast.";

  py::class_<pf::LossParams>(m, "LossParams").def(py::init(&loss_params), py::arg("numbers"), py::arg("choices"));
  py::tuple stats(static_cast<size_t>(pf::kStatCount));
  const char* names[] = {
#define X(name) #name,
      PF_STATS(X)
#undef X
  };
  for (int i = 0; i < pf::kStatCount; ++i) stats[i] = names[i];
  m.attr("STATS") = stats;

  const char* wanted = std::getenv("PPO_FAST_CPU");
  if (!pf::set_isa(wanted)) {
    throw py::value_error(text("PPO_FAST_CPU must be base, v3 or v4 and supported by this processor, got ", wanted));
  }
  m.def("isa", [] { return pf::isa_name(pf::isa()); }, "Instruction set in use: base, v3 (AVX2) or v4 (AVX-512).");
  m.def("set_isa", [](const std::string& name) {
    if (!pf::set_isa(name.c_str())) {
      throw py::value_error(text("set_isa: name must be base, v3 or v4 and supported by this processor, got ", name));
    }
  }, py::arg("name"), "For tests and bug reports; an empty name picks the best.");

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
