// What ppo_loss, categorical_ppo_loss and normal_ppo_loss share: how the rollout's streams become tiles, what is summed
// over them, and how sums become loss and statistics. The loss of a tile itself is compiled once, in ppo_loss.inc.
#pragma once
#include "moments.h"
#include "../math/loss_totals.h"
#include "../math/surrogate.h"

namespace pf {
namespace PF_ISA {

constexpr int64_t kTile = 1024;  // long enough for the prefetcher, short enough for L1

// Everything that is summed over tokens; partials of blocks are merged in block order.
struct LossSums {
  LaneSum policy, value, entropy, kl, k3, log_ratio, low, high, dual, value_clipped, ratio, ratio2, count;
  double ratio_min = std::numeric_limits<double>::infinity(), ratio_max = -std::numeric_limits<double>::infinity();
  Moments returns, residuals;  // for the explained variance

  void merge(const LossSums& o) {
    policy.merge(o.policy), value.merge(o.value), entropy.merge(o.entropy), kl.merge(o.kl), k3.merge(o.k3);
    log_ratio.merge(o.log_ratio), low.merge(o.low), high.merge(o.high), dual.merge(o.dual);
    value_clipped.merge(o.value_clipped), ratio.merge(o.ratio), ratio2.merge(o.ratio2), count.merge(o.count);
    ratio_min = min_of(o.ratio_min, ratio_min), ratio_max = max_of(o.ratio_max, ratio_max);
    returns.merge(o.returns), residuals.merge(o.residuals);
  }
};

// Tiles of T; nullptr: absent. Inputs are readable, outputs writable, up to a whole number of vectors.
template <class T>
struct LossTile {
  int64_t n;
  const T *log_prob, *old_log_prob, *advantages, *values, *old_values, *returns, *entropy, *ref_log_prob,
      *rollout_log_prob, *mask, *weights;
  T *grad_log_prob, *grad_values, *grad_entropy;
  bool past_cache;  // the streams are longer than the cache: the next tile is asked for, gradients do not stay
};

// The loss of one tile: adds to `sums`, writes the gradients that the tile has room for.
template <class T>
void loss_tile(const LossTile<T>& t, const LossParams& p, const LossScale<T>& scale, LossSums& sums);

// Reads the rollout's tiles and says where gradients go; one per thread, on the stack.
template <class T>
struct LossBuffers {
  alignas(64) T in[10][kTile];
  alignas(64) T out[3][kTile];
  int64_t index[kTile];

  T* gradient(const Stream& s, int64_t first, int64_t n, T* scratch) const {
    return s.data ? tile_to_write(s, first, n, scratch) : nullptr;
  }
  void finish(const Stream& s, int64_t first, int64_t n, const T* tile, const T* scratch) const {
    if (tile && s.data) finish_tile(s, first, n, tile, scratch);
  }

  bool holds(const T* tile) const { return tile >= out[0] && tile < out[0] + sizeof(out) / sizeof(T); }

  LossTile<T> open(const LossArgs& a, int64_t first, int64_t n) {
    const int64_t* at = nullptr;
    if (a.index.data) {
      read(a.index, first, n, index);
      at = index;
    }
    LossTile<T> t{};
    t.n = n;
    t.old_log_prob = read_tile(a.old_log_prob, first, n, at, in[0]);
    t.advantages = read_tile(a.advantages, first, n, at, in[1]);
    t.old_values = read_tile(a.old_values, first, n, at, in[2]);
    t.returns = read_tile(a.returns, first, n, at, in[3]);
    t.ref_log_prob = read_tile(a.ref_log_prob, first, n, at, in[4]);
    t.rollout_log_prob = read_tile(a.rollout_log_prob, first, n, at, in[5]);
    t.mask = read_tile(a.mask, first, n, at, in[6]);
    t.weights = read_tile(a.weights, first, n, nullptr, in[7]);
    t.values = read_tile(a.values, first, n, nullptr, in[8]);
    t.entropy = read_tile(a.entropy, first, n, nullptr, in[9]);
    t.grad_values = gradient(a.grad_values, first, n, out[0]);
    t.grad_entropy = gradient(a.grad_entropy, first, n, out[1]);
    return t;
  }
  void close(const LossArgs& a, int64_t first, const LossTile<T>& t) const {
    finish(a.grad_values, first, t.n, t.grad_values, out[0]);
    finish(a.grad_entropy, first, t.n, t.grad_entropy, out[1]);
  }
};

// Partial sums of the fused losses: what the loss sums, and the first label that was refused.
struct RowLossSums {
  LossSums loss;
  Offence offence;
  void merge(const RowLossSums& o) {
    loss.merge(o.loss);
    if (offence.where < 0) offence = o.offence;
  }
};

constexpr int64_t kMaxBlocks = kMaxRowBlocks;

// A block is a whole number of tiles; how many there are depends on n alone.
inline int64_t block_size(int64_t n, int64_t tile, int64_t least) {
  const int64_t size = std::max((n + kMaxBlocks - 1) / kMaxBlocks, least);
  return (size + tile - 1) / tile * tile;
}

// Runs f(block, first, n, partial) over the tiles, in parallel over blocks, and merges the partials in order.
template <class Partial, class F>
inline Partial over_tiles(int64_t n, int64_t tile, int threads, F&& f) {
  const int64_t size = block_size(n, tile, 4096), blocks = (n + size - 1) / size;
  alignas(Partial) unsigned char storage[kMaxBlocks * sizeof(Partial)];  // started block by block: most calls have one
  Partial* partial = reinterpret_cast<Partial*>(storage);
  for (int64_t b = 0; b == 0 || b < blocks; ++b) new (partial + b) Partial;
  for_blocks(blocks, threads, [&](int64_t b) {
    const int64_t end = std::min(n, (b + 1) * size);
    for (int64_t i = b * size; i < end; i += tile) f(b, i, std::min(tile, end - i), partial[b]);
  });
  for (int64_t b = 1; b < blocks; ++b) partial[0].merge(partial[b]);
  return partial[0];
}

// Counts the valid elements and takes the moments of the advantages, where the loss needs either.
template <class T>
inline LossScale<T> loss_scale(const LossArgs& a) {
  const LossParams& p = a.params;
  Moments m;
  m.count = static_cast<double>(a.n);
  if (p.normalize_advantages || (a.mask.data && !a.sum)) {
    m = over_tiles<Moments>(a.n, kTile, a.threads, [&](int64_t, int64_t first, int64_t n, Moments& out) {
      alignas(64) T x[kTile], mask[kTile];
      int64_t index[kTile];
      const int64_t* at = nullptr;
      if (a.index.data) {
        read(a.index, first, n, index);
        at = index;
      }
      out.merge(tile_moments(read_tile(a.advantages, first, n, at, x), read_tile(a.mask, first, n, at, mask), n, out));
    });
  }
  return scale_of<T>(m, a.denominator, a.sum, p.normalize_advantages, p.advantage_ddof, p.advantage_eps);
}

template <class T>
inline void finish_loss(const LossArgs& a, const LossScale<T>& scale, const LossSums& s) {
  const LossParams& p = a.params;
  const LossTotals totals{
      s.policy.total(),    s.value.total(),  s.entropy.total(), s.kl.total(),   s.k3.total(),
      s.log_ratio.total(), s.low.total(),    s.high.total(),    s.dual.total(), s.value_clipped.total(),
      s.ratio.total(),     s.ratio2.total(), s.count.total(),   s.ratio_min,    s.ratio_max,
      s.returns,           s.residuals};
  double stat[kStatCount];
  const double loss =
      statistics(totals, scale.weight, a.values.data, p.kl != kNoKl, p.value_coef, p.entropy_coef, p.kl_coef, stat);
  *static_cast<T*>(a.loss) = static_cast<T>(loss);
  for (int i = 0; i < kStatCount; ++i) static_cast<T*>(a.stats)[i] = static_cast<T>(stat[i]);
}

}  // namespace PF_ISA
}  // namespace pf
