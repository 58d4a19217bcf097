// The op that multiplies a gradient by the upstream one, around a device's `run`.
#pragma once

#include "tensor_operands.h"

namespace fused_ce {

template <auto kRun>
void scale_(Tensor gradient, const Tensor& scale) {
  IndexSpace space = space_of(gradient);
  Operand values, factor;
  set_operand(values, gradient, space, gradient, "gradient");
  set_scalar(factor, scale, gradient, "scale");
  Operand* operands[] = {&values};
  merge_dimensions(space, operands, 1);
  kRun(values, space, factor, gradient);
}

}  // namespace fused_ce
