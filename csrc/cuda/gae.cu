// Generalised advantage estimation. float32 with a byte of `terminated`: 9 bytes read and 8 written a step, and with
// moments 32 written and read a block.
#include "scan.cuh"

namespace pf {

cudaError_t gae(const ScanArgs& a, Launch& launch) {
  return PF_ISA::scan(a, launch, [](auto zero) { return PF_ISA::Gae<decltype(zero)>{}; });
}

}  // namespace pf
