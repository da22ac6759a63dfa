// A call written down: the arguments of a kernel as numbers, with the number of a buffer where a pointer belongs. Made
// when a program is traced, when shapes and dtypes are known; run when it runs, by the handlers of xla.cc.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../ops.h"

namespace pf {

enum OpIndex {
#define X(op, Args) kOp_##op,
  PF_OPS(X)
#undef X
      kOpCount
};

// In place of a kernel: which op it is. `&pf::gae` has a meaning in every flavour of the bindings.
template <class Args>
struct Planned {
  OpIndex op;
};
#define X(op, Args) inline constexpr Planned<Args> op{kOp_##op};
PF_OPS(X)
#undef X

}  // namespace pf

namespace pf::bind {

// Upper bits of no address, and of no number that a caller gives: a signalling NaN.
constexpr int64_t kBufferTag = 0x7FF4504600000000;
inline void* tagged(int64_t buffer) { return reinterpret_cast<void*>(kBufferTag | buffer); }

// [op, words of args, pointers, numbers appended; then (word, buffer) of each pointer, the words, the numbers]
constexpr int kPlanHead = 4;

template <class Args>
std::vector<int64_t> plan_of(Planned<Args> op, Args args) {
  static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) % sizeof(int64_t) == 0);
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
  __builtin_clear_padding(&args);  // the same call is the same program, for XLA's cache
#endif
#endif
  std::vector<int64_t> words(sizeof(Args) / sizeof(int64_t)), appended;
  if constexpr (requires { args.dist.nvec; }) {
    appended.assign(args.dist.nvec, args.dist.nvec + args.dist.actions.width);
    args.dist.nvec = nullptr;
  }
  if constexpr (requires { args.missing; }) args.missing = nullptr;
  std::memcpy(words.data(), &args, sizeof(Args));
  std::vector<int64_t> plan{op.op, static_cast<int64_t>(words.size()), 0, static_cast<int64_t>(appended.size())};
  for (size_t i = 0; i < words.size(); ++i) {
    if ((words[i] & ~int64_t{0xFFFF}) != kBufferTag) continue;
    plan.insert(plan.end(), {static_cast<int64_t>(i), words[i] & 0xFFFF});
    words[i] = 0;
    ++plan[2];
  }
  plan.insert(plan.end(), words.begin(), words.end());
  plan.insert(plan.end(), appended.begin(), appended.end());
  return plan;
}

}  // namespace pf::bind
