// PPO loss from log-probs: every stream is read once; gradients, loss and statistics leave in the same launch. A launch
// before it counts, only where the loss needs the number of valid tokens or the moments of their advantages.
#include "loss.cuh"

namespace pf {
namespace PF_ISA {
namespace {

template <class T, bool kPlain, bool kUsual>
__global__ void __launch_bounds__(kThreads, kUsual || sizeof(T) == 4 ? 2 : 1)
    ppo_loss_kernel(const __grid_constant__ PpoLossArgs args, const CountedSums* counted, int n_counted,
                    LossSums* partials, unsigned* ticket) {
  constexpr int N = kShare<kPlain>;
  const LossArgs& a = args.loss;
  const LossSetup<T> setup = set_up<T>(a, a.entropy.data, counted, n_counted);
  TokenSums<T> sums;
  over_stream<kPlain>(a.n, [&](int64_t i) {
    bool on[N];
    Token<T> x[N];
    read_tokens<kPlain>(a, i, i, on, x);
    T log_prob[N], d_log_prob[N], d_value[N], d_entropy[N];
    read<kPlain>(args.log_prob, i, a.n, i, T(0), log_prob);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      d_log_prob[k] = d_value[k] = d_entropy[k] = T(0);
      if (!on[k]) continue;
      x[k].log_prob = log_prob[k];
      const TokenGradients<T> grad = token_loss<kUsual>(x[k], setup, sums);
      d_log_prob[k] = grad.log_prob, d_value[k] = grad.value, d_entropy[k] = grad.entropy;
    }
    if (args.grad_log_prob.data) write<kPlain>(args.grad_log_prob, i, a.n, d_log_prob);
    if (a.grad_values.data) write<kPlain>(a.grad_values, i, a.n, d_value);
    if (a.grad_entropy.data) write<kPlain>(a.grad_entropy, i, a.n, d_entropy);
  });
  finish_loss(a, setup, sums, partials, ticket);
}

}  // namespace
}  // namespace PF_ISA

cudaError_t ppo_loss(const PpoLossArgs& args, Launch& launch) {
  using namespace PF_ISA;
  const LossArgs& a = args.loss;
  return by_dtype(a.is_double, [&](auto zero) {
    using T = decltype(zero);
    CountedSums* counted;
    int n_counted;
    if (const cudaError_t e = queue_counts<T>(a, launch, counted, n_counted); e != cudaSuccess) return e;
    auto* partials = launch.allocate<LossSums>(kMostBlocks);
    unsigned* ticket = launch.ticket(launch.context);
    const auto queue = [&](auto plain, auto usual) {
      return start(&ppo_loss_kernel<T, plain(), usual()>, blocks_for<plain()>(a.n), kThreads, launch.stream, args,
                   counted, n_counted, partials, ticket);
    };
    const bool usual = is_usual(a.params);
    if constexpr (sizeof(T) == 4) {
      if (all_plain(a) && is_plain(args.log_prob, DType::f32, 16) && is_plain(args.grad_log_prob, DType::f32, 16)) {
        return usual ? queue(std::true_type{}, std::true_type{}) : queue(std::true_type{}, std::false_type{});
      }
    }
    return usual ? queue(std::false_type{}, std::true_type{}) : queue(std::false_type{}, std::false_type{});
  });
}

}  // namespace pf
