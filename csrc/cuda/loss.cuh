// The loss of one token from its log-prob, with everything that is summed over tokens: what ppo_loss,
// categorical_ppo_loss and normal_ppo_loss share.
#pragma once
#include <cstddef>

#include "streams.cuh"
#include "../math/elementary.h"
#include "../math/kl.h"
#include "../math/loss_totals.h"
#include "../math/surrogate.h"
#include "../math/value_loss.h"

namespace pf {
namespace PF_ISA {

struct LossSums {
  double policy = 0, value = 0, entropy = 0, kl = 0, k3 = 0, log_ratio = 0, low = 0, high = 0, dual = 0,
         value_clipped = 0, ratio = 0, ratio2 = 0, count = 0;
  double ratio_min = std::numeric_limits<double>::infinity(), ratio_max = -std::numeric_limits<double>::infinity();
  ShiftedSums returns, residuals;

  PF_DEV void merge(const LossSums& o) {
    returns.merge(count, o.returns, o.count), residuals.merge(count, o.residuals, o.count);
    policy += o.policy, value += o.value, entropy += o.entropy, kl += o.kl, k3 += o.k3, log_ratio += o.log_ratio;
    low += o.low, high += o.high, dual += o.dual, value_clipped += o.value_clipped, ratio += o.ratio;
    ratio2 += o.ratio2, count += o.count;
    ratio_min = smaller_or_second(o.ratio_min, ratio_min), ratio_max = larger_or_second(o.ratio_max, ratio_max);
  }
};

// One thread's, in as few registers as will do: counts as integers, extremes and shifts in the compute type.
template <class T>
struct TokenSums {
  double policy = 0, value = 0, entropy = 0, kl = 0, k3 = 0, log_ratio = 0, ratio = 0, ratio2 = 0;
  int count = 0, low = 0, high = 0, dual = 0, value_clipped = 0;
  T ratio_min = std::numeric_limits<T>::infinity(), ratio_max = -std::numeric_limits<T>::infinity();
  T first_target = 0, first_residual = 0;
  double targets = 0, targets2 = 0, residuals = 0, residuals2 = 0;  // deviations from the first, and their squares

  PF_DEV LossSums widened() const {
    LossSums s;
    s.policy = policy, s.value = value, s.entropy = entropy, s.kl = kl, s.k3 = k3, s.log_ratio = log_ratio;
    s.low = low, s.high = high, s.dual = dual, s.value_clipped = value_clipped, s.ratio = ratio, s.ratio2 = ratio2;
    s.count = count, s.ratio_min = ratio_min, s.ratio_max = ratio_max;
    s.returns = {first_target, targets, targets2}, s.residuals = {first_residual, residuals, residuals2};
    return s;
  }
};

// What all tokens share, in registers.
template <class T>
struct LossSetup {
  LossNumbers<T> numbers;
  PolicyNumbers<T> other;
  LossScale<T> scale;
  T value_factor, entropy_factor, kl_factor;  // coefficient times 1/denominator
  double value_coef, entropy_coef, kl_coef;
  bool has_values, has_old_values, has_entropy, has_weights, value_half, kl_gradient;
};

// The parameters, with the numbers that lie on the device in place of the host's.
PF_DEV LossParams current(LossParams p) {
  if (p.on_device) {
    double* to = &p.clip_low;
#pragma unroll
    for (int i = 0; i < static_cast<int>(offsetof(LossParams, value_loss) / sizeof(double)); ++i)
      to[i] = p.on_device[i];
  }
  return p;
}

// Every thread of the block calls. counted: partial moments of the advantages, or nullptr: every element is valid and
// advantages are taken as they are.
template <class T>
PF_DEV LossSetup<T> set_up(const LossArgs& a, bool has_entropy, const CountedSums* counted, int n_counted) {
  PF_SHARED(Moments, all);
  if (counted) {
    const CountedSums sums = sum_of_partials<kWarps>(counted, n_counted);
    if (threadIdx.x == 0) all = sums.sums.finish(sums.count);
  } else if (threadIdx.x == 0) {
    all = {static_cast<double>(a.n), 0, 0};
  }
  __syncthreads();
  const LossParams p = current(a.params);
  LossSetup<T> s;
  s.numbers = LossNumbers<T>(p), s.other = PolicyNumbers<T>(p);
  s.scale = scale_of<T>(all, a.denominator, a.sum, p.normalize_advantages, p.advantage_ddof, p.advantage_eps);
  s.value_factor = static_cast<T>(p.value_half ? p.value_coef : 2 * p.value_coef) * s.scale.weight;
  s.entropy_factor = -(static_cast<T>(p.entropy_coef) * s.scale.weight);
  s.kl_factor = static_cast<T>(p.kl_coef) * s.scale.weight;
  s.value_coef = p.value_coef, s.entropy_coef = p.entropy_coef, s.kl_coef = p.kl_coef;
  s.has_values = a.values.data, s.has_old_values = a.old_values.data, s.has_entropy = has_entropy;
  s.has_weights = a.weights.data, s.value_half = p.value_half, s.kl_gradient = p.kl_coef != 0;
  return s;
}

// One token; what is absent is 0.
template <class T>
struct Token {
  T log_prob, old_log_prob, advantage, value, old_value, target, entropy, ref_log_prob, rollout_log_prob, weight;
};
template <class T>
struct TokenGradients {
  T log_prob, value, entropy;
};

// A valid token's gradients; adds to the sums. kUsual: PPO's policy and a KL without weight, for a kernel of their own.
template <bool kUsual = false, class T>
PF_DEV TokenGradients<T> token_loss(const Token<T>& x, const LossSetup<T>& setup, TokenSums<T>& sums) {
  const LossNumbers<T>& c = setup.numbers;
  const T weight = setup.has_weights ? x.weight : T(1);
  const bool is_first = sums.count == 0;
  sums.count += 1;

  const T raw = x.log_prob - x.old_log_prob;
  T d = raw;
  if (c.has_log_ratio_clamp) d = clamp_of(d, -c.log_ratio_clamp, c.log_ratio_clamp);
  const auto e = exponential(d);
  const T ratio = e.value;
  sums.k3 += e.beyond_linear, sums.log_ratio += d, sums.ratio += ratio;
  sums.ratio2 += static_cast<double>(ratio) * ratio;  // no square of a float leaves the range of double
  sums.ratio_min = smaller_or_second(ratio, sums.ratio_min), sums.ratio_max = larger_or_second(ratio, sums.ratio_max);

  const T advantage = setup.scale.normalize ? (x.advantage - setup.scale.shift) * setup.scale.inverse : x.advantage;
  auto s = kUsual || setup.other.policy == kPpo
               ? surrogate(ratio, advantage, c)
               : policy_term(PolicyToken<T>{x.log_prob, x.old_log_prob, d, ratio, advantage}, c, setup.other);
  if (c.rollout_correction != kNoCorrection) {
    const T rho = exp_of(x.old_log_prob - x.rollout_log_prob);
    const T factor = c.rollout_correction == kTis ? min_of(rho, c.rollout_high)
                                                  : select(rho >= c.rollout_low && rho <= c.rollout_high, rho, T(0));
    s.loss = s.loss * factor, s.grad = s.grad * factor;
  }
  sums.policy += setup.has_weights ? s.loss * weight : s.loss;
  sums.low += s.low ? 1 : 0, sums.high += s.high ? 1 : 0, sums.dual += s.dual_clipped ? 1 : 0;
  TokenGradients<T> grad{s.grad * (weight * setup.scale.weight), T(0), T(0)};
  const bool clamped = c.has_log_ratio_clamp && (raw < -c.log_ratio_clamp || raw > c.log_ratio_clamp);
  if (clamped && (kUsual || through_ratio(setup.other.policy))) grad.log_prob = T(0);

  if (setup.has_values) {
    const auto term = value_term(x.value, setup.has_old_values ? x.old_value : x.value, x.target, c);
    const T loss = setup.value_half ? T(0.5) * term.loss : term.loss;
    sums.value += setup.has_weights ? loss * weight : loss;
    sums.value_clipped += term.clipped ? 1 : 0;
    grad.value = term.half_grad * (weight * setup.value_factor);
    const T residual = x.target - x.value;
    if (is_first) sums.first_target = x.target, sums.first_residual = residual;
    const double target = static_cast<double>(x.target) - sums.first_target;
    const double left = static_cast<double>(residual) - sums.first_residual;
    sums.targets += target, sums.targets2 += target * target, sums.residuals += left, sums.residuals2 += left * left;
  }
  if (setup.has_entropy) {
    sums.entropy += setup.has_weights ? x.entropy * weight : x.entropy;
    grad.entropy = weight * setup.entropy_factor;
  }
  if (c.kl != kNoKl) {
    T k, slope;
    kl_term<!kUsual>(x.ref_log_prob - x.log_prob, ratio, !clamped, c, k, slope);
    sums.kl += setup.has_weights ? k * weight : k;
    if (setup.kl_gradient) grad.log_prob += slope * (weight * setup.kl_factor);
  }
  return grad;
}

// What the rollout stored of token `at`, the i-th of the minibatch; `share` tokens at once where all streams are plain.
template <bool kPlain, class T>
PF_DEV void read_tokens(const LossArgs& a, int64_t i, int64_t at, bool (&on)[kShare<kPlain>],
                        Token<T> (&x)[kShare<kPlain>]) {
  constexpr int N = kShare<kPlain>;
  read_mask<kPlain>(a.mask, i, a.n, at, on);
  T v[N];
#define PF_TOKEN(stream, which, field)            \
  read<kPlain>(a.stream, i, a.n, which, T(0), v); \
  _Pragma("unroll") for (int k = 0; k < N; ++k) x[k].field = v[k]
  PF_TOKEN(old_log_prob, at, old_log_prob);
  PF_TOKEN(advantages, at, advantage);
  PF_TOKEN(old_values, at, old_value);
  PF_TOKEN(returns, at, target);
  PF_TOKEN(ref_log_prob, at, ref_log_prob);
  PF_TOKEN(rollout_log_prob, at, rollout_log_prob);
  PF_TOKEN(weights, i, weight);
  PF_TOKEN(values, i, value);
  PF_TOKEN(entropy, i, entropy);
#undef PF_TOKEN
}

// A row of the minibatch, for the losses that compute its log-prob: where the rollout has it, -1 where nowhere, and its
// token; `on`: it is valid.
template <class T>
struct RowToken {
  int64_t at = -1;
  bool on[1] = {false};
  Token<T> token[1] = {};

  // simple: see has_simple_streams.
  PF_DEV void read(const LossArgs& a, int64_t i, Offence* index_offence, bool simple) {
    at = gathered(a.index, i, a.stored, index_offence);
    if (at < 0) return;
    if (!simple) return read_tokens<false>(a, i, at, on, token);
    const auto number = [](const Stream& s, int64_t k) {
      return s.data ? static_cast<T>(static_cast<const float*>(s.data)[k]) : T(0);
    };
    on[0] = !a.mask.data || static_cast<const uint8_t*>(a.mask.data)[at] != 0;
    Token<T>& x = token[0];
    x.old_log_prob = number(a.old_log_prob, at), x.advantage = number(a.advantages, at);
    x.old_value = number(a.old_values, at), x.target = number(a.returns, at);
    x.ref_log_prob = number(a.ref_log_prob, at), x.rollout_log_prob = number(a.rollout_log_prob, at);
    x.weight = number(a.weights, i), x.value = number(a.values, i);
  }
  PF_DEV TokenGradients<T> loss(T log_prob, T entropy, const LossSetup<T>& setup, TokenSums<T>& sums) {
    if (!on[0]) return {};
    token[0].log_prob = log_prob, token[0].entropy = entropy;
    return token_loss(token[0], setup, sums);
  }
};

// The end of every loss kernel: the last block to come, where this is true, turns the sums of all blocks into loss and
// statistics.
template <class T>
PF_DEV bool finish_loss(const LossArgs& a, const LossSetup<T>& setup, const TokenSums<T>& mine, LossSums* partials,
                        unsigned* ticket) {
  LossSums sums = sum_of_block<kWarps>(mine.widened());
  if (threadIdx.x == 0) partials[blockIdx.x] = sums;
  if (!is_last_block(ticket)) return false;
  sums = sum_of_partials<kWarps>(partials, static_cast<int>(gridDim.x));
  if (threadIdx.x != 0) return true;
  const LossTotals totals{sums.policy,
                          sums.value,
                          sums.entropy,
                          sums.kl,
                          sums.k3,
                          sums.log_ratio,
                          sums.low,
                          sums.high,
                          sums.dual,
                          sums.value_clipped,
                          sums.ratio,
                          sums.ratio2,
                          sums.count,
                          sums.ratio_min,
                          sums.ratio_max,
                          sums.returns.finish(sums.count),
                          sums.residuals.finish(sums.count)};
  double stat[kStatCount];
  const double loss = statistics(totals, setup.scale.weight, setup.has_values, setup.numbers.kl != kNoKl,
                                 setup.value_coef, setup.entropy_coef, setup.kl_coef, stat);
  *static_cast<T*>(a.loss) = static_cast<T>(loss);
#pragma unroll
  for (int i = 0; i < kStatCount; ++i) static_cast<T*>(a.stats)[i] = static_cast<T>(stat[i]);
  return true;
}

// Whether the loss needs the valid count or the moments of the advantages before its first gradient, and if so queues
// that pass: counted stays nullptr otherwise.
template <class T>
inline cudaError_t queue_counts(const LossArgs& a, Launch& launch, CountedSums*& counted, int& blocks) {
  counted = nullptr, blocks = 0;
  const bool normalize = a.params.normalize_advantages, given = a.denominator == a.denominator;
  if (!normalize && (!a.mask.data || a.sum || given)) return cudaSuccess;
  return queue_moments<T>(normalize ? a.advantages : Stream{}, a.mask, a.index, a.stored, a.n, launch, counted, blocks);
}

// Whether every stream is contiguous float32, and the mask bytes: then nothing has to be asked for each token.
inline bool has_simple_streams(const LossArgs& a) {
  for (const Stream* s : {&a.old_log_prob, &a.advantages, &a.old_values, &a.returns, &a.ref_log_prob,
                          &a.rollout_log_prob, &a.weights, &a.values}) {
    if (!is_plain(*s, DType::f32, 4)) return false;
  }
  return is_plain(a.mask, DType::boolean, 1) || is_plain(a.mask, DType::u8, 1);
}

inline bool is_usual(const LossParams& p) {
  return p.policy == kPpo && p.kl_weight == kNoKlWeight && p.kl_gradient == kOwnGradient;
}

inline bool all_plain(const LossArgs& a) {
  for (const Stream* s : {&a.old_log_prob, &a.advantages, &a.old_values, &a.returns, &a.ref_log_prob,
                          &a.rollout_log_prob, &a.weights, &a.values, &a.entropy, &a.grad_values, &a.grad_entropy}) {
    if (!is_plain(*s, DType::f32, 16)) return false;
  }
  return !a.is_double && !a.index.data && is_plain_mask(a.mask);
}

}  // namespace PF_ISA
}  // namespace pf
