// The extension module ppo_fast._C: CPU kernels over DLPack tensors. Plain functions; Python allocates what they fill.
#include <cstdlib>

#include "ops.h"
#include "run_given.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace pf::bind;
  m.doc() = "CPU kernels of ppo_fast.";

  bind_ops(m);
  m.attr("_KERNELS") = py::capsule(&kKernels[0], "ppo_fast.kernels");  // for _C_xla

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
}
