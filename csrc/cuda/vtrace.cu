// V-trace. float32 with a byte of `terminated`: 13 bytes read and 8 written a step.
#include "scan.cuh"

namespace pf {

cudaError_t vtrace(const ScanArgs& a, Launch& launch) {
  return PF_ISA::scan(a, launch, [&](auto zero) {
    using T = decltype(zero);
    return PF_ISA::Vtrace<T>{static_cast<T>(a.rho_clip), static_cast<T>(a.c_clip)};
  });
}

}  // namespace pf
