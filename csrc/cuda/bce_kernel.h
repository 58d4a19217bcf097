// Launchers of the binary cross entropy kernels: plain structs, no torch type.
#pragma once

#include <cuda_runtime_api.h>

#include "../bce.h"
#include "operand.cuh"
#include "report.h"

namespace fused_ce {

// One per-block partial result, and the ticket by which the last block to end is known.
struct BceWorkspace {
  unsigned* ticket;  // [1]
  double* sums;      // [blocks]
  int64_t* kept;     // [blocks] targets that are not ignore_index
};

struct BceKernelParams {
  CudaSpace space;
  CudaOperand input, target, pos_weight, loss, gradient;  // each [*space]
  int factors_count;
  CudaOperand factors[3];    // [factors_count], each [*space]: what multiplies loss and gradient
  TypedPointer normalizer;   // [1] or null
  TypedPointer unless_one;   // [1] or null: an upstream gradient, with nothing to do where it is 1
  TypedPointer loss_scalar;  // [1] or null: where the reduced loss goes
  BceWorkspace workspace;
  Report* report;  // [1] host-mapped; receives the first probability outside [0, 1]

  BceForm form;
  double target_scale, target_shift;
  bool has_ignore_index, counts_kept, zero_on_empty, is_mean;
  int64_t ignore_index;
  float ignore_float;  // the same where it is a float, else NaN
  FocalOptions<double> focal;
  double denominator;  // of the mean, where neither `normalizer` nor `counts_kept`
};

struct BcePlan {
  int blocks;
  size_t workspace_bytes;  // 0 where nothing is reduced
};

// How many blocks the kernels run on, and what device memory they need.
BcePlan plan_bce(const BceArguments& arguments, int multiprocessors);

// One launch, or two where a loss is reduced or targets are counted.
void launch_bce(const BceArguments& arguments, const BcePlan& plan, void* workspace, Report* report,
                cudaStream_t stream);

}  // namespace fused_ce
