// Discounted returns. float32 with a byte of `terminated`: 5 bytes read and 4 written a step.
#include "scan.cuh"

namespace pf {

cudaError_t discounted_returns(const ScanArgs& a, Launch& launch) {
  return PF_ISA::scan(a, launch, [](auto zero) { return PF_ISA::DiscountedReturns<decltype(zero)>{}; });
}

}  // namespace pf
