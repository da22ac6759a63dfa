// Any DLPack tensor as a checked view, and messages that say which argument, what was expected and what came.
// Views are borrowed: they hold while the call runs with the caller's references.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include "call.h"

namespace pf::bind {

#if PF_PLAN

// What stands for a tensor in a plan: contiguous, of a shape and a dtype; its data are buffer number `index`.
struct Buffer {
  std::vector<int64_t> shape;
  std::string dtype;
  int64_t index;
};

inline bool is_tensor(py::handle x) { return py::isinstance<Buffer>(x); }

#else

// The C exchange API of an object's type (torch >= 2.10), or nullptr. Looked up once per type.
inline const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const DLPackExchangeAPI* api;
  };
  static Entry cache[4] = {};  // Tensor and Parameter alternate; guarded by the GIL
  static int next = 0;
  for (const Entry& e : cache)
    if (e.type == type) return e.api;
  const DLPackExchangeAPI* api = nullptr;
  if (PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
    auto* header = static_cast<const DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (header && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
    api = reinterpret_cast<const DLPackExchangeAPI*>(header);
    if (api && !api->dltensor_from_py_object_no_sync) api = nullptr;
    Py_DECREF(capsule);
  }
  PyErr_Clear();
  Py_INCREF(type);  // a cached address must not be reused for another type
  cache[next] = {type, api};
  next = (next + 1) % 4;
  return api;
}

inline bool is_tensor(py::handle x) { return exchange_api(Py_TYPE(x.ptr())) || py::hasattr(x, "__dlpack__"); }

#endif

constexpr const char* kDTypeNames[] = {"float32", "float64", "bfloat16", "float16", "int64",
                                       "int32",   "int16",   "int8",     "uint8",   "bool"};

class Tensor {
 public:
  Tensor(const Op& op, const char* name, py::handle object) : op_(op.name), name_(name) {
    if (object.is_none()) return;
#if PF_PLAN
    if (!is_tensor(object)) {
      throw py::type_error(text(op_, ": ", name, " must be an array, got ", Py_TYPE(object.ptr())->tp_name));
    }
    auto& buffer = object.cast<Buffer&>();
    t_.data = tagged(buffer.index);
    t_.ndim = static_cast<int32_t>(buffer.shape.size());
    t_.shape = buffer.shape.data();
    dtype_ = dtype_of(buffer.dtype);
    present_ = true;
#else
    const DLPackExchangeAPI* api = exchange_api(Py_TYPE(object.ptr()));
    if (api) {
      if (api->dltensor_from_py_object_no_sync(object.ptr(), &t_) != 0) throw py::error_already_set();
      if (may_be_negated() && py::hasattr(object, "resolve_neg")) {
        capsule_ = object.attr("resolve_neg")();  // the tensor itself where there is nothing to resolve
        if (api->dltensor_from_py_object_no_sync(capsule_.ptr(), &t_) != 0) throw py::error_already_set();
      }
    } else {
      if (!py::hasattr(object, "__dlpack__")) {
        throw py::type_error(text(op_, ": ", name, " must be a tensor, got ", Py_TYPE(object.ptr())->tp_name));
      }
      // -1: whoever owns it waits for nothing; the default waits, and breaks the capture of a graph
      capsule_ =
          kDeviceType == kDLCUDA ? object.attr("__dlpack__")(py::arg("stream") = -1) : object.attr("__dlpack__")();
      auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
      if (!managed) throw py::error_already_set();
      t_ = managed->dl_tensor;
    }
    present_ = true;
    if (op.device < 0) op.device = kOnGpu ? t_.device.device_id : 0, op.api = api;
    if (t_.device.device_type != kDeviceType || (kOnGpu && t_.device.device_id != op.device)) {
      throw py::type_error(text(op_, ": ", name, " must be on ", device_name(op.device), ", got DLPack device type ",
                                t_.device.device_type, kOnGpu ? text(", index ", t_.device.device_id) : ""));
    }
    if (!t_.data && numel() > 0) {
      throw py::type_error(text(op_, ": ", name, " must have storage, got a tensor without data (fake or meta)"));
    }
    dtype_ = dtype_of_view();
#endif
  }

  explicit operator bool() const { return present_; }
  int ndim() const { return t_.ndim; }
  int64_t size(int d) const { return t_.shape[d < 0 ? d + t_.ndim : d]; }
  int64_t stride(int d) const {
    if (d < 0) d += t_.ndim;
    if (t_.strides) return t_.strides[d];
    int64_t stride = 1;
    for (int i = t_.ndim - 1; i > d; --i) stride *= t_.shape[i];
    return stride;
  }
  int64_t numel() const { return numel_of(t_.ndim); }
  int64_t numel_of(int ndim) const {  // of the leading dimensions
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= t_.shape[d];
    return n;
  }
  DType dtype() const { return dtype_; }
  bool is_float() const { return dtype_ <= DType::f16; }
  bool is_double() const { return present_ && dtype_ == DType::f64; }
  const char* name() const { return name_; }
  const char* op() const { return op_; }
  void* data() const { return static_cast<char*>(t_.data) + t_.byte_offset; }

  std::string shape_text() const {
    std::ostringstream out;
    out << '[';
    for (int d = 0; d < t_.ndim; ++d) out << (d ? ", " : "") << t_.shape[d];
    out << ']';
    return out.str();
  }

  // --- checks: each returns *this, absent tensors pass ---------------------------------------------------------------
  const Tensor& required() const {
    if (!present_) throw py::type_error(text(op_, ": ", name_, " must be a tensor, got None"));
    return *this;
  }
  const Tensor& floating() const {
    if (present_ && !is_float()) fail_type("float32, float64, bfloat16 or float16");
    return *this;
  }
  const Tensor& integer() const {
    if (present_ && (is_float() || dtype_ == DType::boolean)) fail_type("an integer type");
    return *this;
  }
  const Tensor& dtype_is(DType dtype, const char* wanted) const {
    if (present_ && dtype_ != dtype) fail_type(wanted);
    return *this;
  }
  // `like` names the expected shape in the field's letters, e.g. "[T, N]".
  const Tensor& same_shape(const Tensor& other, const char* like, int other_ndim = -1) const {
    if (!present_) return *this;
    const int ndim = other_ndim < 0 ? other.ndim() : other_ndim;
    bool same = t_.ndim == ndim;
    for (int d = 0; same && d < ndim; ++d) same = t_.shape[d] == other.t_.shape[d];
    if (!same) {
      std::string wanted = "[";
      for (int d = 0; d < ndim; ++d) wanted += text(d ? ", " : "", other.t_.shape[d]);
      fail_shape(like, wanted + "]");
    }
    return *this;
  }
  const Tensor& shape_is(std::initializer_list<int64_t> shape, const char* like) const {
    if (!present_) return *this;
    bool same = t_.ndim == static_cast<int>(shape.size());
    std::string wanted = "[";
    int d = 0;
    for (int64_t n : shape) {
      same = same && t_.shape[d] == n;
      wanted += text(d ? ", " : "", n);
      ++d;
    }
    if (!same) fail_shape(like, wanted + "]");
    return *this;
  }
  // Outputs: contiguous, so no two elements share memory.
  const Tensor& contiguous() const {
    if (!present_) return *this;
    int64_t expected = 1;
    for (int d = t_.ndim - 1; d >= 0; --d) {
      if (t_.shape[d] != 1 && stride(d) != expected && numel() > 0) {
        throw py::value_error(text(op_, ": ", name_, " must be contiguous, got shape ", shape_text(), " with gaps"));
      }
      expected *= t_.shape[d];
    }
    return *this;
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw py::value_error(text(op_, ": ", name_, " must ", what));
  }

  // --- what kernels take ---------------------------------------------------------------------------------------------
  Stream stream() const { return stream_of(t_.ndim); }
  // The leading `ndim` dimensions, merged as far as strides allow.
  Stream stream_of(int ndim) const {
    Stream s;
    if (!present_) return s;
    s.data = data();
    s.dtype = dtype_;
    if (!s.data) s.data = &kNothing;  // numel 0 comes with NULL, but is there
    for (int d = 0; d < ndim; ++d) {
      const int64_t size = t_.shape[d], step = stride(d);
      if (size == 1) continue;
      if (s.ndim > 0 && s.stride[s.ndim - 1] == size * step) {
        s.shape[s.ndim - 1] *= size;
        s.stride[s.ndim - 1] = step;
        continue;
      }
      if (s.ndim == kMaxDims) fail(text("merge into at most ", kMaxDims, " dimensions, got ", shape_text()));
      s.shape[s.ndim] = size;
      s.stride[s.ndim] = step;
      ++s.ndim;
    }
    return s;
  }
  Rows rows() const {  // [..., width]
    Rows r;
    if (!present_) return r;
    r.lead = stream_of(t_.ndim - 1);
    r.width = size(-1);
    r.stride = r.width == 1 ? 1 : stride(-1);
    return r;
  }

 private:
  static constexpr char kNothing = 0;

#if PF_PLAN
  DType dtype_of(const std::string& dtype) const {
    for (int i = 0; i <= static_cast<int>(DType::boolean); ++i)
      if (dtype == kDTypeNames[i]) return static_cast<DType>(i);
    throw py::type_error(text(op_, ": ", name_, " has a dtype that no kernel takes, ", dtype));
  }
#else
  // Torch's neg bit does not travel through DLPack. What carries it is an imaginary part: no step of it is odd.
  bool may_be_negated() const {
    for (int d = 0; d < t_.ndim; ++d)
      if (t_.shape[d] > 1 && stride(d) % 2 != 0) return false;
    return numel() > 0;
  }

  DType dtype_of_view() const {
    const DLDataType d = t_.dtype;
    if (d.lanes == 1) {
      if (d.code == kDLFloat && d.bits == 32) return DType::f32;
      if (d.code == kDLFloat && d.bits == 64) return DType::f64;
      if (d.code == kDLFloat && d.bits == 16) return DType::f16;
      if (d.code == kDLBfloat && d.bits == 16) return DType::bf16;
      if (d.code == kDLInt && d.bits == 64) return DType::i64;
      if (d.code == kDLInt && d.bits == 32) return DType::i32;
      if (d.code == kDLInt && d.bits == 16) return DType::i16;
      if (d.code == kDLInt && d.bits == 8) return DType::i8;
      if (d.code == kDLUInt && d.bits == 8) return DType::u8;
      if (d.code == kDLBool && d.bits == 8) return DType::boolean;
    }
    throw py::type_error(text(op_, ": ", name_, " has a dtype that no kernel takes (DLPack code ", int(d.code),
                              ", bits ", int(d.bits), ")"));
  }
#endif
  [[noreturn]] void fail_type(const char* wanted) const {
    throw py::type_error(text(op_, ": ", name_, " must be ", wanted, ", got ", kDTypeNames[static_cast<int>(dtype_)]));
  }
  [[noreturn]] void fail_shape(const char* like, const std::string& wanted) const {
    throw py::value_error(text(op_, ": ", name_, " must be ", like, " = ", wanted, ", got ", shape_text()));
  }

  DLTensor t_{};
  const char *op_, *name_;
  py::object capsule_;
  DType dtype_ = DType::f32;
  bool present_ = false;
};

}  // namespace pf::bind
