// Advantage estimators as one backward recurrence, x_t = a_t + b_t·x_{t+1}, and what each of them puts into a and b.
#pragma once
#include "elementary.h"

namespace pf {
namespace PF_ISA {

// Where `cut`, nothing of x_{t+1} may come through, NaN and Inf included: it is deselected, not multiplied by 0.
template <class V, class M>
struct Step {
  V a, b;
  M cut;
};

template <class V, class M>
PF_FN V advance(const Step<V, M>& s, const V& x) {
  return select(s.cut, s.a, fma_of(s.b, x, s.a));
}

// Two steps as one: advance(compose(early, late), x) = advance(early, advance(late, x)).
template <class V, class M>
PF_FN Step<V, M> compose(const Step<V, M>& early, const Step<V, M>& late) {
  return {advance(early, late.a), early.b * late.b, M(early.cut | late.cut)};
}

// A step that is stepped over: x_t = x_{t+1}.
template <class V, class M>
PF_FN Step<V, M> pass_where(const M& over, const Step<V, M>& s) {
  using T = scalar_t<V>;
  return {select(over, V(T(0)), s.a), select(over, V(T(1)), s.b), M(s.cut & !over)};
}

// Steps are solved in groups of kGroup, counted from the start of their own sequence: this is the order in which every
// walker and every device associates the recurrence, so the same sequence has the same bits wherever it lies. Looking
// ahead over the group leaves one step per group on the critical path.
constexpr int kGroup = 4;

template <class V, class M>
struct Ahead {
  Step<V, M> last_two, all;
  PF_FN explicit Ahead(const Step<V, M>* s) : last_two(compose(s[2], s[3])) {
    all = compose(compose(s[0], s[1]), last_two);
  }
  // x[0..3] from the x that enters behind the group.
  PF_FN void solve(const Step<V, M>* s, const V& incoming, V* x) const {
    x[3] = advance(s[3], incoming);
    x[2] = advance(last_two, incoming);
    x[1] = advance(s[1], x[2]);
    x[0] = advance(all, incoming);
  }
};

// One transition as an estimator sees it: V(s_{t+1}) is already that of a boundary, and nothing is left of what must
// not be read.
template <class V, class M>
struct Transition {
  V reward, value, bootstrap, ratio;
  M cut;
};

// Which inputs a scan has, and what is read of one step. `partial`: some steps lie outside the sequence.
struct Presence {
  bool terminated, truncated, mask, carry, partial;
};
template <class V, class M>
struct Inputs {
  V reward, value, log_rho, next, final;
  M terminated, truncated, keep, inside;
};

// From what was read to the transition and its step.
template <class Op, class V, class M>
PF_FN Step<V, M> open_step(const Op& op, const Presence& has, const Inputs<V, M>& in, const V& gamma, const V& decay,
                           Transition<V, M>& x) {
  using T = scalar_t<V>;
  const V zero(T(0));
  x.reward = has.mask ? select(in.keep, in.reward, zero) : in.reward;
  if constexpr (Op::kValues) x.value = has.mask ? select(in.keep, in.value, zero) : in.value;
  if constexpr (Op::kRatios) x.ratio = exp_of(has.mask ? select(in.keep, in.log_rho, zero) : in.log_rho);
  x.bootstrap = in.next;
  x.cut = M(zero != zero);
  if (has.truncated) {
    x.bootstrap = select(in.truncated, in.final, x.bootstrap);
    x.cut = in.truncated;
  }
  if (has.terminated) {
    x.bootstrap = select(in.terminated, zero, x.bootstrap);
    x.cut = M(x.cut | in.terminated);
  }
  auto step = op.step(x, gamma, decay);
  if (has.mask && has.carry) step = pass_where(M(!in.keep), step);
  if (has.partial) step = pass_where(M(!in.inside), step);
  return step;
}

// Each estimator: which inputs it has, its step, and its outputs from x_t and x_{t+1}. `decay` is what it makes of γ
// and λ once per column, in float64. kMoments: it can take the moments of its first output as it goes.

// δ_t = r_t + γ·V_{t+1} - V_t;  A_t = δ_t + γλ·A_{t+1};  returns = A + V (arXiv 1506.02438, eq. 16).
template <class T>
struct Gae {
  static constexpr bool kValues = true, kRatios = false, kAhead = true;
  static constexpr int kOutputs = 2;
  static constexpr bool kPlainToo = true;  // has a version of its own without truncation and masks
  static constexpr bool kMoments = true;

  static PF_FN double decay(double gamma, double lam) { return gamma * lam; }
  template <class V, class M>
  PF_FN Step<V, M> step(const Transition<V, M>& x, const V& gamma, const V& decay) const {
    return {fma_of(gamma, x.bootstrap, x.reward) - x.value, decay, x.cut};
  }
  template <class V, class M>
  PF_FN void outputs(const Transition<V, M>& x, const V&, const V& now, const V&, V* out) const {
    out[0] = now;
    out[1] = now + x.value;
  }
};

// R_t = r_t + γ·R_{t+1}; a boundary bootstraps from its value.
template <class T>
struct DiscountedReturns {
  static constexpr bool kValues = false, kRatios = false, kAhead = true;
  static constexpr int kOutputs = 1;
  static constexpr bool kPlainToo = false, kMoments = false;

  static PF_FN double decay(double gamma, double) { return gamma; }
  template <class V, class M>
  PF_FN Step<V, M> step(const Transition<V, M>& x, const V& gamma, const V& decay) const {
    return {fma_of(gamma, x.bootstrap, x.reward), decay, x.cut};  // x.bootstrap is 0 but at a boundary
  }
  template <class V, class M>
  PF_FN void outputs(const Transition<V, M>&, const V&, const V& now, const V&, V* out) const {
    out[0] = now;
  }
};

// x_t = vs_t - V_t: δ_t = min(ρ̄, ρ_t)·(r_t + γ·V_{t+1} - V_t), c_t = λ·min(c̄, ρ_t) (arXiv 1802.01561, eq. 1).
// Not ahead: ratios above 1 could overflow in a product of four that step by step meets a 0.
template <class T>
struct Vtrace {
  static constexpr bool kValues = true, kRatios = true, kAhead = false;
  static constexpr int kOutputs = 2;
  static constexpr bool kPlainToo = false, kMoments = false;
  T rho_clip, c_clip;

  static PF_FN double decay(double, double lam) { return lam; }
  template <class V, class M>
  PF_FN Step<V, M> step(const Transition<V, M>& x, const V& gamma, const V& lam) const {
    const V td_error = fma_of(gamma, x.bootstrap, x.reward) - x.value;
    return {min_of(x.ratio, V(rho_clip)) * td_error, gamma * (lam * min_of(x.ratio, V(c_clip))), x.cut};
  }
  template <class V, class M>
  PF_FN void outputs(const Transition<V, M>& x, const V& gamma, const V& now, const V& next, V* out) const {
    const V target = x.bootstrap + select(x.cut, V(T(0)), next);  // vs_{t+1}
    out[0] = x.value + now;
    out[1] = min_of(x.ratio, V(rho_clip)) * (fma_of(gamma, target, x.reward) - x.value);
  }
};

}  // namespace PF_ISA
}  // namespace pf
