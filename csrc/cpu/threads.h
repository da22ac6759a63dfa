// Threads of a caller's own in place of OpenMP's.
#pragma once
#include <cstdint>

namespace pf {

// While it lives, kernels that this thread calls have their blocks of work done by `blocks`; nullptr: as ever.
class CallersThreads {
 public:
  using Blocks = void (*)(void* context, int threads, int64_t blocks, void (*work)(void*, int64_t), void* of_work);
  CallersThreads(Blocks blocks, void* context);
  ~CallersThreads();
  CallersThreads(const CallersThreads&) = delete;
};

}  // namespace pf
