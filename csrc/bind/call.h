// A call of an op as the bindings see it, on the CPU, (PF_CUDA) on an NVIDIA GPU, or (PF_PLAN) written down for later:
// where its tensors must lie, what its kernel is given to run with, and how what went wrong is said.
#pragma once
#include <dlpack/dlpack.h>
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "../ops.h"
#ifndef PF_CUDA
#define PF_CUDA 0
#endif
#ifndef PF_SIMT
#define PF_SIMT 0
#endif
#ifndef PF_PLAN
#define PF_PLAN 0
#endif
#if PF_PLAN
#include "plan.h"
#elif PF_CUDA
#include "../cuda/dispatch.h"
#else
#include "../cpu/dispatch.h"
#endif

namespace pf::bind {

namespace py = pybind11;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Name of the op, and the device of its first tensor, on which all others must be.
struct Op {
  const char* name;
  mutable int device = -1;
  mutable const DLPackExchangeAPI* api = nullptr;  // of the first tensor's library: it knows the current stream
  explicit Op(const char* name) : name(name) {}
};

#if PF_PLAN

constexpr bool kOnGpu = true;  // or will be: nobody knows yet what the tensors hold
using Resources = py::list;    // where the plan goes

class Labels {
 public:
  Labels(const Op&, const char*) {}
  Offence* at() const { return nullptr; }  // whoever runs the plan has a place for it
  bool refused() const { return false; }
  Offence found() const { return {}; }
};

template <class Args>
void run(const Op&, int64_t, const Args& args, Resources& plans, const Planned<Args>* op) {
  const std::vector<int64_t> words = plan_of(*op, args);
  plans.append(py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)));
}

#elif !PF_CUDA

constexpr bool kOnGpu = false;
constexpr DLDeviceType kDeviceType = kDLCPU;
using Resources = int;  // threads

inline std::string device_name(int) { return "the CPU"; }

// The first label that a kernel refused.
class Labels {
 public:
  Labels(const Op&, const char*) {}
  Offence* at() const { return &found_; }
  bool refused() const { return found_.where >= 0; }
  const Offence& found() const { return found_; }

 private:
  mutable Offence found_;
};

// Runs a kernel with the GIL released where it is long enough to be worth it.
template <class Args>
void run(const Op&, int64_t elements, Args& args, Resources threads, void (*kernel)(const Args&)) {
  if constexpr (requires { args.loss.threads; }) {
    args.loss.threads = threads;
  } else {
    args.threads = threads;
  }
  if (elements < 4096) return kernel(args);
  py::gil_scoped_release release;
  kernel(args);
}

#else

constexpr bool kOnGpu = true;
constexpr DLDeviceType kDeviceType = PF_SIMT ? kDLCPU : kDLCUDA;
using Resources = py::handle;  // the module ppo_fast._workspace

inline std::string device_name(int index) { return PF_SIMT ? "the CPU" : text("cuda:", index); }

// Labels that kernels refused, in memory that the GPU writes and the CPU reads: nobody waits. A slot for each op and
// argument; what is found there is said by the next call of any op.
struct Slot {
  const char *op, *argument;
};
constexpr int kSlots = 32;
inline Slot slots[kSlots];
inline Offence* reports = nullptr;  // [kSlots]

inline void raise_reported() {
  for (int i = 0; reports && i < kSlots; ++i) {
    volatile Offence& o = reports[i];
    if (o.where < 0) continue;
    const int64_t where = o.where, value = o.value;
    o.value = 0;
    o.where = -1;
    throw py::value_error(text(slots[i].op, ": ", slots[i].argument, " must be in range, got ", value, " at ", where,
                               PF_SIMT ? "" : " in an earlier call: a GPU says so late"));
  }
}

class Labels {
 public:
  Labels(const Op& op, const char* argument) {
    int i = 0;
    while (i < kSlots - 1 && slots[i].op && (slots[i].op != op.name || slots[i].argument != argument)) ++i;
    slots[i] = {op.name, argument};
    slot_ = i;
  }
  Offence* at() const { return reports ? reports + slot_ : nullptr; }
  bool refused() const { return false; }
  Offence found() const { return {}; }

 private:
  int slot_;
};

inline void* ask_for_memory(void* context, int64_t bytes);
inline unsigned* ask_for_ticket(void* context);

// One launch: memory comes from Python, where torch's allocator knows when it may be used again.
struct Asked {
  py::handle resources;
  int device;
  cudaStream_t stream;
  py::list kept;  // until everything is queued on the stream
};
inline void* ask_for_memory(void* context, int64_t bytes) {
  auto& asked = *static_cast<Asked*>(context);
  const py::object tensor = asked.resources.attr("allocate")(bytes, PF_SIMT ? "cpu" : "cuda", asked.device);
  asked.kept.append(tensor);
  return reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<intptr_t>());
}
inline unsigned* ask_for_ticket(void* context) {
  auto& asked = *static_cast<Asked*>(context);
  bool capturing = false;
#if !PF_SIMT
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(asked.stream, &status);
  capturing = status != cudaStreamCaptureStatusNone;
#endif
  const py::object tensor = asked.resources.attr("ticket")(PF_SIMT ? "cpu" : "cuda", asked.device,
                                                           reinterpret_cast<intptr_t>(asked.stream), capturing);
  asked.kept.append(tensor);
  return reinterpret_cast<unsigned*>(tensor.attr("data_ptr")().cast<intptr_t>());
}

#if PF_SIMT
inline cudaStream_t current_stream(const Op&, py::handle) { return nullptr; }
#else
inline cudaStream_t current_stream(const Op& op, py::handle resources) {
  void* stream = nullptr;
  if (op.api && op.api->current_work_stream) {
    if (op.api->current_work_stream(kDLCUDA, op.device, &stream) != 0) throw py::error_already_set();
    return static_cast<cudaStream_t>(stream);
  }
  return reinterpret_cast<cudaStream_t>(resources.attr("stream")(op.device).cast<intptr_t>());
}
#endif

#if PF_SIMT
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
struct DeviceGuard {
  int before = -1;
  explicit DeviceGuard(int wanted) {
    int now = wanted;
    if (cudaGetDevice(&now) == cudaSuccess && now != wanted && cudaSetDevice(wanted) == cudaSuccess) before = now;
  }
  ~DeviceGuard() {
    if (before >= 0) cudaSetDevice(before);
  }
};
#endif

template <class Args>
void run(const Op& op, int64_t, const Args& args, Resources resources, cudaError_t (*kernel)(const Args&, Launch&)) {
  raise_reported();
  const DeviceGuard guard(op.device);
  Asked asked{resources, op.device, current_stream(op, resources), py::list()};
  Launch launch{asked.stream, &asked, &ask_for_memory, &ask_for_ticket, 0};
  const cudaError_t error = kernel(args, launch);
  if (error != cudaSuccess) {
#if PF_SIMT
    throw std::runtime_error(text(op.name, ": ", simt::complaint()));
#else
    cudaGetLastError();  // not left for somebody else's call
    const bool image = error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion;
    const bool driver = error == cudaErrorInsufficientDriver;
    throw std::runtime_error(text(
        op.name, ": ", cudaGetErrorString(error), " on ", device_name(op.device),
        image    ? "; built for " PF_CUDA_ARCHITECTURES ": build it for this GPU (PPO_FAST_CUDA_ARCHITECTURES=90, say)"
        : driver ? "; the driver is older than the CUDA that this was built with: a newer driver, or an older nvcc"
                 : "; use_backend(\"triton\") or \"reference\" goes around"));
#endif
  }
  if (PF_SIMT) raise_reported();
}

#endif

}  // namespace pf::bind
