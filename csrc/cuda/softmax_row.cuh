// One row of logits: the sums that its loss, statistics and gradient are made of, gathered by
// several threads in one pass over the classes, and what follows from them.
#pragma once

#include <cooperative_groups.h>

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

// Most rows merge to one dimension.
__device__ __forceinline__ int64_t row_offset(const CudaOperand& operand, const CudaSpace& rows,
                                              int64_t row) {
  return rows.rank == 1 ? row * operand.strides[0] : offset_of(operand, rows, row);
}

template <class Real>
__device__ __forceinline__ const SoftmaxCeConstants<Real>& constants(const SoftmaxCeParams& p) {
  if constexpr (std::is_same_v<Real, float>) {
    return p.in_float;
  } else {
    return p.in_double;
  }
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

  template <int kWidth>
  __device__ __forceinline__ void combine() {
    if constexpr (kWidth > 1) {
      offer(from_lane<kWidth / 2>(value), from_lane<kWidth / 2>(index));
      combine<kWidth / 2>();
    }
  }
};

// What one pass over logits l_c, with a coefficient b_c for each, adds up. All sums refer to
// `reference`, which stays finite and within kSlack below the largest logit, so that no sum
// overflows and infinite logits give what the mathematics says; it moves so seldom that the pass is
// one exponential a class.
template <class Real, bool kEntropy>
struct RowSums {
  static constexpr int kSlack = 1;
  Real reference;
  Real exponentials;  // sum of e = exp(l - reference)
  Real coefficients;  // sum of b
  Real weighted;      // sum of b (l - reference)
  Real entropy;       // sum of e (l - reference)

  static __device__ __forceinline__ RowSums none() { return {-kGreatest<Real>, 0, 0, 0, 0}; }

  // Where e is large enough to matter in a sum, its exponent is small and needs no correction.
  static __device__ __forceinline__ Real exponential(Real shifted) {
    return math::exp_shifted<Precision::kHalf>(shifted);
  }

  __device__ __forceinline__ void refer_to(Real to) {
    Real shift = reference - to;
    Real factor = exponential(shift);
    // Before the first finite logit there is nothing to correct, and `shift` may be infinite.
    if (reference > -kGreatest<Real>) weighted += coefficients * shift;
    if constexpr (kEntropy) {
      entropy = factor == 0 ? Real(0) : factor * (entropy + shift * exponentials);
    }
    exponentials *= factor;
    reference = to;
  }

  // An infinite logit, which makes the loss and the gradient NaN, as in torch.
  __device__ __forceinline__ bool has_infinity() const { return exponentials > kGreatest<Real>; }

  // Makes room for logits of which `top` is the largest.
  __device__ __forceinline__ void admit(Real top) {
    if (top > reference + kSlack) refer_to(top < kGreatest<Real> ? top : kGreatest<Real>);
  }

  // Logits before their scale, with coefficients of 1 if any.
  template <int kCount>
  __device__ __forceinline__ void add(const Real (&logits)[kCount], Real scale,
                                      bool with_coefficients) {
    Real top = logits[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, logits[i]);
    admit(top * scale);
    Real shifted[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) shifted[i] = fmaf(logits[i], scale, -reference);
    if (with_coefficients) {
      coefficients += kCount;
#pragma unroll
      for (int i = 0; i < kCount; ++i) weighted += shifted[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) exponentials += exponential(shifted[i]);
  }

  // Adds up those of `kWidth` neighbouring lanes, in all of them.
  template <int kWidth>
  __device__ __forceinline__ void combine(bool with_coefficients) {
    refer_to(warp_max<kWidth>(reference));
    exponentials = warp_sum<kWidth>(exponentials);
    if (with_coefficients) {
      coefficients = warp_sum<kWidth>(coefficients);
      weighted = warp_sum<kWidth>(weighted);
    }
    if constexpr (kEntropy) entropy = warp_sum<kWidth>(entropy);
  }
};

// The label of a row and what it does to the row's loss.
template <class Real>
struct RowTarget {
  int64_t label;  // -1 where there is none to read a logit of
  Real weight;    // of the label's term: keep w_y; NaN for a bad label
  Real factor;    // of the loss: sample_weight
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

// With kPlain, here and below, there are but int64 labels and the reduced loss: no weights,
// smoothing, scale, statistics or gradient from above. On rows of a few classes the checks for
// these would cost as much as the arithmetic.
template <class Real, bool kPlain = false>
__device__ __forceinline__ RowTarget<Real> load_target(const SoftmaxCeParams& p, int64_t row) {
  RowTarget<Real> target{-1, Real(0), Real(1), true};
  if (kPlain || !p.has_probabilities) {
    int64_t label =
        kPlain ? static_cast<const int64_t*>(p.target.data)[row]
               : load_label(p.target.data, p.target.dtype, row_offset(p.target, p.rows, row));
    target.is_kept = label != p.ignore_index;
    bool is_valid = static_cast<uint64_t>(label) < static_cast<uint64_t>(p.classes);
    target.label = is_valid && target.is_kept ? label : -1;
    target.weight = is_valid ? (kPlain ? Real(1) : constants<Real>(p).keep) : quiet_nan<Real>();
    if (!target.is_kept) return target;
    if (!is_valid) write_report(p.report, {0, Report::kLabel, row, p.rows.numel, label, 0});
    if (!kPlain && p.weight.data != nullptr && is_valid) {
      target.weight *= load<Real>(p.weight, label * p.weight_stride);
    }
  }
  if (!kPlain && p.sample_weight.data != nullptr) {
    target.factor = load<Real>(p.sample_weight, p.rows, row);
  }
  return target;
}

// That of an ignored row is zero, whatever the row holds, where no statistic's flows into it.
template <bool kPlain = false, class Real>
__device__ __forceinline__ bool has_gradient(const SoftmaxCeParams& p,
                                             const RowTarget<Real>& target) {
  if (kPlain) return target.is_kept;
  return target.is_kept || (p.is_backward && p.reads_all);
}

template <class Real>
struct RowResult {
  Real loss, log_sum, lse, entropy;
};

// `label_logit` is l_y, or anything where the row has no valid label.
template <bool kPlain = false, class Real, bool kEntropy>
__device__ __forceinline__ RowResult<Real> row_result(const SoftmaxCeParams& p,
                                                      const RowTarget<Real>& target,
                                                      const RowSums<Real, kEntropy>& sums,
                                                      Real label_logit) {
  RowResult<Real> result;
  result.log_sum = math::log(sums.exponentials);
  result.lse = sums.reference + result.log_sum;
  result.entropy = 0;
  if constexpr (kEntropy) {
    result.entropy = result.log_sum - sums.entropy * math::reciprocal(sums.exponentials);
  }
  Real loss = 0;
  if (kPlain || !p.has_probabilities) {
    loss = target.weight * (result.log_sum - (label_logit - sums.reference));
  }
  if (!kPlain && p.has_coefficients && p.classes > 0) {
    Real spread = sums.coefficients * result.log_sum - sums.weighted;
    // An infinite probability makes both terms infinite, of either sign.
    loss += sums.coefficients > kGreatest<Real> ? sums.coefficients : spread;
  }
  Real z_loss = kPlain ? Real(0) : constants<Real>(p).z_loss;
  if (z_loss != 0) loss += z_loss * result.lse * result.lse;
  if (sums.has_infinity()) loss = quiet_nan<Real>();
  result.loss = target.is_kept ? target.factor * loss : Real(0);
  return result;
}

template <bool kPlain = false, class Real, bool kEntropy>
__device__ __forceinline__ RowGradient<Real> row_gradient(const SoftmaxCeParams& p, int64_t row,
                                                          const RowTarget<Real>& target,
                                                          const RowSums<Real, kEntropy>& sums,
                                                          Real scale) {
  Real factor = target.factor * scale;
  if (!kPlain && p.is_backward) {
    factor *= p.grad_loss.data != nullptr ? load<Real>(p.grad_loss, p.rows, row) : Real(0);
  }
  Real z_loss = kPlain ? Real(0) : constants<Real>(p).z_loss;
  Real log_sum = 0;
  if (z_loss != 0 || (!kPlain && p.grad_entropy.data != nullptr))
    log_sum = math::log(sums.exponentials);
  RowGradient<Real> gradient{};
  if (kPlain || target.is_kept) {
    Real total = sums.coefficients + target.weight;
    if (z_loss != 0) total += 2 * z_loss * (sums.reference + log_sum);
    gradient.exponential = factor * total;
    gradient.coefficient = factor;
    gradient.label = factor * target.weight;
  }
  if (!kPlain && p.grad_lse.data != nullptr)
    gradient.exponential += load<Real>(p.grad_lse, p.rows, row);
  Real inverse = sums.has_infinity() ? quiet_nan<Real>() : math::reciprocal(sums.exponentials);
  gradient.exponential *= inverse;
  if (!kPlain && p.grad_entropy.data != nullptr) {
    gradient.entropy = -load<Real>(p.grad_entropy, p.rows, row) * inverse;
    gradient.shift = -sums.entropy * inverse;  // the entropy without log_sum
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

// Threads that share a row.
enum class Scope { kWarp, kBlock, kCluster };
constexpr int kMostBlocks = 8;  // of a cluster; more are not portable

// How the sums of a row's threads come together: those of a warp by shuffles; the warps', and then
// the blocks' of a cluster, through shared memory and shuffles again. Rows alternate between two
// buffers, so that one barrier a row is enough.
template <class Sums>
struct Exchange {
  Sums warps[2][kWarps];
  Sums blocks[2];
};

template <Scope kScope, class Sums>
__device__ __forceinline__ void combine(Sums& sums, Exchange<Sums>& exchange, int parity,
                                        bool with_coefficients) {
  sums.template combine<32>(with_coefficients);
  if constexpr (kScope == Scope::kWarp) {
    __syncwarp();  // a lane has read the label's logit, which another may overwrite
  } else {
    if (threadIdx.x % 32 == 0) exchange.warps[parity][threadIdx.x / 32] = sums;
    __syncthreads();
    sums = exchange.warps[parity][threadIdx.x % kWarps];
    sums.template combine<kWarps>(with_coefficients);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kScope == Scope::kCluster) {
    auto cluster = cooperative_groups::this_cluster();
    if (threadIdx.x == 0) exchange.blocks[parity] = sums;
    cluster.sync();
    // Ranks past the last hold nothing.
    unsigned rank = threadIdx.x % kMostBlocks, blocks = cluster.num_blocks();
    sums = Sums::none();
    if (rank < blocks) sums = *cluster.map_shared_rank(&exchange.blocks[parity], rank);
    sums.template combine<kMostBlocks>(with_coefficients);
  }
#endif
}

struct Scale {
  double denominator;  // of the mean; 1 for a sum
  double inverse;      // what each gradient is multiplied by
};

__device__ __forceinline__ Scale load_scale(const SoftmaxCeParams& p) {
  __shared__ Scale scale;
  if (threadIdx.x < 32) {
    double denominator = p.denominator;
    if (p.sums_weights) {
      double mine = 0;
      for (int i = threadIdx.x; i < p.weight_blocks; i += 32) mine += p.workspace.weights[i];
      denominator = checked_weights(warp_sum(mine), p.zero_on_empty);
    } else if (p.normalizer.data != nullptr) {
      denominator = load<double>(p.normalizer, 0);
    }
    if (threadIdx.x == 0) scale = {denominator, inverse_of(denominator, p.zero_on_empty)};
  }
  __syncthreads();
  return scale;
}

// Adds up the losses of all threads of the grid in a fixed order.
template <class Real>
__device__ __forceinline__ void reduce_loss(const SoftmaxCeParams& p, Real loss,
                                            const Scale& scale) {
  double total;
  if (grid_sum(loss, p.workspace.sums, p.workspace.ticket, total) && threadIdx.x == 0) {
    store(p.loss_scalar, 0,
          scale.denominator == 0 ? total * scale.inverse : total / scale.denominator);
  }
}

}  // namespace fused_ce
