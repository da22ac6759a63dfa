// The value loss of one token and its derivative with respect to the value.
#pragma once
#include "surrogate.h"

namespace pf {
namespace PF_ISA {

// f(e) = e², or beyond δ: 2δ|e| - δ²; and f'(e)/2.
template <class V, class T>
PF_FN void penalty(const V& e, const LossNumbers<T>& c, V& f, V& half_slope) {
  f = e * e;
  half_slope = e;
  if (c.value_loss == kHuber) {
    const V d(c.huber_delta), size = abs_of(e);
    const auto far = size > d;
    f = select(far, V(T(2) * c.huber_delta) * size - V(c.huber_delta * c.huber_delta), f);
    half_slope = select(far, select(e > V(T(0)), d, -d), half_slope);
  }
}

// The loss before its ½ (value_half), and half of its derivative: both factors wait for the sums.
template <class V, class M>
struct ValueTerm {
  V loss, half_grad;
  M clipped;
};

template <class V, class T>
PF_FN auto value_term(const V& value, const V& old_value, const V& target, const LossNumbers<T>& c) {
  const V zero(T(0));
  V loss, grad;
  penalty(value - target, c, loss, grad);
  auto clipped = value != value;
  clipped = clipped & !clipped;
  if (c.has_value_clip && c.value_clip_mode == kClipError) {
    clipped = loss > V(c.value_clip);
    loss = select(clipped, V(c.value_clip), loss);
    grad = select(clipped, zero, grad);
  } else if (c.has_value_clip) {
    const V bound(c.value_clip), step = value - old_value;
    const auto outside = (step < -bound) | (step > bound);
    V near_loss, near_grad;
    penalty((old_value + clamp_of(step, -bound, bound)) - target, c, near_loss, near_grad);
    near_grad = select(outside, zero, near_grad);
    if (c.value_clip_mode == kClipMax) {
      clipped = (near_loss > loss) & outside;
      const V tie = V(T(0.5)) * (grad + near_grad);
      grad = select(loss > near_loss, grad, select(loss == near_loss, tie, near_grad));
      loss = max_of(loss, near_loss);
    } else {
      clipped = outside;
      loss = near_loss, grad = near_grad;
    }
  }
  return ValueTerm<V, decltype(clipped)>{loss, grad, clipped};
}

}  // namespace PF_ISA
}  // namespace pf
