// What the formulas of csrc/math need of a number, for plain float and double; csrc/cpu/vec.h gives the same for SIMD
// vectors. A formula is a template over V and never asks which it has.
#pragma once

#if defined(__CUDACC__)
#define PF_FN __host__ __device__ inline
#elif defined(PF_INLINE)
#define PF_FN PF_INLINE
#else
#define PF_FN inline __attribute__((always_inline))
#endif

namespace pf {
namespace PF_ISA {

template <class V>
struct ScalarOf {
  using type = typename V::Scalar;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};
template <class V>
using scalar_t = typename ScalarOf<V>::type;

#define PF_SCALAR(T)                                             \
  PF_FN T select(bool m, T a, T b) { return m ? a : b; }         \
  PF_FN T max_of(T a, T b) { return (a > b || a != a) ? a : b; } \
  PF_FN T min_of(T a, T b) { return (a < b || a != a) ? a : b; } \
  PF_FN T larger_or_second(T a, T b) { return a > b ? a : b; }   \
  PF_FN T smaller_or_second(T a, T b) { return a < b ? a : b; }  \
  PF_FN T abs_of(T a) { return a < 0 ? -a : (a == 0 ? T(0) : a); }
PF_SCALAR(float)
PF_SCALAR(double)
#undef PF_SCALAR

}  // namespace PF_ISA
}  // namespace pf
