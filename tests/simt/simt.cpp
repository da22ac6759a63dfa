// Fibers, their schedule, and their meetings; see simt.h.
#include "simt.h"

#include <sys/mman.h>

#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define PF_ASAN 1
#else
#define PF_ASAN 0
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__x86_64__)
// Saves what a callee must keep, swaps stacks, takes it back.
asm(R"(
.text
.globl pf_simt_switch
.hidden pf_simt_switch
.type pf_simt_switch,@function
pf_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pf_simt_switch,.-pf_simt_switch
)");
extern "C" void pf_simt_switch(void** save, void* to);
#endif

namespace pf::simt {
namespace {

constexpr size_t kStack = size_t{1} << 17;
enum class State { ready, meeting, done };

struct Block;
struct Fiber {
  Block* block = nullptr;
  Index index;
  State state = State::done;
  Meeting kind{};
  unsigned mask = 0;
  uint64_t brought = 0, met[32] = {};
  char* stack = nullptr;
  void* fake_stack = nullptr;
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
};

struct Block {
  Index index;
  std::vector<Fiber*> threads;
  std::map<const void*, std::unique_ptr<char, decltype(&std::free)>> shared;
  size_t left = 0;  // threads that are not done
};

struct Machine {
  unsigned seed = 1;
  int residents = 3;
  Index block_size, grid_size;
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  std::vector<std::unique_ptr<Fiber>> pool;
  std::vector<Fiber*> unused;
  std::string complaint;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
#if defined(__x86_64__)
  void* sp = nullptr;
#else
  ucontext_t context;
#endif
  uint64_t random = 1;
  unsigned next(unsigned below) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>((random >> 33) % below);
  }
} machine;

void to_scheduler(bool for_good) {
  Fiber& f = *machine.current;
#if PF_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.fake_stack, machine.scheduler_bottom, machine.scheduler_size);
#else
  (void)for_good;
#endif
#if defined(__x86_64__)
  pf_simt_switch(&f.sp, machine.sp);
#else
  swapcontext(&f.context, &machine.context);
#endif
#if PF_ASAN
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& f) {
  machine.current = &f;
#if PF_ASAN
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, f.stack, kStack);
#endif
#if defined(__x86_64__)
  pf_simt_switch(&machine.sp, f.sp);
#else
  swapcontext(&machine.context, &f.context);
#endif
#if PF_ASAN
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

extern "C" void pf_simt_entry() {
#if PF_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
  (*machine.body)();
  Fiber& f = *machine.current;
  f.state = State::done;
  --f.block->left;
  to_scheduler(true);
  std::abort();
}

Fiber* take_fiber() {
  if (machine.unused.empty()) {
    auto f = std::make_unique<Fiber>();
    f->stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (f->stack == MAP_FAILED) std::abort();
    machine.unused.push_back(f.get());
    machine.pool.push_back(std::move(f));
  }
  Fiber* f = machine.unused.back();
  machine.unused.pop_back();
  f->fake_stack = nullptr;
#if PF_ASAN
  __asan_unpoison_memory_region(f->stack, kStack);
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f->stack + kStack - 64);
  *--top = nullptr;  // the entry never returns; its frame starts as after a call
  *--top = reinterpret_cast<void*>(&pf_simt_entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f->sp = top;
#else
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = kStack;
  f->context.uc_link = nullptr;
  makecontext(&f->context, reinterpret_cast<void (*)()>(&pf_simt_entry), 0);
#endif
  return f;
}

std::unique_ptr<Block> start(unsigned index) {
  auto block = std::make_unique<Block>();
  block->index.x = index;
  block->left = machine.block_size.x;
  for (unsigned t = 0; t < machine.block_size.x; ++t) {
    Fiber* f = take_fiber();
    f->block = block.get();
    f->index.x = t;
    f->state = State::ready;
    block->threads.push_back(f);
  }
  return block;
}

// Whether the meeting of which thread t of the block is one can end: then every one of its threads is ready again.
bool end_meeting(Block& b, size_t t) {
  const Fiber& first = *b.threads[t];
  size_t from = 0, to = b.threads.size();
  unsigned mask = ~0u;
  if (first.kind != Meeting::barrier) from = t / 32 * 32, to = std::min(from + 32, to), mask = first.mask;
  for (size_t i = from; i < to; ++i) {
    if (first.kind != Meeting::barrier && !(mask >> (i - from) & 1)) continue;
    const Fiber& f = *b.threads[i];
    if (f.state != State::meeting || f.kind != first.kind || f.mask != first.mask) return false;
  }
  for (size_t i = from; i < to; ++i) {
    if (first.kind != Meeting::barrier && !(mask >> (i - from) & 1)) continue;
    Fiber& f = *b.threads[i];
    f.state = State::ready;
    if (f.kind == Meeting::shuffle || f.kind == Meeting::vote) {
      for (size_t k = from; k < to; ++k) f.met[k - from] = b.threads[k]->brought;
    }
  }
  return true;
}

// Runs what can run of a block, once. Returns whether anything did.
bool step(Block& b) {
  bool ran = false;
  const size_t n = b.threads.size(), first = machine.next(static_cast<unsigned>(n)) / 32 * 32;  // any warp first
  for (size_t k = 0; k < n; ++k) {
    const size_t t = (first + k) % n;
    if (b.threads[t]->state == State::ready) to_fiber(*b.threads[t]), ran = true;
  }
  for (size_t t = 0; t < n; ++t) {
    if (b.threads[t]->state == State::meeting && end_meeting(b, t)) ran = true;
  }
  return ran;
}

void release(Block& b) {
  for (Fiber* f : b.threads) machine.unused.push_back(f);
}

}  // namespace

const Index& thread_index() { return machine.current->index; }
const Index& block_index() { return machine.current->block->index; }
const Index& block_size() { return machine.block_size; }
const Index& grid_size() { return machine.grid_size; }

uint64_t meet(Meeting kind, unsigned mask, uint64_t value, int of) {
  Fiber& f = *machine.current;
  f.kind = kind, f.mask = mask, f.brought = value, f.state = State::meeting;
  to_scheduler(false);
  return of < 0 ? 0 : f.met[of];
}
unsigned ballot(unsigned mask, bool on) {
  Fiber& f = *machine.current;
  f.kind = Meeting::vote, f.mask = mask, f.brought = on, f.state = State::meeting;
  to_scheduler(false);
  unsigned all = 0;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) all |= static_cast<unsigned>(f.met[i]) << i;
  }
  return all;
}
void pause() { to_scheduler(false); }

void* shared(const void* place, size_t bytes) {
  auto& all = machine.current->block->shared;
  auto found = all.find(place);
  if (found == all.end()) {
    char* memory = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    std::memset(memory, 0xff, bytes);  // NaN, or -1
#if PF_ASAN
    __asan_poison_memory_region(memory + (bytes + 7) / 8 * 8, (bytes + 63) / 64 * 64 - (bytes + 7) / 8 * 8);
#endif
    found = all.emplace(place, std::unique_ptr<char, decltype(&std::free)>(memory, &std::free)).first;
  }
  return found->second.get();
}

const char* complaint() { return machine.complaint.empty() ? nullptr : machine.complaint.c_str(); }
void set_schedule(unsigned seed, int residents) { machine.seed = seed, machine.residents = residents; }

cudaError_t run(unsigned grid, unsigned block, const std::function<void()>& thread) {
  if (grid == 0 || block == 0 || block > 1024 || block % 32 != 0) {
    machine.complaint = "a launch of " + std::to_string(grid) + " blocks of " + std::to_string(block) + " threads";
    return cudaErrorInvalidValue;
  }
  machine.complaint.clear();
  machine.random = machine.seed * 2654435761ull + 1;
  machine.block_size.x = block, machine.block_size.y = machine.block_size.z = 1;
  machine.grid_size.x = grid, machine.grid_size.y = machine.grid_size.z = 1;
  machine.body = &thread;
  const bool backwards = machine.seed % 2 == 0;  // a GPU promises no order either
  std::vector<std::unique_ptr<Block>> live;
  unsigned started = 0;
  int idle = 0;
  while (started < grid || !live.empty()) {
    while (started < grid && live.size() < static_cast<size_t>(machine.residents)) {
      live.push_back(start(backwards ? grid - 1 - started : started));
      ++started;
    }
    const size_t at = machine.next(static_cast<unsigned>(live.size()));
    Block& b = *live[at];
    const size_t before = b.left;
    bool alone = true;  // threads of this block wait for one another, and cannot
    const bool ran = step(b);
    for (const Fiber* f : b.threads) alone &= f->state != State::ready;
    if (b.left == 0) {
      release(b);
      live.erase(live.begin() + static_cast<long>(at));
      idle = 0;
      continue;
    }
    if (!ran && alone) {
      machine.complaint =
          "block " + std::to_string(b.index.x) + ": a barrier, shuffle or vote that not all of its threads reach";
    }
    idle = ran && b.left != before ? 0 : idle + 1;
    if (idle > 20'000'000 / static_cast<int>(block)) machine.complaint = "blocks wait for one another for ever";
    if (!machine.complaint.empty()) {
      for (auto& l : live) release(*l);
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace pf::simt
