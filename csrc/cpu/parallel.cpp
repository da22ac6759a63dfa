#include "parallel.h"

#include <pthread.h>

#include <atomic>

#include "threads.h"

namespace pf {
namespace {

std::atomic<bool> pool_used{false};  // this process, or one that it was forked from before, started the pool
std::atomic<bool> forked_child{false};

thread_local CallersThreads::Blocks callers_blocks = nullptr;
thread_local void* callers_context = nullptr;

const int registered = pthread_atfork(nullptr, nullptr, [] { forked_child = pool_used.load(); });

}  // namespace

CallersThreads::CallersThreads(Blocks blocks, void* context) {
  callers_blocks = blocks;
  callers_context = context;
}
CallersThreads::~CallersThreads() { callers_blocks = nullptr; }

void run_blocks(int64_t blocks, int threads, void (*work)(void*, int64_t), void* context) {
  if (threads > blocks) threads = static_cast<int>(blocks);
  if (threads > 1 && callers_blocks) return callers_blocks(callers_context, threads, blocks, work, context);
  if (threads <= 1 || forked_child) {
    for (int64_t b = 0; b < blocks; ++b) work(context, b);
    return;
  }
  pool_used = true;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t b = 0; b < blocks; ++b) work(context, b);
}

}  // namespace pf
