// Log-prob and entropy of diagonal normals: mean, actions and log_std are read once a direction.
// Bytes a row, float32, shared log_std: 8·D + 8 forward, 12·D + 8 backward; [1048576, 6]: 59 MB and 84 MB, 20 µs and
// 28 µs at 3.0 TB/s.
#include "normal.cuh"

namespace pf {
namespace PF_ISA {
namespace {

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    forward_kernel(const __grid_constant__ NormalRows d, int64_t n, T* log_prob, T* entropy) {
  PF_SHARED(NormalTile<T>, tile);
  over_tiles(n, [&](int64_t first, int rows) {
    const auto row = normal_forward<kPlain>(d, tile, first, rows, [&](int row) { return first + row; });
    if (static_cast<int>(threadIdx.x) >= rows) return;
    log_prob[first + threadIdx.x] = row.log_prob;
    if (entropy) entropy[first + threadIdx.x] = row.entropy;
  });
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    backward_kernel(const __grid_constant__ NormalRows d, int64_t n, const __grid_constant__ Stream d_log_prob,
                    const __grid_constant__ Stream d_entropy, unsigned* ticket) {
  PF_SHARED(NormalTile<T>, tile);
  clear_columns<T>(d);
  over_tiles(n, [&](int64_t first, int rows) {
    if (static_cast<int>(threadIdx.x) < rows) {
      const int64_t i = first + threadIdx.x;
      set_gradients(d, tile, element_or_0<T>(d_log_prob, i), element_or_0<T>(d_entropy, i));
    }
    normal_backward<kPlain>(d, tile, first, rows, [&](int row) { return first + row; });
  });
  if (d.sums_rows && is_last_block(ticket)) {
    write_sums_of_columns(d.of_columns, static_cast<int>(gridDim.x), d.d_log_std);
  }
}

// f(T{}, whether plain, as a constant).
template <class F>
inline cudaError_t by_kind(bool is_double, const NormalRows& d, F&& f) {
  if (is_double) return f(double{}, std::false_type{});
  return is_plain(d) ? f(float{}, std::true_type{}) : f(float{}, std::false_type{});
}

}  // namespace
}  // namespace PF_ISA

cudaError_t normal_log_prob(const NormalLogProbArgs& a, Launch& launch) {
  using namespace PF_ISA;
  const int64_t blocks = blocks_of_tiles(a.n);
  const NormalRows d = normal_rows(a.dist, Rows{}, Rows{}, blocks, launch);
  return by_kind(a.is_double, d, [&](auto t, auto plain) {
    using T = decltype(t);
    return start(&forward_kernel<T, plain()>, blocks, kThreads, launch.stream, d, a.n, static_cast<T*>(a.log_prob),
                 static_cast<T*>(a.entropy));
  });
}

cudaError_t normal_log_prob_backward(const NormalLogProbBackwardArgs& a, Launch& launch) {
  using namespace PF_ISA;
  const int64_t blocks = few_blocks(blocks_of_tiles(a.n));
  const NormalRows d = normal_rows(a.dist, a.d_mean, a.d_log_std, blocks, launch);
  unsigned* ticket = d.sums_rows ? launch.ticket(launch.context) : nullptr;
  return by_kind(a.is_double, d, [&](auto t, auto plain) {
    return start(&backward_kernel<decltype(t), plain()>, blocks, kThreads, launch.stream, d, a.n, a.d_log_prob,
                 a.d_entropy, ticket);
  });
}

}  // namespace pf
