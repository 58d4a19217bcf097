// What a binary cross entropy op is asked to do, free of torch types: the CPU bodies and the CUDA
// kernels both take this.
#pragma once

#include "elementwise.h"
#include "math.h"
#include "reduction.h"

namespace fused_ce {

enum class BceForm : int32_t { kLogits, kProbability, kFocal };

struct BceArguments {
  IndexSpace space;
  Operand input;          // [*space] logits, or probabilities
  Operand target;         // [*space]
  Operand weight;         // [*space] or absent
  Operand pos_weight;     // [*space] or absent
  Operand sample_weight;  // [*space] or absent: multiplies as `weight` does
  Operand upstream;       // [*space] gradient from above, or absent (1)
  Operand loss;           // [*space] without reduction, else one element; absent in backward
  Operand gradient;       // [*space], or absent; may be `input`
  Operand normalizer;     // one element, or absent

  BceForm form;
  Reduction reduction;
  double target_scale;  // t becomes t * target_scale + target_shift, and 1 - t likewise
  double target_shift;
  bool has_ignore_index;
  int64_t ignore_index;
  FocalOptions<double> focal;
  bool has_denominator;
  double denominator;
  bool zero_on_empty;
  bool is_written;      // `gradient` holds that of an upstream gradient of 1, which is one element
  bool in_double;       // compute in float64
  bool half_precision;  // loss and gradient are half types: kHalf terms are enough

  bool counts_kept() const {
    return reduction == Reduction::kMean && has_ignore_index && !has_denominator && !normalizer;
  }
};

template <class Scalar>
FUSED_CE_HOST_DEVICE FocalOptions<Scalar> focal_options(const FocalOptions<double>& o) {
  return {static_cast<Scalar>(o.positive), static_cast<Scalar>(o.negative),
          static_cast<Scalar>(o.gamma), static_cast<Scalar>(o.parity), o.power};
}

}  // namespace fused_ce
