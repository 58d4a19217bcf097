// The softmax cross entropy ops around a device's `run`: checks, allocation, operands.
#pragma once

#include <tuple>

#include "softmax_ce.h"
#include "tensor_operands.h"

namespace fused_ce {

// Bits of `outputs`: which statistics of the rows are wanted. The others come back empty.
enum SoftmaxCeOutput : int64_t { kLse = 1, kEntropy = 2, kPrediction = 4, kCorrect = 8 };

using SoftmaxCeResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The dimension of the classes: the only one of (C), the second of (N, C, d1, ..., dK).
inline int class_dimension(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

inline void set_class_operand(ClassOperand& operand, const Tensor& tensor, const Tensor& input,
                              const char* name) {
  check_device(tensor, input, name);
  auto sizes = tensor.sizes();
  auto strides = tensor.strides();
  STD_TORCH_CHECK(tensor.dim() == input.dim(), name, " and input differ in shape");
  int classes = class_dimension(input);
  for (int i = 0, row = 0; i < static_cast<int>(sizes.size()); ++i) {
    STD_TORCH_CHECK(sizes[i] == input.size(i), name, " and input differ in shape");
    if (i == classes) {
      operand.class_stride = strides[i];
    } else {
      operand.strides[row++] = sizes[i] == 1 ? 0 : strides[i];
    }
  }
  operand.data = tensor.numel() == 0 ? &operand : tensor.data_ptr();
  operand.dtype = dtype_of(tensor.scalar_type());
}

inline SoftmaxCeArguments softmax_ce_arguments(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& sample_weight, const std::optional<Tensor>& normalizer,
    int64_t reduction, ScalarType dtype, int64_t ignore_index, double label_smoothing,
    double softcap, double logit_scale, double z_loss, std::optional<double> denominator,
    bool zero_on_empty) {
  SoftmaxCeArguments a;
  a.is_backward = false;
  a.reduction = static_cast<Reduction>(reduction);
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.softcap = softcap;
  a.logit_scale = logit_scale;
  a.z_loss = z_loss;
  a.has_denominator = denominator.has_value();
  a.denominator = denominator.value_or(0.0);
  a.zero_on_empty = zero_on_empty;
  a.is_written = false;
  a.in_double = dtype == ScalarType::Double || input.scalar_type() == ScalarType::Double;

  a.half_precision = is_half(dtype) && is_half(input.scalar_type());

  STD_TORCH_CHECK(input.dim() > 0, "input must have a dimension of classes");
  int classes = class_dimension(input);
  a.classes = input.size(classes);
  for (int i = 0; i < input.dim(); ++i) {
    if (i == classes) continue;
    a.rows.sizes[a.rows.rank++] = input.size(i);
    a.rows.numel *= input.size(i);
  }
  set_class_operand(a.input, input, input, "input");
  a.has_probabilities = is_float(target.scalar_type());
  if (a.has_probabilities) {
    set_class_operand(a.target, target, input, "target");
  } else {
    STD_TORCH_CHECK(target.numel() == a.rows.numel && target.dim() == a.rows.rank,
                    "target must have one label for each row of the input");
    set_operand(a.target, target, a.rows, input, "target");
  }
  if (weight.has_value()) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->size(0) == a.classes,
                    "weight must have one element for each class");
    check_device(*weight, input, "weight");
    a.weight.class_stride = weight->stride(0);
    for (int i = 0; i < a.rows.rank; ++i) a.weight.strides[i] = 0;
    a.weight.data = a.classes == 0 ? &a.weight : weight->data_ptr();
    a.weight.dtype = dtype_of(weight->scalar_type());
  }
  set_operand(a.sample_weight, sample_weight, a.rows, input, "sample_weight");
  set_scalar(a.normalizer, normalizer, input, "normalizer");
  return a;
}

inline void merge_dimensions(SoftmaxCeArguments& a) {
  Operand* operands[] = {&a.input,      &a.target,  &a.sample_weight, &a.grad_loss,
                         &a.grad_lse,   &a.lse,     &a.entropy,       &a.grad_entropy,
                         &a.prediction, &a.correct, &a.gradient,      &a.loss};
  merge_dimensions(a.rows, operands, with_loss(a.reduction, 12));
}

// A new contiguous tensor of the rows' shape, or an empty one where it is not wanted.
inline Tensor row_output(Operand& operand, const SoftmaxCeArguments& a, const Tensor& input,
                         ScalarType dtype, bool wanted) {
  int64_t none = 0, one = 1;
  if (!wanted) return empty_strided(input, dtype, 1, &none, &one);
  int64_t strides[kMaxRank];
  int64_t stride = 1;
  for (int i = a.rows.rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= a.rows.sizes[i] > 0 ? a.rows.sizes[i] : 1;
  }
  Tensor output = empty_strided(input, dtype, a.rows.rank, a.rows.sizes, strides);
  set_operand(operand, output, a.rows, input, "output");
  return output;
}

template <auto kRun>
SoftmaxCeResults run_softmax_ce(SoftmaxCeArguments& a, const Tensor& input, ScalarType dtype,
                                int64_t outputs) {
  ScalarType real = a.in_double ? ScalarType::Double : ScalarType::Float;
  bool reduced = a.reduction != Reduction::kNone;
  Tensor loss = reduced ? empty_strided(input, dtype, 0, nullptr, nullptr)
                        : row_output(a.loss, a, input, dtype, true);
  if (reduced) {
    a.loss.data = loss.data_ptr();
    a.loss.dtype = dtype_of(dtype);
  }
  // These are of the computing type.
  a.half_precision &= !(outputs & (kLse | kEntropy));
  Tensor lse = row_output(a.lse, a, input, real, outputs & kLse);
  Tensor entropy = row_output(a.entropy, a, input, real, outputs & kEntropy);
  Tensor prediction = row_output(a.prediction, a, input, ScalarType::Long, outputs & kPrediction);
  Tensor correct = row_output(a.correct, a, input, ScalarType::Bool, outputs & kCorrect);
  merge_dimensions(a);
  kRun(a, input);
  return {loss, lse, entropy, prediction, correct};
}

template <auto kRun>
SoftmaxCeResults softmax_ce(const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                            std::optional<Tensor> sample_weight, std::optional<Tensor> normalizer,
                            int64_t outputs, int64_t reduction, ScalarType dtype,
                            int64_t ignore_index, double label_smoothing, double softcap,
                            double logit_scale, double z_loss, std::optional<double> denominator,
                            bool zero_on_empty) {
  SoftmaxCeArguments a = softmax_ce_arguments(
      input, target, weight, sample_weight, normalizer, reduction, dtype, ignore_index,
      label_smoothing, softcap, logit_scale, z_loss, denominator, zero_on_empty);
  return run_softmax_ce<kRun>(a, input, dtype, outputs);
}

template <auto kRun>
SoftmaxCeResults softmax_ce_with_gradient(Tensor gradient, const Tensor& input,
                                          const Tensor& target, std::optional<Tensor> weight,
                                          std::optional<Tensor> sample_weight,
                                          std::optional<Tensor> normalizer, int64_t outputs,
                                          int64_t reduction, ScalarType dtype, int64_t ignore_index,
                                          double label_smoothing, double softcap,
                                          double logit_scale, double z_loss,
                                          std::optional<double> denominator, bool zero_on_empty) {
  SoftmaxCeArguments a = softmax_ce_arguments(
      input, target, weight, sample_weight, normalizer, reduction, dtype, ignore_index,
      label_smoothing, softcap, logit_scale, z_loss, denominator, zero_on_empty);
  set_class_operand(a.gradient, gradient, input, "gradient");
  return run_softmax_ce<kRun>(a, input, dtype, outputs);
}

template <auto kRun>
void softmax_ce_backward(Tensor gradient, bool written, std::optional<Tensor> grad_loss,
                         std::optional<Tensor> grad_lse, std::optional<Tensor> grad_entropy,
                         std::optional<Tensor> lse, std::optional<Tensor> entropy,
                         const Tensor& input, const Tensor& target, std::optional<Tensor> weight,
                         std::optional<Tensor> sample_weight, std::optional<Tensor> normalizer,
                         int64_t reduction, ScalarType dtype, int64_t ignore_index,
                         double label_smoothing, double softcap, double logit_scale, double z_loss,
                         std::optional<double> denominator, bool zero_on_empty) {
  SoftmaxCeArguments a = softmax_ce_arguments(
      input, target, weight, sample_weight, normalizer, reduction, dtype, ignore_index,
      label_smoothing, softcap, logit_scale, z_loss, denominator, zero_on_empty);
  a.is_backward = true;
  a.is_written = written && grad_loss.has_value() && grad_loss->numel() == 1;
  set_operand(a.grad_loss, grad_loss, a.rows, input, "grad_loss");
  set_operand(a.grad_lse, grad_lse, a.rows, input, "grad_lse");
  set_operand(a.grad_entropy, grad_entropy, a.rows, input, "grad_entropy");
  set_operand(a.lse, lse, a.rows, input, "lse");
  set_operand(a.entropy, entropy, a.rows, input, "entropy");
  set_class_operand(a.gradient, gradient, input, "gradient");
  merge_dimensions(a);
  kRun(a, input);
}

}  // namespace fused_ce
