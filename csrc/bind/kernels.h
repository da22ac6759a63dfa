// The kernels of a module as a table, for callers in C++ who have no Python at hand: the handlers of xla.cc.
#pragma once
#include <cstdint>
#include <string>

#include "../ops.h"

namespace pf::bind {

// What such a caller gives a kernel to run with, and what it gets back.
struct Given {
  const int64_t* appended = nullptr;                             // what a plan holds besides the arguments
  int threads = 1;                                               // CPU; and how it has blocks of work done by them:
  void (*blocks)(void* context, int threads, int64_t blocks, void (*work)(void*, int64_t), void* of_work) = nullptr;
  void* (*memory)(void* context, int64_t bytes) = nullptr;       // GPU: until what is queued on the stream is done
  void* stream = nullptr;
  void* context = nullptr;
  std::string error;                                             // what went wrong
};

struct Kernel {
  const char* op;
  int64_t size;                                // of its argument struct
  void (*run)(void* args, Given& given);       // args: with pointers in place
};

}  // namespace pf::bind
