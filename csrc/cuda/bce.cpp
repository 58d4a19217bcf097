// Binary cross entropy on CUDA: registers the ops and launches the kernels of bce_kernel.cu.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../bce_ops.h"
#include "bce_kernel.h"
#include "device.h"

namespace fused_ce {
namespace {

void run_cuda(const BceArguments& a, const Tensor& input) {
  int32_t device_index = input.get_device_index();
  check_rank(a.space);
  DeviceGuard guard(device_index);
  raise_report();
  Report* report = a.form == BceForm::kProbability ? shared_report() : nullptr;
  BcePlan plan = plan_bce(a, multiprocessors(device_index));
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) workspace = device_memory(input, plan.workspace_bytes);
  launch_bce(a, plan, workspace ? workspace->data_ptr() : nullptr, report,
             current_stream(device_index));
  check_launch();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CUDA, m) {
  m.impl("_bce", TORCH_BOX(&bce<run_cuda>));
  m.impl("_bce_with_gradient", TORCH_BOX(&bce_with_gradient<run_cuda>));
  m.impl("_bce_backward", TORCH_BOX(&bce_backward<run_cuda>));
}

}  // namespace fused_ce
