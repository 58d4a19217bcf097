// Multiplies a gradient by the upstream one, in place; does nothing when that is 1.
#include <torch/csrc/stable/library.h>

#include "../tensor_operands.h"
#include "body.h"
#include "scalar.h"

namespace fused_ce {
namespace {

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
  double by = load_scalar(factor);
  if (by == 1.0) return;
  Operand* operands[] = {&values};
  merge_dimensions(space, operands, 1);
  int64_t chunks = (space.numel + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, 2, [&](int64_t first, int64_t last) {
    int64_t end = last * kChunk < space.numel ? last * kChunk : space.numel;
    cpu_bodies().scale_chunk(values, space, first * kChunk, end, by);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) { m.impl("_scale_", TORCH_BOX(&scale_)); }

}  // namespace fused_ce
