// What losses have in common: how their elements or rows become one number.
#pragma once

#include <stdint.h>

#include "math.h"

namespace fused_ce {

enum class Reduction : int32_t { kNone, kMean, kSum };  // torch's numbers

// How many of `operands` operands lie in the index space, the last of which is the loss: a reduced
// one is a single element.
inline int with_loss(Reduction reduction, int operands) {
  return reduction == Reduction::kNone ? operands : operands - 1;
}

// A mean over nothing, whatever the sum, is 0 on demand.
FUSED_CE_HOST_DEVICE double reduced(double sum, double denominator, bool zero_on_empty) {
  return denominator == 0 && zero_on_empty ? 0.0 : sum / denominator;
}
// What multiplies each gradient.
FUSED_CE_HOST_DEVICE double inverse_of(double denominator, bool zero_on_empty) {
  return reduced(1.0, denominator, zero_on_empty);
}

}  // namespace fused_ce
