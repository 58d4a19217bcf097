// What a softmax cross entropy op is asked to do, free of torch types: the CPU bodies and the CUDA
// kernels both take this.
#pragma once

#include "elementwise.h"
#include "reduction.h"

namespace fused_ce {

// A tensor with a value for every class of every row. `strides` are those of the rows.
struct ClassOperand : Operand {
  int64_t class_stride = 0;  // in elements
};

struct SoftmaxCeArguments {
  IndexSpace rows;  // every dimension of the logits but that of the classes
  int64_t classes;
  ClassOperand input;     // [*rows, classes] logits
  ClassOperand target;    // [*rows] labels, or [*rows, classes] probabilities
  ClassOperand weight;    // [classes] or absent; no row strides
  Operand sample_weight;  // [*rows] or absent
  Operand normalizer;     // one element, or absent
  Operand grad_loss;      // [*rows]; absent: 1 in forward, 0 in backward
  Operand grad_lse;       // [*rows] or absent (0)
  Operand grad_entropy;   // [*rows] or absent (0)
  Operand loss;           // [*rows] without reduction, else one element; absent in backward
  Operand lse;            // [*rows] written in forward, read in backward; or absent
  Operand entropy;        // [*rows] written in forward, read in backward; or absent
  Operand prediction;     // [*rows] int64, or absent
  Operand correct;        // [*rows] bool, or absent
  ClassOperand gradient;  // [*rows, classes], or absent; may be `input`

  bool has_probabilities;
  bool is_backward;
  Reduction reduction;
  int64_t ignore_index;  // of labels
  double label_smoothing;
  double softcap;  // logits become softcap * tanh(logit_scale * x / softcap); 0 for none
  double logit_scale;
  double z_loss;
  bool has_denominator;
  double denominator;
  bool zero_on_empty;
  bool is_written;      // `gradient` holds that of a grad_loss of 1, which is one element
  bool in_double;       // compute in float64, and lse and entropy are float64; else float32
  bool half_precision;  // loss and gradient are half types: kHalf terms are enough

  // Whether the mean's denominator is the sum of the labels' weights, to be found first.
  bool sums_weights() const {
    return reduction == Reduction::kMean && !has_probabilities && !has_denominator && !normalizer;
  }
  // Whether an ignored row's logits matter: to its statistics, or to gradients that come through
  // these.
  bool reads_ignored() const {
    return is_backward ? has_ignored_gradient() : lse || entropy || prediction || correct;
  }
  // Whether an ignored row has a gradient: that of its statistics. Else it is zero, whatever the
  // row holds.
  bool has_ignored_gradient() const { return grad_lse || grad_entropy; }
};

// A mean over labels whose weights add up to 0 is NaN, as torch's is, and with label smoothing too,
// where the sum above is not 0.
FUSED_CE_HOST_DEVICE double checked_weights(double sum, bool zero_on_empty) {
  return sum == 0 && !zero_on_empty ? static_cast<double>(NAN) : sum;
}

}  // namespace fused_ce
