// What the bindings of all three losses share: the rollout's streams, checked against the shape of the minibatch.
#pragma once
#include "tensor.h"

namespace pf::bind {

// `on_device`: None, or the numbers in memory of the GPU, float64, which kernels read in their place.
inline LossParams loss_params(const py::tuple& numbers, const py::tuple& choices, py::handle on_device) {
  LossParams p;
  double* number = &p.clip_low;
  const size_t n_numbers = (reinterpret_cast<char*>(&p.value_loss) - reinterpret_cast<char*>(&p)) / sizeof(double);
  int32_t* choice = &p.value_loss;
  const size_t n_choices = &p.kl_weight - choice + 1;
  if (numbers.size() != n_numbers || choices.size() != n_choices) {
    throw py::value_error("LossParams: the package's Python and C++ halves differ; reinstall it");
  }
  for (size_t i = 0; i < n_numbers; ++i) number[i] = numbers[i].cast<double>();
  for (size_t i = 0; i < n_choices; ++i) choice[i] = choices[i].cast<int32_t>();
  const Op op("LossParams");
  const Tensor device(op, "numbers", on_device);
  device.dtype_is(DType::f64, "float64").shape_is({static_cast<int64_t>(n_numbers)}, "[numbers]").contiguous();
  p.on_device = device ? static_cast<const double*>(device.data()) : nullptr;
  return p;
}

// Arguments of every loss after its distribution: one struct so that the three entry points cannot drift apart.
struct LossInputs {
  const Op& op;
  Tensor old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob, mask, weights, index;
  Tensor loss, stats, grad_values;

  LossInputs(const Op& op, py::handle old_log_prob, py::handle advantages, py::handle values, py::handle old_values,
             py::handle returns, py::handle ref_log_prob, py::handle rollout_log_prob, py::handle mask,
             py::handle weights, py::handle index, py::handle loss, py::handle stats, py::handle grad_values)
      : op(op), old_log_prob(op, "old_log_prob", old_log_prob), advantages(op, "advantages", advantages),
        values(op, "values", values), old_values(op, "old_values", old_values), returns(op, "returns", returns),
        ref_log_prob(op, "ref_log_prob", ref_log_prob), rollout_log_prob(op, "rollout_log_prob", rollout_log_prob),
        mask(op, "mask", mask), weights(op, "weights", weights), index(op, "index", index), loss(op, "loss", loss),
        stats(op, "stats", stats), grad_values(op, "grad_values", grad_values) {}

  // `like`: a tensor whose first `lead` dimensions are the elements' shape, written as `shape` in messages.
  LossArgs args(const LossParams& params, const Tensor& like, int lead, const char* shape, double denominator, bool sum,
                bool is_double) const {
    LossArgs a{};
    a.params = params;
    a.n = like.numel_of(lead);
    need(values, returns, "values");
    if (values && params.value_clip == params.value_clip && params.value_clip_mode != kClipError) {
      need(values, old_values, "values and value_clip");
    }
    if (params.kl != kNoKl && !ref_log_prob) throw missing("ref_log_prob", "LossConfig(kl=...)");
    if (params.rollout_correction != kNoCorrection && !rollout_log_prob) {
      throw missing("rollout_log_prob", "LossConfig(rollout_correction=...)");
    }
    const Tensor* stored[] = {&old_log_prob, &advantages,       &old_values, &returns,
                              &ref_log_prob, &rollout_log_prob, &mask};
    old_log_prob.required(), advantages.required();
    if (index) {
      index.integer().same_shape(like, shape, lead);
      a.index = index.stream();
      const int64_t stored_n = old_log_prob.numel();
      for (const Tensor* t : stored) {
        if (*t && t->numel() != stored_n) {
          t->fail(text("have as many elements as old_log_prob, ", stored_n, ", got ", t->shape_text()));
        }
      }
      a.stored = stored_n;
      a.index_offence = Labels(op, "index").at();
      if (!kOnGpu) check_range(index, stored_n, "elements of the rollout");
    } else {
      for (const Tensor* t : stored) t->same_shape(like, shape, lead);
    }
    values.same_shape(like, shape, lead);
    weights.same_shape(like, shape, lead);
    for (const Tensor* t :
         {&old_log_prob, &advantages, &values, &old_values, &returns, &ref_log_prob, &rollout_log_prob, &weights})
      t->floating();
    a.old_log_prob = old_log_prob.stream(), a.advantages = advantages.stream(), a.old_values = old_values.stream();
    a.returns = returns.stream(), a.ref_log_prob = ref_log_prob.stream();
    a.rollout_log_prob = rollout_log_prob.stream(), a.mask = mask.stream(), a.weights = weights.stream();
    a.values = values.stream();
    a.denominator = denominator, a.sum = sum, a.is_double = is_double;
    const DType dtype = is_double ? DType::f64 : DType::f32;
    const char* wanted = is_double ? "float64" : "float32";
    a.loss = loss.required().dtype_is(dtype, wanted).shape_is({}, "[]").data();
    a.stats = stats.required().dtype_is(dtype, wanted).shape_is({kStatCount}, "[statistics]").contiguous().data();
    a.grad_values = gradient(grad_values, values);
    return a;
  }

  static Stream gradient(const Tensor& grad, const Tensor& of) {
    if (!grad) return {};
    return grad.same_shape(of, "the input's shape").dtype_is(of.dtype(), "the input's dtype").contiguous().stream();
  }

  static void check_range(const Tensor& labels, int64_t bound, const char* what) {
    const Offence o = first_outside(labels.stream(), labels.numel(), bound);
    if (o.where >= 0) labels.fail(text("be in [0, ", bound, "), the ", what, ", got ", o.value, " at ", o.where));
  }

  // The first of n labels, which lie on the CPU, that is not in [0, bound).
  static Offence first_outside(const Stream& labels, int64_t n, int64_t bound) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t x = integer_at(labels, i);
      if (x < 0 || x >= bound) return {i, x};
    }
    return {};
  }

 private:
  static int64_t integer_at(const Stream& s, int64_t i) {
    int64_t at = 0;
    for (int d = s.ndim - 1; d >= 0; --d) at += (i % s.shape[d]) * s.stride[d], i /= s.shape[d];
    switch (s.dtype) {
      case DType::i64: return static_cast<const int64_t*>(s.data)[at];
      case DType::i32: return static_cast<const int32_t*>(s.data)[at];
      case DType::i16: return static_cast<const int16_t*>(s.data)[at];
      case DType::i8: return static_cast<const int8_t*>(s.data)[at];
      default: return static_cast<const uint8_t*>(s.data)[at];
    }
  }
  py::type_error missing(const char* name, const char* because) const {
    return py::type_error(text(op.name, ": ", name, " must be a tensor with ", because, ", got None"));
  }
  void need(const Tensor& have, const Tensor& want, const char* because) const {
    if (have && !want) throw missing(want.name(), because);
  }
};

}  // namespace pf::bind
