// Which instruction set runs: the best that the processor has, or the one that PPO_FAST_CPU names.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pf {

#define PF_DECLARE(op, Args) void op(const Args&);
namespace base {
PF_OPS(PF_DECLARE)
}
#if PF_X86
namespace v3 {
PF_OPS(PF_DECLARE)
}
namespace v4 {
PF_OPS(PF_DECLARE)
}
#endif
#undef PF_DECLARE

namespace {

int best_level() {
#if PF_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 4;
  if (__builtin_cpu_supports("x86-64-v3")) return 3;
#endif
  return 0;
}

int level = -1;

}  // namespace

const char* isa_name(int l) { return l == 4 ? "v4" : l == 3 ? "v3" : "base"; }

int isa() { return level; }

bool set_isa(const char* name) {
  const int best = best_level();
  if (!name || !*name) {
    level = best;
    return true;
  }
  for (int l : {0, 3, 4}) {
    if (std::strcmp(name, isa_name(l)) == 0 && l <= best) {
      level = l;
      return true;
    }
  }
  return false;
}

#if PF_X86
#define PF_DEFINE(op, Args)              \
  void op(const Args& args) {            \
    if (level == 4) return v4::op(args); \
    if (level == 3) return v3::op(args); \
    base::op(args);                      \
  }
#else
#define PF_DEFINE(op, Args) \
  void op(const Args& args) { base::op(args); }
#endif
PF_OPS(PF_DEFINE)
#undef PF_DEFINE

}  // namespace pf
