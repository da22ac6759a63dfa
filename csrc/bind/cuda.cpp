// The extension module ppo_fast._C_cuda: the same calls as _C, for tensors on an NVIDIA GPU. With PF_SIMT, for tests,
// the same kernels on the CPU.
#include "ops.h"
#include "run_given.h"
#include "scale.h"

#ifndef PF_MODULE
#define PF_MODULE _C_cuda
#endif

PYBIND11_MODULE(PF_MODULE, m) {
  using namespace pf::bind;
  m.doc() = "CUDA kernels of ppo_fast.";
  bind_ops(m);
  bind_scale(m);
  m.attr("_KERNELS") = pybind11::capsule(&kKernels[0], "ppo_fast.kernels");  // for _C_xla
  m.attr("ARCHITECTURES") = PF_CUDA_ARCHITECTURES;
  m.def("set_reports", [](intptr_t address) { reports = reinterpret_cast<pf::Offence*>(address); }, py::arg("address"),
        "Where kernels note labels that they refuse: memory that the CPU reads and the GPU writes, int64 [SLOTS, 2].");
  m.def("raise_reported", &raise_reported, "Raises ValueError for what a kernel noted.");
  m.attr("SLOTS") = kSlots;
#if PF_SIMT
  m.def("set_schedule", &pf::simt::set_schedule, py::arg("seed"), py::arg("resident_blocks"));
#endif
}
