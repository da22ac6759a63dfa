#include "parallel.h"

#include <pthread.h>

#include <atomic>

namespace pf {
namespace {

std::atomic<bool> pool_used{false};  // this process, or one that it was forked from before, started the pool
std::atomic<bool> forked_child{false};

const int registered = pthread_atfork(nullptr, nullptr, [] { forked_child = pool_used.load(); });

}  // namespace

void run_blocks(int64_t blocks, int threads, void (*work)(void*, int64_t), void* context) {
  if (threads > blocks) threads = static_cast<int>(blocks);
  if (threads <= 1 || forked_child) {
    for (int64_t b = 0; b < blocks; ++b) work(context, b);
    return;
  }
  pool_used = true;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t b = 0; b < blocks; ++b) work(context, b);
}

}  // namespace pf
