#pragma once
#include "../ops.h"
#include "runtime.h"

namespace pf {

// What a launcher runs with. It queues kernels on the stream and returns: it allocates by asking and waits for nothing.
struct Launch {
  cudaStream_t stream;
  void* context;
  void* (*memory)(void* context, int64_t bytes);  // uninitialised; its own until what is queued here is done
  unsigned* (*ticket)(void* context);             // a counter that is 0, and 0 again when the kernel is done
  int processors;                                 // multiprocessors; 0: not asked yet

  template <class T>
  T* allocate(int64_t n) {
    return static_cast<T*>(memory(context, n * static_cast<int64_t>(sizeof(T))));
  }
};

#define PF_DECLARE(op, Args) cudaError_t op(const Args&, Launch&);
PF_OPS(PF_DECLARE)
PF_DECLARE(scale, ScaleArgs)
#undef PF_DECLARE

}  // namespace pf
