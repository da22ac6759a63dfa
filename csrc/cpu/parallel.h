// Work in blocks whose number and borders depend on the problem only, never on the threads: same bits on 1 or 64.
#pragma once
#include <cstdint>

namespace pf {

// Calls work(context, block) for every block in [0, blocks), on up to `threads` threads of the OpenMP pool that torch
// uses too. In a forked child whose parent had threads it stays on the calling thread: the pool did not survive.
void run_blocks(int64_t blocks, int threads, void (*work)(void*, int64_t), void* context);

template <class F>
inline void for_blocks(int64_t blocks, int threads, F&& f) {
  run_blocks(blocks, threads, [](void* context, int64_t block) { (*static_cast<F*>(context))(block); }, &f);
}

}  // namespace pf
