// One row of logits: the sums that its loss, statistics and gradient are made of, gathered by
// several threads in one pass over the classes, and what follows from them.
#pragma once

#include "../math.h"
#include "reduce.cuh"
#include "softmax_ce_kernel.h"

namespace fused_ce {

template <class Real>
constexpr Real kGreatest = std::is_same_v<Real, float> ? static_cast<Real>(3.402823466e38)
                                                       : static_cast<Real>(1.7976931348623157e308);
template <class Real>
__device__ __forceinline__ Real quiet_nan() {
  return static_cast<Real>(__int_as_float(0x7fc00000));
}

template <class T>
__device__ __forceinline__ T from_lane(T value, int distance) {
  return __shfl_xor_sync(0xffffffffu, value, distance);
}

// The first of the largest values; NaN counts as the largest, as it does in torch.argmax.
template <class Real>
struct Largest {
  Real value;
  int64_t index;

  static __device__ __forceinline__ Largest none() {
    return {static_cast<Real>(__int_as_float(0xff800000)), INT64_MAX};
  }
  __device__ __forceinline__ void offer(Real other, int64_t other_index) {
    bool is_nan = value != value, other_is_nan = other != other;
    bool ties = is_nan ? other_is_nan : value == other;
    if (ties ? other_index < index : !is_nan && (other_is_nan || other > value)) {
      value = other;
      index = other_index;
    }
  }
};

// What one pass over logits l_c, with a coefficient b_c for each, adds up. All sums refer to
// `reference`, which stays finite and within kSlack below the largest logit, so that no sum
// overflows and infinite logits give what the mathematics says; it moves so seldom that the pass is
// one exponential a class.
template <class Real, Precision kPrecision>
struct RowSums {
  static constexpr int kSlack = 8;
  Real reference;
  Real exponentials;  // sum of e = exp(l - reference)
  Real coefficients;  // sum of b
  Real weighted;      // sum of b (l - reference)
  Real entropy;       // sum of e (l - reference)

  static __device__ __forceinline__ RowSums none() { return {-kGreatest<Real>, 0, 0, 0, 0}; }

  static __device__ __forceinline__ Real exponential(Real shifted) {
    return math::exp_shifted<kPrecision>(shifted);
  }

  __device__ __forceinline__ void refer_to(Real to) {
    Real shift = reference - to;
    Real factor = exponential(shift);
    // Before the first finite logit there is nothing to correct, and `shift` may be infinite.
    if (reference > -kGreatest<Real>) weighted += coefficients * shift;
    entropy = factor == 0 ? Real(0) : factor * (entropy + shift * exponentials);
    exponentials *= factor;
    reference = to;
  }

  // Makes room for logits of which `top` is the largest.
  __device__ __forceinline__ void admit(Real top) {
    if (top > reference + kSlack) refer_to(top < kGreatest<Real> ? top : kGreatest<Real>);
  }

  // Adds up those of `width` lanes that differ in the lower bits of their number, in all of them.
  __device__ __forceinline__ void combine(int width, bool with_coefficients, bool with_entropy) {
    Real top = reference;
    for (int distance = width >> 1; distance > 0; distance >>= 1) {
      Real other = from_lane(top, distance);
      top = other > top ? other : top;
    }
    refer_to(top);
    for (int distance = width >> 1; distance > 0; distance >>= 1) {
      exponentials += from_lane(exponentials, distance);
      if (with_coefficients) {
        coefficients += from_lane(coefficients, distance);
        weighted += from_lane(weighted, distance);
      }
      if (with_entropy) entropy += from_lane(entropy, distance);
    }
  }
};

// The label of a row and what it does to the row's loss.
template <class Real>
struct RowTarget {
  int64_t label;  // -1 where there is none to read a logit of
  Real weight;    // of the label's term: keep w_y; NaN for a bad label
  Real factor;    // of the loss: sample_weight, 0 for an ignored row
  bool is_kept;
};

// The factors of dL/dl_c = e_c (exponential + entropy (l_c - reference + shift)) - b_c coefficient
// - [c == y] label, with e_c as in RowSums.
template <class Real>
struct RowGradient {
  Real exponential, entropy, shift, coefficient, label;
};

__device__ __forceinline__ int64_t load_label(const void* labels,  // [*rows]
                                              Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::kInt64:
      return static_cast<const int64_t*>(labels)[offset];
    case Dtype::kInt32:
      return static_cast<const int32_t*>(labels)[offset];
    case Dtype::kInt16:
      return static_cast<const int16_t*>(labels)[offset];
    case Dtype::kInt8:
      return static_cast<const int8_t*>(labels)[offset];
    default:
      return static_cast<const uint8_t*>(labels)[offset];
  }
}

template <class Real>
__device__ __forceinline__ RowTarget<Real> load_target(const SoftmaxCeParams& p, int64_t row) {
  RowTarget<Real> target{-1, Real(0), Real(1), true};
  if (!p.has_probabilities) {
    int64_t label = load_label(p.target.data, p.target.dtype, offset_of(p.target, p.rows, row));
    if (label == p.ignore_index) return {label, Real(0), Real(0), false};
    if (static_cast<uint64_t>(label) < static_cast<uint64_t>(p.classes)) {
      target.label = label;
      target.weight = static_cast<Real>(p.keep);
      if (p.weight.data != nullptr) {
        target.weight *= load<Real>(p.weight, label * p.weight_stride);
      }
    } else {
      target.weight = quiet_nan<Real>();
      if (p.report != nullptr) {
        write_report(p.report, {0, Report::kLabel, row, p.rows.numel, label, 0});
      }
    }
  }
  if (p.sample_weight.data != nullptr) target.factor = load<Real>(p.sample_weight, p.rows, row);
  return target;
}

template <class Real>
struct RowResult {
  Real loss, log_sum, lse, entropy;
  Real inverse;  // 1 / sums.exponentials
};

// `label_logit` is l_y, or anything where the row has no valid label.
template <class Real, Precision kPrecision>
__device__ __forceinline__ RowResult<Real> row_result(const SoftmaxCeParams& p,
                                                      const RowTarget<Real>& target,
                                                      const RowSums<Real, kPrecision>& sums,
                                                      Real label_logit) {
  RowResult<Real> result;
  result.log_sum = math::log(sums.exponentials);
  result.lse = sums.reference + result.log_sum;
  result.inverse = math::reciprocal(sums.exponentials);
  result.entropy = result.log_sum - sums.entropy * result.inverse;
  Real loss = 0;
  if (!p.has_probabilities) {
    loss = target.weight * (result.log_sum - (label_logit - sums.reference));
  }
  if (p.has_coefficients && p.classes > 0) {
    loss += sums.coefficients * result.log_sum - sums.weighted;
  }
  if (p.z_loss != 0) loss += static_cast<Real>(p.z_loss) * result.lse * result.lse;
  // An infinite logit, as in torch: inf - inf.
  if (result.lse > kGreatest<Real>) loss = result.inverse = quiet_nan<Real>();
  result.loss = target.is_kept ? target.factor * loss : Real(0);
  return result;
}

template <class Real, Precision kPrecision>
__device__ __forceinline__ RowGradient<Real> row_gradient(const SoftmaxCeParams& p, int64_t row,
                                                          const RowTarget<Real>& target,
                                                          const RowSums<Real, kPrecision>& sums,
                                                          const RowResult<Real>& result,
                                                          Real scale) {
  Real factor = target.factor * scale;
  if (p.is_backward) {
    factor *= p.grad_loss.data != nullptr ? load<Real>(p.grad_loss, p.rows, row) : Real(0);
  }
  RowGradient<Real> gradient{};
  if (target.is_kept) {
    Real total = sums.coefficients + target.weight;
    if (p.z_loss != 0) total += 2 * static_cast<Real>(p.z_loss) * result.lse;
    gradient.exponential = factor * total;
    gradient.coefficient = factor;
    gradient.label = factor * target.weight;
  }
  if (p.grad_lse.data != nullptr) {
    gradient.exponential += load<Real>(p.grad_lse, p.rows, row);
  }
  gradient.exponential *= result.inverse;
  if (p.grad_entropy.data != nullptr) {
    gradient.entropy = -load<Real>(p.grad_entropy, p.rows, row) * result.inverse;
    gradient.shift = result.entropy - result.log_sum;
  }
  return gradient;
}

template <class Real>
__device__ __forceinline__ void store_result(const SoftmaxCeParams& p, int64_t row,
                                             const RowResult<Real>& result) {
  if (p.loss.data != nullptr) store(p.loss, p.rows, row, result.loss);
  if (p.lse.data != nullptr) store(p.lse, p.rows, row, result.lse);
  if (p.entropy.data != nullptr) store(p.entropy, p.rows, row, result.entropy);
}

// The mean's denominator; 1 for a sum.
__device__ __forceinline__ double load_denominator(const SoftmaxCeParams& p) {
  if (p.sums_weights) {
    double mine = 0;
    for (int i = threadIdx.x; i < p.weight_blocks; i += kThreads) mine += p.workspace.weights[i];
    return block_sum<double>(mine);
  }
  if (p.normalizer.data != nullptr) return load<double>(p.normalizer, 0);
  return p.denominator;
}

}  // namespace fused_ce
