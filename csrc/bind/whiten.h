#pragma once
#include "tensor.h"

namespace pf::bind {

inline void bind_whiten(py::module_& m) {
  m.def("whiten", [](py::handle x_, py::handle mask_, py::handle out_, py::handle moments_, bool have_moments, int ddof,
                     double eps, bool shift_mean, bool eps_in_variance, Resources resources) {
    const Op op("whiten");
    const Tensor x(op, "x", x_), mask(op, "mask", mask_), out(op, "out", out_), moments(op, "moments", moments_);
    x.required().floating();
    mask.same_shape(x, "the shape of x");
    const bool is_double = x.is_double();
    out.same_shape(x, "the shape of x").contiguous();
    out.dtype_is(is_double ? DType::f64 : DType::f32, is_double ? "float64" : "float32");
    moments.dtype_is(DType::f64, "float64").shape_is({3}, "[count, mean, m2]").contiguous();
    if (!out && !moments) moments.required();
    WhitenArgs a{};
    a.n = x.numel();
    a.x = x.stream(), a.mask = mask.stream(), a.out = out.stream();
    a.moments = moments ? static_cast<double*>(moments.data()) : nullptr;
    a.have_moments = have_moments && moments;
    a.ddof = ddof, a.eps = eps, a.shift_mean = shift_mean, a.eps_in_variance = eps_in_variance;
    a.is_double = is_double;
    run(op, a.n, a, resources, &pf::whiten);
  });
}

}  // namespace pf::bind
