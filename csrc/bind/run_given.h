// The table of kernels.h for this flavour of the bindings: what stands here is what only Python looked after.
#pragma once
#include <new>
#include <vector>

#include "kernels.h"
#include "ops.h"
#if !PF_CUDA
#include "../cpu/threads.h"
#endif

namespace pf::bind {

#if PF_CUDA

template <class Args, cudaError_t (*kernel)(const Args&, Launch&)>
void run_given(const char* op, Args& args, Given& given) {
  if constexpr (requires { args.dist.nvec; }) args.dist.nvec = given.appended;
  Launch launch{static_cast<cudaStream_t>(given.stream), &given, nullptr, nullptr, 0};
  launch.memory = [](void* context, int64_t bytes) {
    auto& given = *static_cast<Given*>(context);
    void* at = given.memory(given.context, bytes);
    if (!at) throw std::bad_alloc();
    return at;
  };
  launch.ticket = [](void* context) {  // one of its own, so that nothing has to be kept between calls
    auto& given = *static_cast<Given*>(context);
    void* at = given.memory(given.context, sizeof(unsigned));
    if (!at) throw std::bad_alloc();
#if PF_SIMT
    *static_cast<unsigned*>(at) = 0;
#else
    cudaMemsetAsync(at, 0, sizeof(unsigned), static_cast<cudaStream_t>(given.stream));
#endif
    return static_cast<unsigned*>(at);
  };
  try {
    const cudaError_t error = kernel(args, launch);
    if (error == cudaSuccess) return;
#if PF_SIMT
    given.error = text(op, ": ", simt::complaint());
#else
    cudaGetLastError();  // not left for somebody else's call
    given.error = text(op, ": ", cudaGetErrorString(error), "; built for " PF_CUDA_ARCHITECTURES);
#endif
  } catch (const std::bad_alloc&) {
    given.error = text(op, ": XLA has no memory left for partial results");
  }
}

#else

template <class Args, void (*kernel)(const Args&)>
void run_given(const char* op, Args& args, Given& given) {
  Offence label;
  int64_t missing;
  std::vector<double> sums;
  const auto out_of_range = [&](const char* name, const Offence& o) {
    if (o.where < 0) return false;
    given.error = text(op, ": ", name, " must be in range, got ", o.value, " at ", o.where);
    return true;
  };
  if constexpr (requires { args.loss.threads; }) {
    const LossArgs& loss = args.loss;
    args.loss.threads = given.threads;
    if (loss.index.data && out_of_range("index", LossInputs::first_outside(loss.index, loss.n, loss.stored))) return;
  } else {
    args.threads = given.threads;
  }
  if constexpr (requires { args.dist.nvec; }) args.dist.nvec = given.appended;
  if constexpr (requires { args.missing; }) args.missing = &missing;
  if constexpr (requires { args.bounds; }) {
    const std::string what = args.bounds ? complaint_of_bounds(args) : "";
    if (!what.empty()) return void(given.error = text(op, ": cu_seqlens must ", what));
  }
  if constexpr (requires { args.offence; }) args.offence = &label;
  if constexpr (requires { args.sums; }) {
    if (args.d_log_std.lead.data && args.d_log_std.lead.ndim == 0) {  // of one that all rows share
      sums.resize(kMaxRowBlocks * args.dist.mean.width);
      args.sums = sums.data();
    }
  }
  const CallersThreads threads(given.blocks, given.context);
  kernel(args);
  out_of_range("actions", label);
}

#endif

inline const Kernel kKernels[] = {
#define X(op, Args)   \
  {#op, sizeof(Args), \
   [](void* args, Given& given) { run_given<Args, &pf::op>(#op, *static_cast<Args*>(args), given); }},
    PF_OPS(X)
#undef X
};

}  // namespace pf::bind
