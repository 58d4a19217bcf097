// What losses have in common: how their elements or rows become one number.
#pragma once

#include <stdint.h>

#include "math.h"

namespace fused_ce {

enum class Reduction : int32_t { kNone, kMean, kSum };  // torch's numbers

// What multiplies the summed loss and each gradient. A denominator of 0 gives sum / 0, or 0 on
// demand.
FUSED_CE_HOST_DEVICE double inverse_of(double denominator, bool zero_on_empty) {
  return denominator == 0 && zero_on_empty ? 0.0 : 1.0 / denominator;
}

}  // namespace fused_ce
