// Launchers of the softmax cross entropy kernels: plain structs, no torch type.
#pragma once

#include <cuda_runtime_api.h>

#include "../softmax_ce.h"
#include "limits.h"
#include "operand.cuh"
#include "report.h"

namespace fused_ce {

struct SoftmaxCeWorkspace {
  unsigned* ticket;  // [1] by which the block that ends last is known
  double* sums;      // [blocks] each block's losses
  double* weights;   // [weight_blocks] sums of the labels' weights
};

// In the type that a kernel computes in.
template <class Real>
struct SoftmaxCeConstants {
  Real keep, share;  // 1 - label_smoothing, label_smoothing / classes
  Real softcap, inverse_softcap, logit_scale, z_loss;
};

struct SoftmaxCeParams {
  CudaSpace rows;
  int64_t classes;
  // [*rows] with labels, losses and statistics, [*rows, classes] the others, of which these are the
  // rows' strides.
  CudaOperand input, target, sample_weight, grad_loss, grad_lse, grad_entropy, loss, lse, entropy,
      prediction, correct, gradient;
  int64_t input_stride, target_stride, gradient_stride, weight_stride;  // of the classes
  TypedPointer weight;                                                  // [classes] or null
  TypedPointer normalizer;                                              // [1] or null
  TypedPointer loss_scalar;  // [1] or null: where the reduced loss goes
  TypedPointer unless_one;   // [1] or null: an upstream gradient, with nothing to do where it is 1
  SoftmaxCeWorkspace workspace;
  Report* report;  // [1] host-mapped; receives the first label out of bounds

  bool has_probabilities, is_backward, is_mean, sums_weights, zero_on_empty;
  bool has_coefficients;  // whether each class has a term in the loss, not the label's alone
  bool reads_all;         // whether ignored rows are read, too
  int weight_blocks;
  int64_t ignore_index;
  SoftmaxCeConstants<float> in_float;
  SoftmaxCeConstants<double> in_double;
  double denominator;  // of the mean, where it is known
};

// What a kernel adds up for each class: kPlain no more than the loss of a label needs; kStatistics
// what a cap, the entropy and the largest class do, too; kWeighted with a coefficient for each.
enum class Terms { kPlain, kStatistics, kWeighted };

struct SoftmaxCePlan {
  // Who takes a row: by options or dtypes, anything up to a block; a thread, where classes lie
  // apart; of dense ones, a thread (two classes), a few lanes, a warp, a block, a cluster of
  // blocks.
  enum Kernel { kGeneral, kSpread, kPair, kFew, kWarp, kBlock, kCluster };
  Kernel kernel;
  int group;  // threads a row, of a warp or the block
  int rows;   // side by side, that a thread of kSpread takes
  Terms terms;
  bool aligned;      // whether logits and gradient begin at a multiple of 16 bytes
  int cluster;       // blocks a row
  int kept_vectors;  // of 16 bytes that a row's threads in a block keep in shared memory, of the
                     // logits, and of probabilities as many
  int shared_bytes;  // of a block
  int blocks;        // at most
  int multiprocessors;
  int weight_blocks;
  size_t workspace_bytes;  // 0 where nothing is reduced
};

// Which kernel does it, on how many blocks, and what device memory it needs.
SoftmaxCePlan plan_softmax_ce(const SoftmaxCeArguments& arguments, const DeviceLimits& device);

// One launch, or two where a loss is reduced or the labels' weights are summed.
void launch_softmax_ce(const SoftmaxCeArguments& arguments, const SoftmaxCePlan& plan,
                       void* workspace, Report* report, cudaStream_t stream);

// The second of these, by kernel: softmax_ce_rows.cu, softmax_ce_few.cu.
void launch_softmax_ce_rows(const SoftmaxCeParams& params, const SoftmaxCePlan& plan,
                            cudaStream_t stream);
void launch_softmax_ce_few(const SoftmaxCeParams& params, const SoftmaxCePlan& plan,
                           cudaStream_t stream);

}  // namespace fused_ce
