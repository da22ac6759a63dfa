// What the bindings of gae, vtrace and discounted_returns share: grids of [T, N], [N, T], [T] or packed [M], checked.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "tensor.h"

namespace pf::bind {

// What is wrong with the borders of packed sequences, which lie on the CPU; empty: nothing.
inline std::string complaint_of_bounds(const ScanArgs& args) {
  const int64_t *first = args.bounds, *end = first + args.columns + 1;
  if (first[0] != 0 || end[-1] != args.steps) {
    return text("go from 0 to M = ", args.steps, ", got ", first[0], " to ", end[-1]);
  }
  const int64_t* drop = std::is_sorted_until(first, end);
  return drop == end ? "" : text("not decrease, got ", drop[-1], " before ", drop[0]);
}

class ScanInputs {
 public:
  ScanArgs args{};

  ScanInputs(const Op& op, py::handle rewards, int time_dim, py::handle cu_seqlens, bool is_double)
      : op_(op), rewards_(op, "rewards", rewards) {
    rewards_.required().floating();
    const int ndim = rewards_.ndim();
    if (ndim != 1 && ndim != 2) {
      rewards_.fail(text("have a time dimension: [T] or [T, N], got ", rewards_.shape_text()));
    }
    if (time_dim < -ndim || time_dim >= ndim) {
      throw py::value_error(text(op.name, ": time_dim must be in [", -ndim, ", ", ndim, "), got ", time_dim));
    }
    time_ = time_dim < 0 ? time_dim + ndim : time_dim;
    args.steps = rewards_.size(time_);
    args.columns = ndim == 1 ? 1 : rewards_.size(1 - time_);
    args.output_t = time_ == 0 ? args.columns : 1;
    args.output_n = ndim == 1 ? args.steps : time_ == 0 ? 1 : args.steps;
    shape_ = ndim == 1 ? "[T]" : time_ == 0 ? "[T, N]" : "[N, T]";
    if (!cu_seqlens.is_none()) read_bounds(cu_seqlens);
    args.rewards = grid(rewards_);
    args.is_double = is_double;
    args.missing = &missing_;
    args.final_count = -1;
    args.carry = true;
    args.gamma.value = args.lam.value = 1.0;
    args.rho_clip = args.c_clip = 1.0;
  }
  ScanInputs(const ScanInputs&) = delete;

  Grid stream(const char* name, py::handle object) const {
    const Tensor t(op_, name, object);
    t.required().floating();
    return grid(t);
  }
  Grid flags(const char* name, py::handle object) const { return grid(Tensor(op_, name, object)); }

  void episode_ends(py::handle last_values, py::handle terminated, py::handle truncated, py::handle final_values) {
    args.terminated = flags("terminated", terminated);
    args.truncated = flags("truncated", truncated);
    if (PyTuple_Check(final_values.ptr())) {
      sparse(final_values);
    } else {
      const Tensor t(op_, "final_values", final_values);
      if (args.truncated.data && !t) {
        throw py::value_error(text(op_.name,
                                   ": final_values must be given with truncated: V of the state that each "
                                   "truncated step led to, ",
                                   shape_, " or (flat_index, value)"));
      }
      t.floating();
      args.final_values = grid(t);
    }
    const Tensor t(op_, "last_values", last_values);
    t.floating();
    if (t) args.last_values.row = per_column(t);
  }

  void mask(py::handle object, py::handle mode) {
    args.mask = flags("mask", object);
    if (!mode) return;
    args.carry = PyUnicode_Check(mode.ptr()) && PyUnicode_CompareWithASCIIString(mode.ptr(), "carry") == 0;
    if (!args.carry && !(PyUnicode_Check(mode.ptr()) && PyUnicode_CompareWithASCIIString(mode.ptr(), "zero") == 0)) {
      throw py::value_error(text(op_.name, ": mask_mode must be 'carry' or 'zero', got ", std::string(py::repr(mode))));
    }
  }

  // A number, or a tensor of one per column; each in [0, 1].
  PerColumn rate(const char* name, py::handle object) const {
    PerColumn p;
    if (!is_number(object)) {
      const Tensor t(op_, name, object);
      t.required().floating();
      const int64_t n = kOnGpu ? 0 : t.ndim() == 0 ? 1 : args.columns;  // what lies on a GPU is not looked at
      p.row = t.ndim() == 0 ? Grid{t.data(), t.dtype(), 0, 0} : per_column(t);
      for (int64_t i = 0; i < n; ++i) check_rate(name, element(p.row, i), i);
      return p;
    }
    p.value = number(name, object);
    check_rate(name, p.value, -1);
    return p;
  }
  double clip(const char* name, py::handle object) const {
    const double x = number(name, object);
    if (!(x > 0)) throw py::value_error(text(op_.name, ": ", name, " must be > 0, got ", x));
    return x;
  }

  void output(int i, const char* name, py::handle object) {
    const Tensor t(op_, name, object);
    t.required().dtype_is(args.is_double ? DType::f64 : DType::f32, args.is_double ? "float64" : "float32");
    t.same_shape(rewards_, shape_).contiguous();
    args.outputs[i] = t.data();
  }

  void moments(py::handle object) {
    const Tensor t(op_, "moments", object);
    if (!t) return;
    t.dtype_is(DType::f64, "float64").shape_is({3}, "[count, mean, m2]").contiguous();
    args.moments = static_cast<double*>(t.data());
  }

  template <class Kernel>
  void run(Resources resources, Kernel kernel) {
    pf::bind::run(op_, rewards_.numel(), args, resources, kernel);
    if (missing_ < 0) return;
    const int64_t t = args.output_t == 1 ? missing_ % args.steps : missing_ / args.output_t;
    const int64_t n = args.output_t == 1 ? missing_ / args.steps : missing_ % args.output_t;
    throw py::value_error(text(op_.name,
                               ": final_values must have an entry for every truncated step, got none for flat "
                               "index ",
                               missing_, rewards_.ndim() == 2 ? text(" (t = ", t, ", n = ", n, ")") : ""));
  }

 private:
  Grid grid(const Tensor& t) const {
    Grid g;
    if (!t) return g;
    t.same_shape(rewards_, shape_);
    g.data = t.data() ? t.data() : &kNothing;
    g.dtype = t.dtype();
    // Of a dimension of one the stride says nothing; 1 lets such a grid be read where it lies.
    g.t = args.steps == 1 && !args.bounds ? args.columns : t.stride(time_);
    g.n = rewards_.ndim() == 1 || args.columns == 1 ? 1 : t.stride(1 - time_);
    return g;
  }

  Grid per_column(const Tensor& t) const {
    if (rewards_.ndim() == 1 && !args.bounds) {
      if (t.numel() != 1 || t.ndim() > 1) t.fail(text("be [] or [1], got ", t.shape_text()));
    } else {
      t.shape_is({args.columns}, args.bounds ? "[S]" : "[N]");
    }
    return {t.data() ? t.data() : &kNothing, t.dtype(), 0, t.ndim() == 0 ? 0 : t.stride(0)};
  }

  static bool is_number(py::handle x) { return PyFloat_Check(x.ptr()) || PyLong_Check(x.ptr()) || !is_tensor(x); }

  double number(const char* name, py::handle object) const {
    const double x = PyFloat_AsDouble(object.ptr());
    if (x == -1.0 && PyErr_Occurred()) {
      PyErr_Clear();
      throw py::type_error(text(op_.name, ": ", name, " must be a number, got ", Py_TYPE(object.ptr())->tp_name));
    }
    return x;
  }
  void check_rate(const char* name, double x, int64_t at) const {
    if (x >= 0.0 && x <= 1.0) return;
    throw py::value_error(text(op_.name, ": ", name, " must be in [0, 1], got ", x, at < 0 ? "" : text(" at ", at)));
  }

  void read_bounds(py::handle object) {
    const Tensor t(op_, "cu_seqlens", object);
    if (t.dtype() != DType::i32 && t.dtype() != DType::i64) t.dtype_is(DType::i64, "int32 or int64");
    if (rewards_.ndim() != 1) {
      rewards_.fail(text("be packed, [M], with cu_seqlens, got ", rewards_.shape_text()));
    }
    if (t.ndim() != 1 || t.size(0) < 1) t.fail(text("be [S + 1], got ", t.shape_text()));
    args.columns = t.size(0) - 1;
    args.output_t = 1, args.output_n = args.steps;
    shape_ = "[M]";
    if (kOnGpu) {
      args.bounds = static_cast<const int64_t*>(t.dtype_is(DType::i64, "int64").contiguous().data());
      return;
    }
    const Grid g{t.data(), t.dtype(), 0, t.stride(0)};
    bounds_.resize(t.size(0));
    for (size_t i = 0; i < bounds_.size(); ++i) bounds_[i] = integer(g, i);
    args.bounds = bounds_.data();
    if (const std::string what = complaint_of_bounds(args); !what.empty()) t.fail(what);
  }

  void sparse(py::handle pair) {
    if (PyTuple_Size(pair.ptr()) != 2) {
      throw py::value_error(text(op_.name,
                                 ": final_values must be a tensor or a pair (flat_index, value), got a tuple of ",
                                 PyTuple_Size(pair.ptr())));
    }
    if (kOnGpu) throw py::type_error(text(op_.name, ": final_values must be a grid on a GPU"));
    const Tensor index(op_, "final_values[0]", PyTuple_GetItem(pair.ptr(), 0));
    const Tensor value(op_, "final_values[1]", PyTuple_GetItem(pair.ptr(), 1));
    index.required().integer();
    value.required().floating();
    if (index.ndim() != 1) index.fail(text("be [K], got ", index.shape_text()));
    value.same_shape(index, "[K]");
    const Grid at{index.data(), index.dtype(), 0, index.stride(0)};
    const Grid of{value.data(), value.dtype(), 0, value.stride(0)};
    std::vector<std::pair<int64_t, int64_t>> order(index.size(0));
    for (size_t i = 0; i < order.size(); ++i) {
      order[i] = {integer(at, i), i};
      if (order[i].first < 0 || order[i].first >= rewards_.numel()) {
        index.fail(
            text("be in [0, ", rewards_.numel(), "), flat positions in rewards, got ", order[i].first, " at ", i));
      }
    }
    std::sort(order.begin(), order.end());
    final_index_.reserve(order.size());
    final_value_.reserve(order.size());
    for (const auto& [flat, i] : order) {
      final_index_.push_back(flat);
      final_value_.push_back(element(of, i));
    }
    args.final_index = final_index_.data();
    args.final_value = final_value_.data();
    args.final_count = static_cast<int64_t>(final_index_.size());
  }

  static int64_t integer(const Grid& g, int64_t i) {
    i *= g.n;
    switch (g.dtype) {
      case DType::i64: return static_cast<const int64_t*>(g.data)[i];
      case DType::i32: return static_cast<const int32_t*>(g.data)[i];
      case DType::i16: return static_cast<const int16_t*>(g.data)[i];
      case DType::i8: return static_cast<const int8_t*>(g.data)[i];
      default: return static_cast<const uint8_t*>(g.data)[i];
    }
  }
  static double element(const Grid& g, int64_t i) {
    i *= g.n;
    switch (g.dtype) {
      case DType::f64: return static_cast<const double*>(g.data)[i];
      case DType::f32: return static_cast<const float*>(g.data)[i];
      case DType::f16: return static_cast<double>(static_cast<const _Float16*>(g.data)[i]);
      default: {
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(g.data)[i]) << 16;
        return __builtin_bit_cast(float, bits);
      }
    }
  }

  static constexpr char kNothing[8] = {};
  const Op& op_;
  const char* shape_;
  Tensor rewards_;
  int time_ = 0;
  int64_t missing_ = -1;
  std::vector<int64_t> bounds_, final_index_;
  std::vector<double> final_value_;
};

}  // namespace pf::bind
