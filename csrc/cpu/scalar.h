// One element of an operand, read or written from the CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../elementwise.h"
#include "../reduction.h"
#include "body.h"

namespace fused_ce {

inline double load_scalar(const Operand& operand) {
  const void* p = operand.data;
  switch (operand.dtype) {
    case Dtype::kFloat64:
      return *static_cast<const double*>(p);
    case Dtype::kFloat32:
      return *static_cast<const float*>(p);
    case Dtype::kFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::Half*>(p));
    case Dtype::kBFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(p));
    case Dtype::kBool:
    case Dtype::kUInt8:
      return *static_cast<const uint8_t*>(p);
    case Dtype::kInt8:
      return *static_cast<const int8_t*>(p);
    case Dtype::kInt16:
      return *static_cast<const int16_t*>(p);
    case Dtype::kInt32:
      return *static_cast<const int32_t*>(p);
    case Dtype::kInt64:
      return static_cast<double>(*static_cast<const int64_t*>(p));
  }
  return 0;
}

inline void store_scalar(const Operand& operand, double value) {
  void* p = operand.data;
  switch (operand.dtype) {
    case Dtype::kFloat64:
      *static_cast<double*>(p) = value;
      return;
    case Dtype::kFloat16:
      *static_cast<torch::headeronly::Half*>(p) = static_cast<float>(value);
      return;
    case Dtype::kBFloat16:
      *static_cast<torch::headeronly::BFloat16*>(p) = static_cast<float>(value);
      return;
    default:
      *static_cast<float*>(p) = static_cast<float>(value);
  }
}

inline void store_reduced(const Operand& loss, const double* sums,  // [chunks]
                          int64_t chunks, double denominator, bool zero_on_empty) {
  Sum sum;
  for (int64_t i = 0; i < chunks; ++i) sum.add(sums[i]);
  store_scalar(loss, reduced(sum.total(), denominator, zero_on_empty));
}

}  // namespace fused_ce
