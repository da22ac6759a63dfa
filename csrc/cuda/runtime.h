// CUDA's runtime; or, with PF_SIMT, the harness that runs the same sources on a CPU (tests/simt/simt.h).
#pragma once
#ifndef PF_SIMT
#define PF_SIMT 0
#endif
#if PF_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>
#include <tuple>
#include <utility>

namespace pf {

// Queues kernel<<<blocks, threads, 0, stream>>>(args...) and returns this launch's own error.
template <class... P, class... A>
inline cudaError_t start(void (*kernel)(P...), int64_t blocks, int threads, cudaStream_t stream, const A&... args) {
  if (blocks == 0) return cudaSuccess;
  std::tuple<std::decay_t<P>...> held(args...);
#if PF_SIMT
  (void)stream;
  return simt::run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { std::apply(kernel, held); });
#else
  return std::apply([&](auto&... x) {
    void* pointers[] = {static_cast<void*>(&x)...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                            dim3(static_cast<unsigned>(threads)), pointers, 0, stream);
  }, held);
#endif
}

}  // namespace pf

// Shared memory of a block, without a constructor: PF_SHARED(float[256], x) or PF_SHARED(Pieces, pieces).
#if PF_SIMT
#define PF_SHARED(Type, name)                        \
  static const char name##_place = 0;                \
  using name##_type = std::remove_reference_t<Type>; \
  auto& name = *static_cast<name##_type*>(pf::simt::shared(&name##_place, sizeof(name##_type)))
#define PF_PAUSE() pf::simt::pause()
#else
#define PF_SHARED(Type, name)                                             \
  using name##_type = Type;                                               \
  __shared__ alignas(16) unsigned char name##_bytes[sizeof(name##_type)]; \
  auto& name = *reinterpret_cast<name##_type*>(name##_bytes)
#define PF_PAUSE() __nanosleep(20)
#endif
