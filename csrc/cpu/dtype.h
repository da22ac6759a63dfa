// float or double: what an op's entry chooses. float64 stops at the third level: its bits are the same there, and the
// fourth level takes half as long to compile.
#pragma once

namespace pf {
#if PF_LEVEL == 4
namespace v3 {
#define PF_DECLARE(op, Args) void op(const Args&);
PF_OPS(PF_DECLARE)
#undef PF_DECLARE
}  // namespace v3
#endif

namespace PF_ISA {

constexpr bool kHasDouble = PF_LEVEL != 4;

#if PF_LEVEL == 4
#define PF_DELEGATE_DOUBLE(op, args, is_double) \
  if (is_double) return v3::op(args)
#else
#define PF_DELEGATE_DOUBLE(op, args, is_double) static_cast<void>(0)
#endif

// f(double{}) or f(float{}).
template <class F>
PF_INLINE void by_dtype(bool is_double, F&& f) {
  if constexpr (kHasDouble) {
    if (is_double) return f(double{});
  }
  f(float{});
}

}  // namespace PF_ISA
}  // namespace pf
