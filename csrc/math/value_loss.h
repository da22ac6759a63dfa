// The value loss of one token and its derivative with respect to the value.
#pragma once
#include "surrogate.h"

namespace pf {
namespace PF_ISA {

// f(e) = e², or beyond δ: 2δ|e| - δ².
template <class V, class T>
PF_FN void penalty(const V& e, int kind, T delta, V& f, V& slope) {
  f = e * e;
  slope = V(T(2)) * e;
  if (kind == kHuber) {
    const V d(delta), size = abs_of(e);
    const auto far = size > d;
    f = select(far, V(T(2) * delta) * size - V(delta * delta), f);
    slope = select(far, select(e > V(T(0)), V(T(2) * delta), V(T(-2) * delta)), slope);
  }
}

template <class V, class M>
struct ValueTerm {
  V loss, grad;
  M clipped;
};

template <class V, class T>
PF_FN auto value_term(const V& value, const V& old_value, const V& target, const LossParams& p,
                      const LossNumbers<T>& c) {
  const V zero(T(0));
  V loss, grad;
  penalty(value - target, p.value_loss, c.huber_delta, loss, grad);
  auto clipped = value != value;
  clipped = clipped & !clipped;
  if (c.has_value_clip && p.value_clip_mode == kClipError) {
    clipped = loss > V(c.value_clip);
    loss = select(clipped, V(c.value_clip), loss);
    grad = select(clipped, zero, grad);
  } else if (c.has_value_clip) {
    const V bound(c.value_clip), step = value - old_value;
    const auto inside = (step >= -bound) & (step <= bound);
    V near_loss, near_grad;
    penalty((old_value + clamp_of(step, -bound, bound)) - target, p.value_loss, c.huber_delta, near_loss, near_grad);
    near_grad = select(inside, near_grad, zero);
    if (p.value_clip_mode == kClipMax) {
      clipped = (near_loss > loss) & !inside;
      const V share = share_of_max(loss, near_loss);
      grad = share * grad + (V(T(1)) - share) * near_grad;
      loss = max_of(loss, near_loss);
    } else {
      clipped = abs_of(step) > bound;
      loss = near_loss, grad = near_grad;
    }
  }
  if (p.value_half) loss = V(T(0.5)) * loss, grad = V(T(0.5)) * grad;
  return ValueTerm<V, decltype(clipped)>{loss, grad, clipped};
}

}  // namespace PF_ISA
}  // namespace pf
