// Logits to loss, statistics and gradients in one launch. Rows give log-prob and entropy, then every lane has the loss
// of a row of its own, whose gradient goes back into the logits while they are in shared memory or in cache. A launch
// before it counts, only where the loss needs the number of valid tokens or the moments of their advantages. Bytes a
// row, float32: 8·A, and 4 for each stream; [65536, 18] with four streams: 10.5 MB, 3.5 µs at 3.0 TB/s.
#include "categorical.cuh"
#include "loss.cuh"

namespace pf {
namespace PF_ISA {
namespace {

template <class T, class S>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    staged_kernel(const __grid_constant__ CategoricalPpoLossArgs args, T inverse, bool simple,
                  const CountedSums* counted, int n_counted, LossSums* partials, unsigned* ticket) {
  PF_SHARED(StagedRows<T>, staged);
  PF_SHARED(int64_t[kThreads], mask_rows);
  const LossArgs& a = args.loss;
  const Categorical& dist = args.dist;
  const int width = static_cast<int>(dist.logits.width);
  const auto mask_row = [&](int row) { return mask_rows[row]; };
  const LossSetup<T> setup = set_up<T>(a, true, counted, n_counted);
  TokenSums<T> sums;
  over_tiles(a.n, [&](int64_t first, int rows) {
    const int64_t i = first + threadIdx.x;
    const bool there = static_cast<int>(threadIdx.x) < rows;
    staged.template read<S>(dist.logits, first, rows);
    if (dist.action_mask.lead.data) {
      mask_rows[threadIdx.x] = there ? gathered(a.index, i, a.stored, nullptr) : -1;
      __syncthreads();
      staged.mask(dist.action_mask, rows, mask_row);
    }
    __syncthreads();
    if (there) {
      RowToken<T> token;
      token.read(a, i, a.index_offence, simple);
      const int action = token.on[0] ? action_of(dist, i, token.at, args.offence) : -1;
      const CategoricalRow<T> row = staged.forward(0, width, action, inverse);
      const TokenGradients<T> grad = token.loss(row.log_prob, row.entropy, setup, sums);
      if (a.grad_values.data) put(a.grad_values, i, grad.value);
      if (args.d_logits.lead.data) {
        staged.backward(0, width, LogitSlope<T>(row, inverse, action, grad.log_prob, grad.entropy));
      }
    }
    __syncthreads();
    if (args.d_logits.lead.data) {
      staged.template write<S>(args.d_logits, dist.action_mask, first, rows, mask_row);
      __syncthreads();
    }
  });
  finish_loss(a, setup, sums, partials, ticket);
}

// A warp has `tile` rows, a multiple of its groups: they give log-prob and entropy one after the other, then lane k has
// row k, then they give their gradients one after the other, for which the logits come from the cache.
template <int kLanes, class T, class S>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    group_kernel(const __grid_constant__ CategoricalPpoLossArgs args, T inverse, bool simple, int tile,
                 const CountedSums* counted, int n_counted, LossSums* partials, unsigned* ticket) {
  constexpr int kGroups = kWarp / kLanes;
  PF_SHARED(LossSetup<T>, setup);
  PF_SHARED(TokenSums<T>[kThreads], all_sums);  // registers are for logits
  const LossArgs& a = args.loss;
  const Categorical& dist = args.dist;
  {
    const LossSetup<T> found = set_up<T>(a, true, counted, n_counted);
    if (threadIdx.x == 0) setup = found;
    all_sums[threadIdx.x] = TokenSums<T>();
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp, group = lane / kLanes;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps * tile;
  for (int64_t first = warp * tile; first < a.n; first += step) {
    const int64_t i = first + lane, left = a.n - first;
    const int rows = static_cast<int>(left < tile ? left : int64_t{tile});
    const bool there = lane < rows;
    int64_t at = -1;
    int action = -1;
    if (there) {
      at = gathered(a.index, i, a.stored, a.index_offence);
      bool on[1] = {false};
      if (at >= 0) read_mask<false>(a.mask, i, a.n, at, on);
      if (on[0]) action = action_of(dist, i, at, args.offence);
    }
    // The logits of the group's row among those from k on; of none at all, those of the first row, unread.
    const auto line_of = [&](int k) {
      const int row = k + group;
      const int64_t mask_row = __shfl_sync(kAllLanes, at, row);
      return Line<T, S>(dist.logits, dist.action_mask, row < rows ? first + row : first, mask_row < 0 ? 0 : mask_row);
    };
    CategoricalRow<T> mine;
#pragma unroll 1
    for (int k = 0; k < rows; k += kGroups) {
      const CategoricalRow<T> row =
          row_of_group<kLanes>(line_of(k), __shfl_sync(kAllLanes, action, k + group), inverse);
      const int from = (lane - k) % kGroups * kLanes;
      const CategoricalRow<T> seen = from_lane(row, from < 0 ? 0 : from);
      if (lane >= k && lane < k + kGroups) mine = seen;
    }
    TokenGradients<T> grad{};
    if (there) {
      RowToken<T> token;
      token.read(a, i, nullptr, simple);
      TokenSums<T> sums = all_sums[threadIdx.x];
      grad = token.loss(mine.log_prob, mine.entropy, setup, sums);
      all_sums[threadIdx.x] = sums;
      if (a.grad_values.data) put(a.grad_values, i, grad.value);
    }
    if (!args.d_logits.lead.data) continue;
#pragma unroll 1
    for (int k = 0; k < rows; k += kGroups) {
      const int row = k + group;
      const Line<T, S> line = line_of(k);
      const LogitSlope<T> slope(from_lane(mine, row), inverse, __shfl_sync(kAllLanes, action, row),
                                __shfl_sync(kAllLanes, grad.log_prob, row), __shfl_sync(kAllLanes, grad.entropy, row));
      if (row < rows)
        write_slopes<kLanes>(line, args.d_logits, offset_of(args.d_logits.lead, first + row), slope, lane % kLanes, -1);
    }
  }
  finish_loss(a, setup, all_sums[threadIdx.x], partials, ticket);
}

template <class T, class S>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    block_kernel(const __grid_constant__ CategoricalPpoLossArgs args, T inverse, const CountedSums* counted,
                 int n_counted, LossSums* partials, unsigned* ticket) {
  PF_SHARED(LossSetup<T>, setup);
  PF_SHARED(TokenSums<T>, sums);
  PF_SHARED(TokenGradients<T>, grad);
  const LossArgs& a = args.loss;
  const Categorical& dist = args.dist;
  const bool leads = threadIdx.x == 0;
  {
    const LossSetup<T> found = set_up<T>(a, true, counted, n_counted);
    if (leads) setup = found, sums = TokenSums<T>();
  }
  __syncthreads();
  for (int64_t i = blockIdx.x; i < a.n; i += gridDim.x) {
    const int64_t at = gathered(a.index, i, a.stored, leads ? a.index_offence : nullptr);
    bool on[1] = {false};
    if (at >= 0) read_mask<false>(a.mask, i, a.n, at, on);
    const int action = on[0] ? action_of(dist, i, at, leads ? args.offence : nullptr) : -1;
    const Line<T, S> line(dist.logits, dist.action_mask, i, at < 0 ? 0 : at);
    const CategoricalRow<T> row = row_of_group<kThreads>(line, action, inverse);
    if (leads) {
      RowToken<T> token;
      token.read(a, i, nullptr, false);
      grad = token.loss(row.log_prob, row.entropy, setup, sums);
      if (a.grad_values.data) put(a.grad_values, i, grad.value);
    }
    __syncthreads();
    if (args.d_logits.lead.data) {
      const LogitSlope<T> slope(row, inverse, action, grad.log_prob, grad.entropy);
      write_slopes<kThreads>(line, args.d_logits, offset_of(args.d_logits.lead, i), slope,
                             static_cast<int>(threadIdx.x), -1);
    }
  }
  finish_loss(a, setup, leads ? sums : TokenSums<T>(), partials, ticket);
}

// Rows of a warp: as many as stay in the nearest cache until their gradient is due, fewer where not every warp would
// have some.
inline int rows_of_warp(int64_t n, int64_t width, int groups) {
  int64_t rows = 2048 / width, share = n / (kMostBlocks * kWarps);
  if (rows > share) rows = share;
  int tile = groups;
  while (tile < kWarp && 2 * tile <= rows) tile *= 2;
  return tile;
}

}  // namespace
}  // namespace PF_ISA

cudaError_t categorical_ppo_loss(const CategoricalPpoLossArgs& args, Launch& launch) {
  using namespace PF_ISA;
  const LossArgs& a = args.loss;
  const Rows& z = args.dist.logits;
  const Rows& mask = args.dist.action_mask;
  const bool wanted = args.d_logits.lead.data;
  const bool plain = is_plain(z, mask, a.is_double) && (!wanted || (is_alike(z, args.d_logits) && !mask.lead.data));
  return by_logits<false>(a.is_double, plain, z.lead.dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    CountedSums* counted;
    int n_counted;
    if (const cudaError_t e = queue_counts<T>(a, launch, counted, n_counted); e != cudaSuccess) return e;
    auto* partials = launch.allocate<LossSums>(kMostBlocks);
    unsigned* ticket = launch.ticket(launch.context);
    const T inverse = inverse_of(static_cast<T>(args.dist.temperature_value));
    const bool simple = has_simple_streams(a);
    return by_width<T>(z.width, [&](auto lanes) {
      if constexpr (lanes() == 1) {
        return start(&staged_kernel<T, S>, few_blocks(blocks_of_tiles(a.n)), kThreads, launch.stream, args, inverse,
                     simple, counted, n_counted, partials, ticket);
      } else if constexpr (lanes() == kThreads) {
        return start(&block_kernel<T, S>, few_blocks(a.n), kThreads, launch.stream, args, inverse, counted, n_counted,
                     partials, ticket);
      } else {
        const int tile = rows_of_warp(a.n, z.width, kWarp / lanes());
        const int64_t blocks = few_blocks((a.n + kWarps * tile - 1) / (kWarps * tile));
        return start(&group_kernel<lanes(), T, S>, blocks, kThreads, launch.stream, args, inverse, simple, tile,
                     counted, n_counted, partials, ticket);
      }
    });
  });
}

}  // namespace pf
