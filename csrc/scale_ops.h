// The op that multiplies a gradient by the upstream one, around a device's `run`.
#pragma once

#include "tensor_operands.h"

namespace fused_ce {

template <auto kRun>
void scale_(Tensor gradient, const Tensor& scale) {
  STD_TORCH_CHECK(scale.numel() == 1, "scale must have one element");
  IndexSpace space;
  auto sizes = gradient.sizes();
  space.rank = static_cast<int>(sizes.size());
  space.numel = gradient.numel();
  for (int i = 0; i < space.rank; ++i) space.sizes[i] = sizes[i];
  Operand values, factor;
  set_operand(values, gradient, space, gradient, "gradient");
  set_operand(factor, scale, IndexSpace{}, gradient, "scale");
  Operand* operands[] = {&values};
  merge_dimensions(space, operands, 1);
  kRun(values, space, factor, gradient);
}

}  // namespace fused_ce
