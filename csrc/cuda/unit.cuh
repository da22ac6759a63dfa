// What every .cu file starts with: the formulas of csrc/math for plain numbers, on the device.
#pragma once
#include "dispatch.h"

#define PF_ISA cuda
#include "../math/number.h"
#define PF_DEV __device__ __forceinline__

namespace pf {
namespace PF_ISA {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// f(double{}) or f(float{}), on the host.
template <class F>
inline cudaError_t by_dtype(bool is_double, F&& f) {
  return is_double ? f(double{}) : f(float{});
}

}  // namespace PF_ISA
}  // namespace pf
