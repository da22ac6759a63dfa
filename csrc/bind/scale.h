#pragma once
#include "loss.h"

namespace pf::bind {

// Gradients that were made for a grad_output of 1, in place times what came.
inline void bind_scale(py::module_& m) {
  m.def("scale", [](py::handle factor_, const py::args& grads) {
    const Op op("scale");
    const Tensor factor(op, "grad_output", factor_);
    factor.required().floating().shape_is({}, "[]");
    ScaleArgs a{};
    a.factor = factor.stream();
    if (grads.size() < 2 || grads.size() > 1 + kMaxScaled) throw py::value_error("scale: takes 1 to 3 gradients");
    for (size_t i = 0; i + 1 < grads.size(); ++i) {
      const Tensor grad(op, "gradient", grads[i]);
      a.grads[i] = grad.required().floating().contiguous().stream();
      a.n[i] = grad.numel();
    }
    run(op, a.n[0], a, grads[grads.size() - 1], &pf::scale);
  });
}

}  // namespace pf::bind
