// Multiplies a gradient by the upstream one on CUDA.
#include <torch/csrc/stable/library.h>

#include "../scale_ops.h"
#include "device.h"
#include "scale_kernel.h"

namespace fused_ce {
namespace {

void run_cuda(const Operand& values, const IndexSpace& space, const Operand& scale,
              const Tensor& gradient) {
  int32_t device_index = gradient.get_device_index();
  check_rank(space);
  DeviceGuard guard(device_index);
  launch_scale({cuda_space(space), cuda_operand(values, space), {scale.data, scale.dtype}},
               multiprocessors(device_index), current_stream(device_index));
  check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CUDA, m) { m.impl("_scale_", TORCH_BOX(&scale_<run_cuda>)); }

}  // namespace fused_ce
