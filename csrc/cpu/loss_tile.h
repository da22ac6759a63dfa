// The loss of one tile of tokens, its statistics and its gradients: the one place where ppo_loss, categorical_ppo_loss
// and normal_ppo_loss meet. A term is a loop of its own over data that lies in L1.
#pragma once
#include "moments.h"
#include "../math/kl.h"
#include "../math/value_loss.h"

namespace pf {
namespace PF_ISA {

constexpr int64_t kTile = 256;

// Everything that is summed over tokens; partials of blocks are merged in block order.
struct LossSums {
  double policy = 0, value = 0, entropy = 0, kl = 0, k3 = 0, log_ratio = 0, low = 0, high = 0, dual = 0,
         value_clipped = 0, ratio = 0, ratio2 = 0, count = 0;
  double ratio_min = std::numeric_limits<double>::infinity(), ratio_max = -std::numeric_limits<double>::infinity();
  Moments returns, residuals;

  void merge(const LossSums& o) {
    policy += o.policy, value += o.value, entropy += o.entropy, kl += o.kl, k3 += o.k3, log_ratio += o.log_ratio;
    low += o.low, high += o.high, dual += o.dual, value_clipped += o.value_clipped, ratio += o.ratio;
    ratio2 += o.ratio2, count += o.count;
    ratio_min = min_of(o.ratio_min, ratio_min), ratio_max = max_of(o.ratio_max, ratio_max);
    returns.merge(o.returns), residuals.merge(o.residuals);
  }
};

// What the whole batch must agree on before the first gradient is written.
template <class T>
struct LossScale {
  T weight;         // 1/denominator
  bool normalize;   // (A - shift)/divisor
  T shift, divisor;
};

// Tiles of T; nullptr: absent. Inputs are readable, outputs writable, up to a whole number of vectors.
template <class T>
struct LossTile {
  int64_t n;
  const T *log_prob, *old_log_prob, *advantages, *values, *old_values, *returns, *entropy, *ref_log_prob,
      *rollout_log_prob, *mask, *weights;
  T *grad_log_prob, *grad_values, *grad_entropy;
};

template <class T>
PF_INLINE Vec<T> count_of(const Mask<T>& m) {
  return select(m, Vec<T>(T(1)), Vec<T>(T(0)));
}

// Σ r² in double, for the rare tile in which a square leaves the range of float.
template <class T>
inline double squared_ratios(const LossTile<T>& t, const LossNumbers<T>& c) {
  double total = 0;
  for (int64_t i = 0; i < t.n; ++i) {
    if (t.mask && t.mask[i] == 0) continue;
    T d = t.log_prob[i] - t.old_log_prob[i];
    if (c.has_log_ratio_clamp) d = clamp_of(d, -c.log_ratio_clamp, c.log_ratio_clamp);
    total += std::exp(2.0 * static_cast<double>(d));
  }
  return total;
}

template <class T>
inline void policy_tile(const LossTile<T>& t, const LossParams& p, const LossNumbers<T>& c, const LossScale<T>& scale,
                        LossSums& sums) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1)), inf(std::numeric_limits<T>::infinity());
  V policy = zero, k3 = zero, log_ratio = zero, low = zero, high = zero, dual = zero, total = zero, total2 = zero,
    count = zero, smallest = inf, largest = -inf;
  for (int64_t i = 0; i < t.n; i += kLanes) {
    const auto valid = tile_valid<T>(t.mask, i, t.n);
    const V weight = t.weights ? select(valid, V::load(t.weights + i), zero) : one;
    V a = select(valid, V::load(t.advantages + i), zero);
    if (scale.normalize) a = (a - V(scale.shift)) / V(scale.divisor);
    const V old = V::load(t.old_log_prob + i);
    V d = select(valid, V::load(t.log_prob + i) - old, zero);
    auto alive = valid;
    if (c.has_log_ratio_clamp) {
      const V bound(c.log_ratio_clamp);
      alive = valid & !((d < -bound) | (d > bound));
      d = clamp_of(d, -bound, bound);
    }
    const V ratio = exp_of(d);
    auto s = surrogate(ratio, a, c);
    if (p.rollout_correction != kNoCorrection) {
      V rho = exp_of(old - V::load(t.rollout_log_prob + i));
      if (p.rollout_correction == kTis) {
        rho = min_of(rho, V(c.rollout_high));
      } else {
        rho = select((rho >= V(c.rollout_low)) & (rho <= V(c.rollout_high)), rho, zero);
      }
      s.loss = s.loss * rho, s.grad = s.grad * rho;
    }
    if (t.grad_log_prob) select(alive, s.grad * (weight * V(scale.weight)), zero).store(t.grad_log_prob + i);
    policy = policy + select(valid, s.loss * weight, zero);
    k3 = k3 + exp_minus_one_minus(d, ratio);
    log_ratio = log_ratio + d;
    const V r = select(valid, ratio, zero);
    total = total + r;
    total2 = total2 + r * r;
    count = count + count_of(valid);
    low = low + count_of(valid & (ratio < V(c.clip_lo)));
    high = high + count_of(valid & (ratio > V(c.clip_hi)));
    if (c.has_dual_clip) dual = dual + count_of(valid & s.dual_clipped);
    smallest = min_of(select(valid, ratio, inf), smallest);
    largest = max_of(select(valid, ratio, -inf), largest);
  }
  sums.policy += sum_of_lanes(policy), sums.k3 += sum_of_lanes(k3), sums.log_ratio += sum_of_lanes(log_ratio);
  sums.low += sum_of_lanes(low), sums.high += sum_of_lanes(high), sums.dual += sum_of_lanes(dual);
  sums.count += sum_of_lanes(count), sums.ratio += sum_of_lanes(total);
  const double squares = sum_of_lanes(total2);
  sums.ratio2 += std::isinf(squares) ? squared_ratios(t, c) : squares;
  sums.ratio_min = min_of(double(fold(smallest, [](T x, T y) { return min_of(x, y); })), sums.ratio_min);
  sums.ratio_max = max_of(double(fold(largest, [](T x, T y) { return max_of(x, y); })), sums.ratio_max);
}

template <class T>
inline void value_tile(const LossTile<T>& t, const LossParams& p, const LossNumbers<T>& c, const LossScale<T>& scale,
                       LossSums& sums, T* residuals) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1));
  V loss = zero, clipped = zero;
  const V coefficient(static_cast<T>(p.value_coef) * scale.weight);
  for (int64_t i = 0; i < t.n; i += kLanes) {
    const auto valid = tile_valid<T>(t.mask, i, t.n);
    const V weight = t.weights ? select(valid, V::load(t.weights + i), zero) : one;
    const V v = select(valid, V::load(t.values + i), zero), target = select(valid, V::load(t.returns + i), zero);
    const V old = t.old_values ? select(valid, V::load(t.old_values + i), zero) : v;
    const auto term = value_term(v, old, target, p, c);
    if (t.grad_values) select(valid, term.grad * (weight * coefficient), zero).store(t.grad_values + i);
    loss = loss + select(valid, term.loss * weight, zero);
    if (c.has_value_clip) clipped = clipped + count_of(valid & term.clipped);
    (target - v).store(residuals + i);
  }
  sums.value += sum_of_lanes(loss), sums.value_clipped += sum_of_lanes(clipped);
  sums.returns.merge(tile_moments(t.returns, t.mask, t.n));
  sums.residuals.merge(tile_moments<T>(residuals, t.mask, t.n));
}

template <class T>
inline void entropy_tile(const LossTile<T>& t, const LossParams& p, const LossScale<T>& scale, LossSums& sums) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1)), coefficient(-(static_cast<T>(p.entropy_coef) * scale.weight));
  V total = zero;
  for (int64_t i = 0; i < t.n; i += kLanes) {
    const auto valid = tile_valid<T>(t.mask, i, t.n);
    const V weight = t.weights ? select(valid, V::load(t.weights + i), zero) : one;
    total = total + select(valid, V::load(t.entropy + i) * weight, zero);
    if (t.grad_entropy) select(valid, weight * coefficient, zero).store(t.grad_entropy + i);
  }
  sums.entropy += sum_of_lanes(total);
}

template <class T>
inline void kl_tile(const LossTile<T>& t, const LossParams& p, const LossNumbers<T>& c, const LossScale<T>& scale,
                    LossSums& sums) {
  using V = Vec<T>;
  const V zero(T(0)), one(T(1)), coefficient(static_cast<T>(p.kl_coef) * scale.weight);
  V total = zero;
  for (int64_t i = 0; i < t.n; i += kLanes) {
    const auto valid = tile_valid<T>(t.mask, i, t.n);
    const V weight = t.weights ? select(valid, V::load(t.weights + i), zero) : one;
    V k, grad;
    kl_term(select(valid, V::load(t.ref_log_prob + i) - V::load(t.log_prob + i), zero), p, c, k, grad);
    total = total + select(valid, k * weight, zero);
    if (t.grad_log_prob && p.kl_coef != 0) {
      (V::load(t.grad_log_prob + i) + select(valid, grad * (weight * coefficient), zero)).store(t.grad_log_prob + i);
    }
  }
  sums.kl += sum_of_lanes(total);
}

// Reads the rollout's tiles and says where gradients go; one per thread, on the stack.
template <class T>
struct LossBuffers {
  alignas(64) T in[10][kTile];
  alignas(64) T out[3][kTile];
  int64_t index[kTile];

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
    t.weights = read_tile(a.weights, first, n, at, in[7]);
    t.values = read_tile(a.values, first, n, nullptr, in[8]);
    t.entropy = read_tile(a.entropy, first, n, nullptr, in[9]);
    if (a.grad_values.data) t.grad_values = tile_to_write(a.grad_values, first, n, out[0]);
    if (a.grad_entropy.data) t.grad_entropy = tile_to_write(a.grad_entropy, first, n, out[1]);
    return t;
  }
  void close(const LossArgs& a, int64_t first, const LossTile<T>& t) {
    if (t.grad_values) finish_tile(a.grad_values, first, t.n, t.grad_values, out[0]);
    if (t.grad_entropy) finish_tile(a.grad_entropy, first, t.n, t.grad_entropy, out[1]);
  }
};

constexpr int64_t kMaxBlocks = 64;

// A block is a whole number of tiles; how many there are depends on n alone.
inline int64_t block_size(int64_t n, int64_t tile, int64_t least) {
  const int64_t size = std::max((n + kMaxBlocks - 1) / kMaxBlocks, least);
  return (size + tile - 1) / tile * tile;
}

// Runs f(first, n, partial) over the tiles, in parallel over blocks, and merges the partials in order.
template <class Partial, class F>
inline Partial over_tiles(int64_t n, int64_t tile, int threads, F&& f) {
  Partial partial[kMaxBlocks];
  const int64_t size = block_size(n, tile, 16 * tile), blocks = (n + size - 1) / size;
  for_blocks(blocks, threads, [&](int64_t b) {
    const int64_t end = std::min(n, (b + 1) * size);
    for (int64_t i = b * size; i < end; i += tile) f(i, std::min(tile, end - i), partial[b]);
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
    m = over_tiles<Moments>(a.n, kTile, a.threads, [&](int64_t first, int64_t n, Moments& out) {
      alignas(64) T x[kTile], mask[kTile];
      int64_t index[kTile];
      const int64_t* at = nullptr;
      if (a.index.data) {
        read(a.index, first, n, index);
        at = index;
      }
      out.merge(tile_moments(read_tile(a.advantages, first, n, at, x), read_tile(a.mask, first, n, at, mask), n));
    });
  }
  LossScale<T> scale{};
  const bool given = a.denominator == a.denominator;
  const double denominator = given ? a.denominator : a.sum ? 1.0 : std::max(m.count, 1.0);
  scale.weight = static_cast<T>(1.0 / denominator);
  scale.normalize = p.normalize_advantages && m.count > p.advantage_ddof;
  if (scale.normalize) {
    scale.shift = static_cast<T>(m.mean);
    scale.divisor = static_cast<T>(std::sqrt(m.m2 / (m.count - p.advantage_ddof))) + static_cast<T>(p.advantage_eps);
  }
  return scale;
}

template <class T>
inline void finish_loss(const LossArgs& a, const LossScale<T>& scale, const LossSums& s) {
  const LossParams& p = a.params;
  const double w = scale.weight, n = std::max(s.count, 1.0);
  double stat[kStatCount];
  stat[k_policy_loss] = w * s.policy, stat[k_value_loss] = w * s.value;
  stat[k_entropy] = w * s.entropy, stat[k_kl] = w * s.kl;
  stat[k_approx_kl] = s.k3 / n, stat[k_old_approx_kl] = -s.log_ratio / n;
  stat[k_clip_fraction_low] = s.low / n, stat[k_clip_fraction_high] = s.high / n;
  stat[k_clip_fraction] = (s.low + s.high) / n;
  stat[k_dual_clip_fraction] = s.dual / n, stat[k_value_clip_fraction] = s.value_clipped / n;
  stat[k_ratio_mean] = s.ratio / n;
  stat[k_ratio_min] = s.count > 0 ? s.ratio_min : 0, stat[k_ratio_max] = s.count > 0 ? s.ratio_max : 0;
  stat[k_ess] = s.count > 0 ? s.ratio * (s.ratio / (n * s.ratio2)) : 0;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  stat[k_explained_variance] = s.returns.m2 > 0 ? 1.0 - s.residuals.m2 / s.returns.m2 : nan;
  double loss = stat[k_policy_loss];
  if (a.values.data) loss += p.value_coef * stat[k_value_loss];
  loss -= p.entropy_coef * stat[k_entropy];
  if (p.kl != kNoKl) loss += p.kl_coef * stat[k_kl];
  *static_cast<T*>(a.loss) = static_cast<T>(loss);
  for (int i = 0; i < kStatCount; ++i) static_cast<T*>(a.stats)[i] = static_cast<T>(stat[i]);
}

template <class T>
inline void loss_tile(const LossTile<T>& t, const LossParams& p, const LossNumbers<T>& c, const LossScale<T>& scale,
                      LossSums& sums) {
  policy_tile(t, p, c, scale, sums);
  if (t.values) {
    alignas(64) T residuals[kTile];
    value_tile(t, p, c, scale, sums, residuals);
  }
  if (t.entropy) entropy_tile(t, p, scale, sums);
  if (p.kl != kNoKl) kl_tile(t, p, c, scale, sums);
}

}  // namespace PF_ISA
}  // namespace pf
