// Softmax cross entropy on CUDA: registers the ops and launches the kernels of
// softmax_ce_kernel.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../softmax_ce_ops.h"
#include "device.h"
#include "softmax_ce_kernel.h"

namespace fused_ce {
namespace {

void run_cuda(const SoftmaxCeArguments& a, const Tensor& input) {
  int32_t device_index = input.get_device_index();
  check_rank(a.rows);
  DeviceGuard guard(device_index);
  raise_report();
  SoftmaxCePlan plan = plan_softmax_ce(a, device_limits(device_index));
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) workspace = device_memory(input, plan.workspace_bytes);
  launch_softmax_ce(a, plan, workspace ? workspace->data_ptr() : nullptr,
                    a.has_probabilities ? nullptr : shared_report(), current_stream(device_index));
  check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CUDA, m) {
  m.impl("_softmax_ce", TORCH_BOX(&softmax_ce<run_cuda>));
  m.impl("_softmax_ce_with_gradient", TORCH_BOX(&softmax_ce_with_gradient<run_cuda>));
  m.impl("_softmax_ce_backward", TORCH_BOX(&softmax_ce_backward<run_cuda>));
}

}  // namespace fused_ce
