// Launcher of the kernel that multiplies a gradient by the upstream one.
#pragma once

#include <cuda_runtime_api.h>

#include "operand.cuh"

namespace fused_ce {

struct ScaleParams {
  CudaSpace space;
  CudaOperand values;  // [*space]
  TypedPointer scale;  // [1]
};

// Returns at once, on the device, where the scale is 1.
void launch_scale(const ScaleParams& params, int multiprocessors, cudaStream_t stream);

}  // namespace fused_ce
