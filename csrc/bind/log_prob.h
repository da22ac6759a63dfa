// What the bindings of the log-prob ops share: gradients and results checked against their inputs, labels out of range.
#pragma once
#include <utility>
#include <vector>

#include "tensor.h"

namespace pf::bind {

// Contiguous results of the shape of the rows, in the compute dtype.
inline void* result(const Tensor& x, const Tensor& like, int lead, bool is_double) {
  if (!x) return nullptr;
  const DType dtype = is_double ? DType::f64 : DType::f32;
  return x.same_shape(like, "the shape of the rows", lead).dtype_is(dtype, "the compute dtype").contiguous().data();
}

inline Stream incoming(const Tensor& x, const Tensor& like, int lead) {
  return x.floating().same_shape(like, "the shape of the rows", lead).stream();
}

inline Rows gradient_rows(const Tensor& x, const Tensor& of) {
  return x.required().same_shape(of, "the input's shape").dtype_is(of.dtype(), "the input's dtype").rows();
}

inline void check_rows(const Tensor& x, const char* width) {
  x.required().floating();
  if (x.ndim() < 1) x.fail(text("be [..., ", width, "], got ", x.shape_text()));
}

// Rows of a tensor that broadcasts to `like`: dimensions that it lacks or has once get stride 0.
inline Rows broadcast_rows(const Tensor& x, const Tensor& like, const char* name) {
  const int missing = like.ndim() - x.ndim();
  bool fits = missing >= 0;
  for (int d = 0; fits && d < x.ndim(); ++d) fits = x.size(d) == like.size(d + missing) || x.size(d) == 1;
  if (!fits) x.fail(text("broadcast to ", name, " ", like.shape_text(), ", got ", x.shape_text()));
  const auto stride = [&](int d) { return d < missing || x.size(d - missing) == 1 ? 0 : x.stride(d - missing); };
  Rows r;
  r.lead = x.stream_of(0);
  for (int d = 0; d < like.ndim() - 1; ++d) {
    if (like.size(d) == 1) continue;
    Stream& s = r.lead;
    if (s.ndim > 0 && s.stride[s.ndim - 1] == like.size(d) * stride(d)) {
      s.shape[s.ndim - 1] *= like.size(d);
      s.stride[s.ndim - 1] = stride(d);
    } else {
      if (s.ndim == kMaxDims) x.fail(text("merge into at most ", kMaxDims, " dimensions, got ", x.shape_text()));
      s.shape[s.ndim] = like.size(d);
      s.stride[s.ndim++] = stride(d);
    }
  }
  r.width = like.size(-1);
  r.stride = r.width == 1 ? 1 : stride(like.ndim() - 1);
  return r;
}

inline std::vector<int64_t> integers(const py::sequence& numbers) {
  std::vector<int64_t> out;
  for (const py::handle x : numbers) out.push_back(x.cast<int64_t>());
  return out;
}

[[noreturn]] inline void refuse(const Tensor& actions, const Offence& o, int64_t bound, const char* what) {
  actions.fail(text("be in [0, ", bound, "), the ", what, ", got ", o.value, " at row ", o.where));
}

// Of a gradient that is to overwrite its input: no two elements may share memory.
inline bool has_overlap(const Tensor& x) {
  // Strides in ascending order must each step over everything that the smaller ones reach.
  int order[64], n = 0;
  for (int d = 0; d < x.ndim() && n < 64; ++d) {
    if (x.size(d) != 1) order[n++] = d;
  }
  auto step = [&](int d) { return x.stride(d) < 0 ? -x.stride(d) : x.stride(d); };
  for (int i = 1; i < n; ++i) {
    for (int j = i; j > 0 && step(order[j]) < step(order[j - 1]); --j) std::swap(order[j], order[j - 1]);
  }
  int64_t reach = 0;
  for (int i = 0; i < n; ++i) {
    if (x.numel() > 0 && step(order[i]) <= reach) return true;
    reach += (x.size(order[i]) - 1) * step(order[i]);
  }
  return false;
}

}  // namespace pf::bind
