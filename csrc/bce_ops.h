// The binary cross entropy ops around a device's `run`: checks, allocation,
// operands.
#pragma once

#include <math.h>

#include "bce.h"
#include "tensor_operands.h"

namespace fused_ce {

inline BceArguments bce_arguments(const Tensor& input, const Tensor& target,
                                  const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& pos_weight,
                                  const std::optional<Tensor>& sample_weight,
                                  const std::optional<Tensor>& normalizer, int64_t form,
                                  int64_t reduction, ScalarType dtype, double label_smoothing,
                                  std::optional<int64_t> ignore_index, double alpha, double gamma,
                                  std::optional<double> denominator, bool zero_on_empty) {
  BceArguments a;
  a.form = static_cast<BceForm>(form);
  a.reduction = static_cast<Reduction>(reduction);
  a.target_scale = 1.0 - label_smoothing;
  a.target_shift = 0.5 * label_smoothing;
  a.has_ignore_index = ignore_index.has_value();
  a.ignore_index = ignore_index.value_or(0);
  double parity = gamma != floor(gamma) ? NAN : fmod(gamma, 2) == 0 ? 1.0 : -1.0;
  bool balanced = alpha >= 0;
  int32_t power = gamma <= 8 && gamma == floor(gamma) ? static_cast<int32_t>(gamma) : 0;
  a.focal = {balanced ? alpha : 1.0, balanced ? 1.0 - alpha : 1.0, gamma, parity, power};
  a.has_denominator = denominator.has_value();
  a.denominator = denominator.value_or(0.0);
  a.zero_on_empty = zero_on_empty;
  a.is_written = false;
  a.in_double = dtype == ScalarType::Double || input.scalar_type() == ScalarType::Double;
  a.half_precision = is_half(dtype) && is_half(input.scalar_type());

  a.space = space_of(input);
  STD_TORCH_CHECK(target.dim() == a.space.rank && target.numel() == a.space.numel,
                  "target and input differ in shape");
  set_operand(a.input, input, a.space, input, "input");
  set_operand(a.target, target, a.space, input, "target");
  set_operand(a.weight, weight, a.space, input, "weight");
  set_operand(a.pos_weight, pos_weight, a.space, input, "pos_weight");
  set_operand(a.sample_weight, sample_weight, a.space, input, "sample_weight");
  set_scalar(a.normalizer, normalizer, input, "normalizer");
  return a;
}

inline void merge_dimensions(BceArguments& a) {
  Operand* operands[] = {&a.input,         &a.target,   &a.weight,   &a.pos_weight,
                         &a.sample_weight, &a.upstream, &a.gradient, &a.loss};
  merge_dimensions(a.space, operands, with_loss(a.reduction, 8));
}

template <auto kRun>
Tensor run_forward(BceArguments& a, const Tensor& input, ScalarType dtype) {
  bool reduced = a.reduction != Reduction::kNone;
  Tensor loss =
      reduced ? empty_strided(input, dtype, 0, nullptr, nullptr) : empty_like(input, dtype);
  if (reduced) {
    a.loss.data = loss.data_ptr();
    a.loss.dtype = dtype_of(dtype);
  } else {
    set_operand(a.loss, loss, a.space, input, "loss");
  }
  merge_dimensions(a);
  kRun(a, input);
  return loss;
}

template <auto kRun>
Tensor bce(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
           std::optional<Tensor> pos_weight, std::optional<Tensor> sample_weight,
           std::optional<Tensor> normalizer, int64_t form, int64_t reduction, ScalarType dtype,
           double label_smoothing, std::optional<int64_t> ignore_index, double alpha, double gamma,
           std::optional<double> denominator, bool zero_on_empty) {
  BceArguments a =
      bce_arguments(input, target, weight, pos_weight, sample_weight, normalizer, form, reduction,
                    dtype, label_smoothing, ignore_index, alpha, gamma, denominator, zero_on_empty);
  return run_forward<kRun>(a, input, dtype);
}

template <auto kRun>
Tensor bce_with_gradient(Tensor gradient, const Tensor& input, const Tensor& target,
                         std::optional<Tensor> weight, std::optional<Tensor> pos_weight,
                         std::optional<Tensor> sample_weight, std::optional<Tensor> normalizer,
                         int64_t form, int64_t reduction, ScalarType dtype, double label_smoothing,
                         std::optional<int64_t> ignore_index, double alpha, double gamma,
                         std::optional<double> denominator, bool zero_on_empty) {
  BceArguments a =
      bce_arguments(input, target, weight, pos_weight, sample_weight, normalizer, form, reduction,
                    dtype, label_smoothing, ignore_index, alpha, gamma, denominator, zero_on_empty);
  set_operand(a.gradient, gradient, a.space, input, "gradient");
  return run_forward<kRun>(a, input, dtype);
}

template <auto kRun>
void bce_backward(Tensor gradient, bool written, const Tensor& grad_output, const Tensor& input,
                  const Tensor& target, std::optional<Tensor> weight,
                  std::optional<Tensor> pos_weight, std::optional<Tensor> sample_weight,
                  std::optional<Tensor> normalizer, int64_t form, int64_t reduction,
                  ScalarType dtype, double label_smoothing, std::optional<int64_t> ignore_index,
                  double alpha, double gamma, std::optional<double> denominator,
                  bool zero_on_empty) {
  BceArguments a =
      bce_arguments(input, target, weight, pos_weight, sample_weight, normalizer, form, reduction,
                    dtype, label_smoothing, ignore_index, alpha, gamma, denominator, zero_on_empty);
  set_operand(a.upstream, grad_output, a.space, input, "grad_output");
  a.is_written = written && grad_output.numel() == 1;
  set_operand(a.gradient, gradient, a.space, input, "gradient");
  merge_dimensions(a);
  kRun(a, input);
}

}  // namespace fused_ce
