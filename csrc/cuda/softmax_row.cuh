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

// Most rows merge to one dimension, those of images to two.
__device__ __forceinline__ int64_t row_offset(const CudaOperand& operand, const CudaSpace& rows,
                                              int64_t row) {
  if (operand.access == CudaOperand::kFlat) return row;
  if (rows.rank == 1) return row * operand.strides[0];
  if (rows.rank > 2) return offset_of(operand, rows, row);
  Division image = divide(row, rows, 0);
  return image.quotient * operand.strides[1] + image.remainder * operand.strides[0];
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

// What the cap makes of a logit, given that over the cap, and the cap's derivative there.
template <class Real>
struct Capped {
  Real value, slope;
};
template <Precision kPrecision, class Real>
__device__ __forceinline__ Capped<Real> cap(Real softcap, Real ratio) {
  Real t = math::tanh<kPrecision>(ratio);
  return {softcap * t, 1 - t * t};
}

// SoftmaxSums as several threads gather them. `reference` is at most kSlack below the largest
// logit, and moves so seldom that the pass is one exponential a class. It starts finite, so that a
// logit of -inf is infinitely far below it; one of +inf makes the sums NaN, and with them the loss
// and the gradient, as in torch.
template <class Real, Terms kTerms>
struct RowSums : SoftmaxSums<Real> {
  static constexpr int kSlack = 1;
  using SoftmaxSums<Real>::reference, SoftmaxSums<Real>::exponentials,
      SoftmaxSums<Real>::coefficients, SoftmaxSums<Real>::cost, SoftmaxSums<Real>::entropy;

  static __device__ __forceinline__ RowSums none() { return {{-kGreatest<Real>, 0, 0, 0, 0}}; }

  // Where e is large enough to matter in a sum, its exponent is small and needs no correction.
  static __device__ __forceinline__ Real exponential(Real shifted) {
    return math::exp_shifted<Precision::kHalf>(shifted);
  }

  __device__ __forceinline__ void refer_to(Real to) {
    Real shift = to - reference;
    Real factor = exponential(-shift);
    // Before the first finite logit there is nothing to correct, and `shift` may be infinite.
    if (reference > -kGreatest<Real>) cost += coefficients * shift;
    if constexpr (kTerms != Terms::kPlain) {
      entropy = factor == 0 ? Real(0) : factor * (entropy + shift * exponentials);
    }
    exponentials *= factor;
    reference = to;
  }

  __device__ __forceinline__ bool lacks_room(Real top) const { return top > reference + kSlack; }

  // Makes room for logits of which `top` is the largest.
  __device__ __forceinline__ void admit(Real top) {
    if (lacks_room(top)) refer_to(top);
  }

  // What some classes add.
  __device__ __forceinline__ void gather(Real more_exponentials) {
    exponentials += more_exponentials;
  }
  __device__ __forceinline__ void gather_terms(Real more_coefficients, Real more_cost) {
    coefficients += more_coefficients;
    cost += more_cost;
  }
  __device__ __forceinline__ const RowSums& settled() const { return *this; }

  // Adds up those of `kWidth` neighbouring lanes, in all of them.
  template <int kWidth>
  __device__ __forceinline__ void combine(bool with_coefficients) {
    refer_to(warp_max<kWidth>(reference));
    exponentials = warp_sum<kWidth>(exponentials);
    if (with_coefficients) {
      coefficients = warp_sum<kWidth>(coefficients);
      cost = warp_sum<kWidth>(cost);
    }
    if constexpr (kTerms != Terms::kPlain) entropy = warp_sum<kWidth>(entropy);
  }
};

// The sums of a thread that may add up a long row by itself: what rounding takes would be most of
// their error, and is added in the end.
template <class Real, Terms kTerms>
struct LongRowSums : RowSums<Real, kTerms> {
  using Sums = RowSums<Real, kTerms>;
  using Sums::exponentials, Sums::coefficients, Sums::cost;
  Real lost_exponentials, lost_coefficients, lost_cost;

  static __device__ __forceinline__ LongRowSums none() { return {Sums::none(), 0, 0, 0}; }

  __device__ __forceinline__ void admit(Real top) {
    if (!this->lacks_room(top)) return;
    exponentials = math::with_lost(exponentials, lost_exponentials);
    lost_exponentials = 0;
    this->refer_to(top);
  }
  __device__ __forceinline__ void gather(Real more_exponentials) {
    add(exponentials, lost_exponentials, more_exponentials);
  }
  __device__ __forceinline__ void gather_terms(Real more_coefficients, Real more_cost) {
    add(coefficients, lost_coefficients, more_coefficients);
    add(cost, lost_cost, more_cost);
  }
  __device__ __forceinline__ Sums settled() const {
    Sums sums = *this;
    sums.exponentials = math::with_lost(exponentials, lost_exponentials);
    sums.coefficients = math::with_lost(coefficients, lost_coefficients);
    sums.cost = math::with_lost(cost, lost_cost);
    return sums;
  }

 private:
  static __device__ __forceinline__ void add(Real& sum, Real& lost, Real term) {
    Real next = sum + term;
    lost += math::lost_in(sum, term, next);
    sum = next;
  }
};

// Adds logits, given before their scale, with coefficients of 1 if any.
template <class Sums, int kCount>
__device__ __forceinline__ void add_logits(Sums& sums, const float (&logits)[kCount], float scale,
                                           bool with_coefficients) {
  float top = logits[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, logits[i]);
  sums.admit(top * scale);
  float shifted[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) shifted[i] = fmaf(logits[i], scale, -sums.reference);
  if (with_coefficients) {
    float terms[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) terms[i] = shifted[i];
    sums.gather_terms(kCount, -pairwise_sum(terms));
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) shifted[i] = sums.exponential(shifted[i]);
  sums.gather(pairwise_sum(shifted));
}

// A difference of logits by which an exponential that is 0 may be multiplied.
__device__ __forceinline__ float finite(float shifted) { return fmaxf(shifted, -128.0f); }
__device__ __forceinline__ double finite(double shifted) { return fmax(shifted, -1024.0); }

// The label of a row and what it does to the row's loss.
template <class Real>
struct RowTarget {
  int64_t label;  // -1 where there is none to read a logit of
  Real weight;    // of the label's term: keep w_y, or 0 if ignored; NaN for a bad label
  Real factor;    // of the loss: sample_weight
  bool is_kept;
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

// `reports`: whether this thread is the one of the row's that reports a bad label.
// With kPlain, here and below, there are but int64 labels and the reduced loss: no weights,
// smoothing, scale, statistics or gradient from above. On rows of a few classes the checks for
// these would cost as much as the arithmetic.
template <class Real, bool kPlain = false>
__device__ __forceinline__ RowTarget<Real> load_target(const SoftmaxCeParams& p, int64_t row,
                                                       bool reports) {
  RowTarget<Real> target{-1, Real(0), Real(1), true};
  if (kPlain || !p.has_probabilities) {
    int64_t label =
        kPlain ? static_cast<const int64_t*>(p.target.data)[row]
               : load_label(p.target.data, p.target.dtype, row_offset(p.target, p.rows, row));
    target.is_kept = label != p.ignore_index;
    bool is_valid = static_cast<uint64_t>(label) < static_cast<uint64_t>(p.classes);
    target.label = is_valid && target.is_kept ? label : -1;
    target.weight = is_valid ? (kPlain ? Real(1) : constants<Real>(p).keep) : quiet_nan<Real>();
    if (!is_valid && target.is_kept && reports) {
      write_report(p.report, {0, Report::kLabel, row, p.rows.numel, label, 0});
    }
    if (!kPlain && !target.is_kept) {
      target.weight = 0;
      return target;
    }
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

// `label_logit` is l_y, or anything where the row has no valid label. The loss is found where it is
// wanted, and the logarithm, which costs as much as some classes, where anything needs it.
template <bool kPlain = false, class Real>
__device__ __forceinline__ SoftmaxRow<Real> row_result(const SoftmaxCeParams& p,
                                                       const RowTarget<Real>& target,
                                                       SoftmaxSums<Real> sums, Real label_logit,
                                                       bool wants_loss) {
  const Real z_loss = kPlain ? Real(0) : constants<Real>(p).z_loss;
  bool needs_logarithm = !kPlain && (z_loss != 0 || p.grad_entropy.data != nullptr);
  auto row = SoftmaxRow<Real>::of(sums, wants_loss || needs_logarithm);
  if (!wants_loss) return row;
  // An infinite probability makes all terms infinite, of either sign.
  if (!kPlain && sums.coefficients > kGreatest<Real>) sums.cost = sums.coefficients;
  row.set_loss(sums, kPlain || !p.has_probabilities, target.weight, label_logit, z_loss);
  row.loss = target.is_kept ? target.factor * row.loss : Real(0);
  return row;
}

template <bool kPlain = false, class Real, Terms kTerms>
__device__ __forceinline__ SoftmaxGradient<Real> row_gradient(const SoftmaxCeParams& p, int64_t row,
                                                              const RowTarget<Real>& target,
                                                              const RowSums<Real, kTerms>& sums,
                                                              const SoftmaxRow<Real>& result,
                                                              Real scale) {
  Real upstream = target.factor * scale, of_lse = 0, of_entropy = 0;
  if (!kPlain && p.is_backward) {
    upstream *= p.grad_loss.data != nullptr ? load<Real>(p.grad_loss, p.rows, row) : Real(0);
    if (!target.is_kept) upstream = 0;
    if (p.grad_lse.data != nullptr) of_lse = load<Real>(p.grad_lse, p.rows, row);
    if (kTerms != Terms::kPlain && p.grad_entropy.data != nullptr) {
      of_entropy = load<Real>(p.grad_entropy, p.rows, row);
    }
  }
  const Real z_loss = kPlain ? Real(0) : constants<Real>(p).z_loss;
  return SoftmaxGradient<Real>::evaluate(sums, result, target.weight, z_loss, upstream, of_lse,
                                         of_entropy);
}

template <class Real>
__device__ __forceinline__ void store_result(const SoftmaxCeParams& p, int64_t row,
                                             const SoftmaxRow<Real>& result) {
  if (p.loss.data != nullptr) store(p.loss, p.rows, row, result.loss);
  if (p.lse.data != nullptr) store(p.lse, p.rows, row, result.lse);
  if (p.entropy.data != nullptr) store(p.entropy, p.rows, row, result.entropy);
}

// `predicted` is the largest logit's class, `right` the label or the largest probability's class.
__device__ __forceinline__ void store_prediction(const SoftmaxCeParams& p, int64_t row,
                                                 int64_t predicted, int64_t right, bool is_kept) {
  if (p.prediction.data != nullptr) {
    static_cast<int64_t*>(p.prediction.data)[row_offset(p.prediction, p.rows, row)] = predicted;
  }
  if (p.correct.data != nullptr) {
    static_cast<bool*>(p.correct.data)[row_offset(p.correct, p.rows, row)] =
        is_kept && right == predicted;
  }
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

template <Scope kScope, int kGroup, class Sums>
__device__ __forceinline__ void combine(Sums& sums, Exchange<Sums>& exchange, int parity,
                                        bool with_coefficients) {
  sums.template combine<(kGroup < 32 ? kGroup : 32)>(with_coefficients);
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
    store(p.loss_scalar, 0, reduced(total, scale.denominator, p.zero_on_empty));
  }
}

template <class Kernel>
int resident_blocks(Kernel kernel, const SoftmaxCePlan& plan) {
  return resident_blocks(reinterpret_cast<const void*>(kernel), plan.shared_bytes, plan.cluster,
                         plan.blocks);
}

}  // namespace fused_ce
