// The contract between the bindings and the kernels: plain structs of pointers, shapes and strides. Whoever calls
// allocates everything; kernels neither allocate nor throw. Strides and shapes count elements.
#pragma once
#include <cstdint>

namespace pf {

enum class DType : int32_t { f32, f64, bf16, f16, i64, i32, i16, i8, u8, boolean };

constexpr int kMaxDims = 8;
constexpr int64_t kMaxRowBlocks = 64;  // blocks of rows whose partial sums are merged in order

// A tensor of any strides. Dimensions that strides allow to merge are merged, so most have one. data == nullptr:
// absent.
struct Stream {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int32_t ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};
};

// Rows of `width` elements, e.g. logits [..., A]: `lead` walks the rows, `stride` the elements of one.
struct Rows {
  Stream lead;
  int64_t width = 0;
  int64_t stride = 1;
};

// A label or a sparse entry that a kernel met and refused: -1, or where it was, and its value.
struct Offence {
  int64_t where = -1;
  int64_t value = 0;
};

// --- losses ----------------------------------------------------------------------------------------------------------

// Order of LossConfig.NUMBERS and CHOICES in ppo_fast/config.py. NaN: switched off.
struct LossParams {
  double clip_low, clip_high, dual_clip, ratio_cap, log_ratio_clamp, huber_delta, value_clip, value_coef, entropy_coef,
      kl_coef, kl_clamp, kl_value_clamp, advantage_eps, rollout_low, rollout_high, sapo_tau_positive, sapo_tau_negative,
      dro_beta;
  int32_t value_loss, value_half, value_clip_mode, kl, normalize_advantages, advantage_ddof, rollout_correction, policy,
      kl_gradient, kl_weight;
  const double* on_device = nullptr;  // the numbers again, in memory of the GPU: they may change between replays
};
enum ValueLoss { kMse, kHuber };
enum ValueClipMode { kClipMax, kClipReplace, kClipError };
enum Kl { kNoKl, kK1, kAbs, kK2, kK3 };
enum RolloutCorrection { kNoCorrection, kTis, kIcePop };
enum Policy { kPpo, kCispo, kSapo, kDppoTv, kDppoKl, kDro, kReinforce, kCpi };
enum KlGradient { kOwnGradient, kGradientOfK2 };
enum KlWeight { kNoKlWeight, kKlRatio, kKlScore };

// Order of STATS in ppo_fast/config.py.
// clang-format off
#define PF_STATS(X) \
  X(policy_loss) \
  X(value_loss) \
  X(entropy) \
  X(kl) \
  X(approx_kl) \
  X(old_approx_kl) \
  X(clip_fraction) \
  X(clip_fraction_low) \
  X(clip_fraction_high) \
  X(dual_clip_fraction) \
  X(value_clip_fraction) \
  X(ratio_mean) \
  X(ratio_min) \
  X(ratio_max) \
  X(ess) \
  X(explained_variance)
// clang-format on
enum Stat {
#define X(name) k_##name,
  PF_STATS(X)
#undef X
      kStatCount
};

// What every PPO loss reads and writes per element; n elements, in the order of the log-probs.
struct LossArgs {
  LossParams params;
  int64_t n;
  Stream old_log_prob, advantages, old_values, returns, ref_log_prob, rollout_log_prob, mask;  // the rollout's
  Stream index;                      // present: element i of the rollout's streams is their element index[i]
  int64_t stored;                    // how many they have, then
  Offence* index_offence;            // GPU: the first index that is not one of them
  Stream weights;
  Stream values, entropy;            // with gradients
  double denominator;                // NaN: the number of valid elements
  bool sum;                          // reduction "sum": nothing is divided unless a denominator is given
  bool is_double;                    // compute in float64, else float32
  void *loss, *stats;                // [] and [kStatCount], in the compute dtype
  Stream grad_values, grad_entropy;  // contiguous, nullptr where not wanted; d loss / d input
  int threads;
};

struct PpoLossArgs {
  LossArgs loss;
  Stream log_prob, grad_log_prob;
};

// GPU: gradients in place times a factor that is known there only. Nothing is read where it is 1.
constexpr int kMaxScaled = 3;
struct ScaleArgs {
  Stream factor, grads[kMaxScaled];  // contiguous, absent from the first absent one on
  int64_t n[kMaxScaled];
};

// --- whitening -------------------------------------------------------------------------------------------------------

struct WhitenArgs {
  int64_t n;
  Stream x, mask, out;     // out absent: only the moments are wanted
  double* moments;         // [3]: count, mean, sum of squared deviations
  bool have_moments;       // given, not computed
  int ddof;
  double eps;
  bool shift_mean, eps_in_variance, is_double;
  int threads;
};

// --- log-probabilities -----------------------------------------------------------------------------------------------

// n categorical distributions, log softmax(logits / temperature), and the action taken from each.
struct Categorical {
  Rows logits;                    // [n, A]
  Stream actions;                 // [n], integers, or floats that hold integers
  Rows action_mask;               // [n, A]: where 0, the probability is 0
  Stream temperature;             // [n]; absent: temperature_value
  double temperature_value = 1;
  int64_t ignore_index = 0;       // rows whose action it is are not read and give 0
  bool has_ignore_index = false;
};

// Outputs are contiguous, in the compute dtype. saved is [2, n]: log p = (logits - saved[0])/temperature - saved[1];
// saved[1] = inf marks a row that gives 0.
struct CategoricalLogProbArgs {
  Categorical dist;
  int64_t n;
  void *log_prob, *entropy, *saved;  // entropy: nullptr where not wanted
  bool is_double;
  Offence* offence;                  // the first action that is not in [0, A)
  int threads;
};
struct CategoricalLogProbBackwardArgs {
  Categorical dist;
  int64_t n;
  const void *entropy, *saved;    // entropy: nullptr with d_entropy absent
  Stream d_log_prob, d_entropy;   // any strides; absent: 0
  Rows d_logits;                  // in the dtype of the logits; may be the logits' own memory
  bool is_double;
  int threads;
};

// n diagonal normals and the action taken from each. A log_std shared by all rows has a lead of stride 0.
struct Normal {
  Rows mean, log_std, actions;  // [n, D]
  bool squash;                  // actions are pre-tanh; the log-prob is that of tanh(actions)
};
struct NormalLogProbArgs {
  Normal dist;
  int64_t n;
  void *log_prob, *entropy;  // contiguous, in the compute dtype; entropy: nullptr where not wanted
  bool is_double;
  int threads;
};
struct NormalLogProbBackwardArgs {
  Normal dist;
  int64_t n;
  Stream d_log_prob, d_entropy;  // absent: 0
  Rows d_mean, d_log_std;        // in the dtype of the input; absent: not wanted; d_log_std of a shared one: [D]
  double* sums;                  // [kMaxRowBlocks, D] scratch for d_log_std of a shared one, else nullptr
  bool is_double;
  int threads;
};

// n rows of K categoricals side by side: head k has nvec[k] of the logits' columns.
struct MultiCategorical {
  Rows logits, action_mask;  // [n, Σ nvec]
  Rows actions;              // [n, K]
  const int64_t* nvec;       // [K]
};
struct MultiCategoricalLogProbArgs {
  MultiCategorical dist;
  int64_t n;
  void *log_prob, *entropy;  // [n], summed over the heads; entropy: nullptr where not wanted
  void* saved;               // [3, K, n]: each head's shift, log_sum and entropy
  bool is_double;
  Offence* offence;          // the first action out of range; `where` counts elements of actions [n, K]
  int threads;
};
struct MultiCategoricalLogProbBackwardArgs {
  MultiCategorical dist;
  int64_t n;
  const void* saved;
  Stream d_log_prob, d_entropy;  // absent: 0
  Rows d_logits;
  bool is_double;
  int threads;
};

// n rows of D independent Bernoullis; an action that is not 0 is a 1.
struct BernoulliLogProbArgs {
  Rows logits, actions;  // [n, D]
  int64_t n;
  void *log_prob, *entropy;
  bool is_double;
  int threads;
};
struct BernoulliLogProbBackwardArgs {
  Rows logits, actions;
  int64_t n;
  Stream d_log_prob, d_entropy;  // absent: 0
  Rows d_logits;
  bool is_double;
  int threads;
};

// n rows of D independent Betas, stretched from [0, 1] to [low, high].
struct Beta {
  Rows alpha, beta, actions;  // [n, D]
  double low, high;
};
struct BetaLogProbArgs {
  Beta dist;
  int64_t n;
  void *log_prob, *entropy;
  bool is_double;
  int threads;
};
struct BetaLogProbBackwardArgs {
  Beta dist;
  int64_t n;
  Stream d_log_prob, d_entropy;  // absent: 0
  Rows d_alpha, d_beta;          // absent: not wanted
  bool is_double;
  int threads;
};

// --- losses from a distribution's parameters -------------------------------------------------------------------------

// loss.index gathers actions and action_mask too. d_logits: d loss / d logits, absent where not wanted.
struct CategoricalPpoLossArgs {
  LossArgs loss;
  Categorical dist;
  Rows d_logits;
  Offence* offence;
};

// sums: [kMaxRowBlocks, D] scratch for the gradient [D] of a log_std that all rows share, else nullptr.
struct NormalPpoLossArgs {
  LossArgs loss;
  Normal dist;
  Rows d_mean, d_log_std;
  double* sums;
};

// --- advantages ------------------------------------------------------------------------------------------------------

// A [T, N] view of any strides. data == nullptr: absent.
struct Grid {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t t = 0, n = 0;  // strides
};

// A rate or a value per column: `row` where present (stride n), else `value`.
struct PerColumn {
  Grid row;
  double value = 0.0;
};

// What gae, vtrace and discounted_returns read and write: backward scans over T steps of N columns.
struct ScanArgs {
  int64_t steps, columns;            // T, N; of packed inputs M and S
  const int64_t* bounds;             // packed: [S + 1], column s is steps [s, s + 1); or nullptr
  Grid rewards, values, log_rhos;    // the latter two where the op has them
  Grid terminated, truncated, mask;  // flags of any dtype, set where not 0
  Grid final_values;                 // dense: read where truncated and not terminated
  const int64_t* final_index;        // sparse: sorted flat positions in the contiguous output ...
  const double* final_value;         // ... and their values; of equal positions the last counts
  int64_t final_count;               // -1: not sparse
  PerColumn last_values, gamma, lam;
  double rho_clip, c_clip;
  bool carry;                        // a masked step is transparent; else its inputs are 0
  bool is_double;                    // compute and write float64, else float32
  void* outputs[2];                  // contiguous: one of the strides below is 1
  int64_t output_t, output_n;
  double* moments;                   // gae: [count, mean, m2] of the valid advantages; or nullptr
  int64_t* missing;                  // out: first truncated step without a sparse entry, or -1
  int threads;
};

// Every op: its name and its arguments. csrc/cpu/<name>.inc and csrc/cuda/<name>.cu are the bodies.
#define PF_OPS(X)                                                             \
  X(ppo_loss, PpoLossArgs)                                                    \
  X(whiten, WhitenArgs)                                                       \
  X(categorical_ppo_loss, CategoricalPpoLossArgs)                             \
  X(normal_ppo_loss, NormalPpoLossArgs)                                       \
  X(categorical_log_prob, CategoricalLogProbArgs)                             \
  X(categorical_log_prob_backward, CategoricalLogProbBackwardArgs)            \
  X(normal_log_prob, NormalLogProbArgs)                                       \
  X(normal_log_prob_backward, NormalLogProbBackwardArgs)                      \
  X(gae, ScanArgs)                                                            \
  X(vtrace, ScanArgs)                                                         \
  X(discounted_returns, ScanArgs)                                             \
  X(multi_categorical_log_prob, MultiCategoricalLogProbArgs)                  \
  X(multi_categorical_log_prob_backward, MultiCategoricalLogProbBackwardArgs) \
  X(bernoulli_log_prob, BernoulliLogProbArgs)                                 \
  X(bernoulli_log_prob_backward, BernoulliLogProbBackwardArgs)                \
  X(beta_log_prob, BetaLogProbArgs)                                           \
  X(beta_log_prob_backward, BetaLogProbBackwardArgs)

}  // namespace pf
