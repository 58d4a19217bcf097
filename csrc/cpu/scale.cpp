// Multiplies a gradient by the upstream one on the CPU; does nothing when that is 1.
#include <torch/csrc/stable/library.h>

#include "../scale_ops.h"
#include "body.h"
#include "scalar.h"

namespace fused_ce {
namespace {

void run_cpu(const Operand& values, const IndexSpace& space, const Operand& scale, const Tensor&) {
  double factor = load_scalar(scale);
  if (factor == 1.0) return;
  int64_t chunks = (space.numel + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, kChunksPerThread, [&](int64_t first, int64_t last) {
    int64_t end = last * kChunk < space.numel ? last * kChunk : space.numel;
    cpu_bodies().scale_chunk(values, space, first * kChunk, end, factor);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) { m.impl("_scale_", TORCH_BOX(&scale_<run_cpu>)); }

}  // namespace fused_ce
