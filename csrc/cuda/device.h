// The CUDA device of a tensor: its stream, its size, and the report that kernels leave for the
// host.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <string>

#include "../tensor_operands.h"
#include "limits.h"
#include "report.h"

namespace fused_ce {

// Makes `device_index` current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
  int current_;
};

// Torch's current stream on the device.
cudaStream_t current_stream(int32_t device_index);
int multiprocessors(int32_t device_index);
DeviceLimits device_limits(int32_t device_index);
inline void check_rank(const IndexSpace& space) {
  STD_TORCH_CHECK(space.rank <= kCudaRank, "more than ", kCudaRank,
                  " dimensions that cannot be merged are not supported on CUDA");
}
// Raises on an error of the last launch.
void check_launch();

// The host-mapped report that every kernel writes to. Allocated at the first call.
Report* shared_report();
// What a kernel has reported since the last call, as a message; empty where nothing was.
std::string take_report();
// Raises what a kernel has reported.
void raise_report();
// Memory on the tensor's device for the length of a call.
inline Tensor device_memory(const Tensor& like, size_t bytes) {
  int64_t size = static_cast<int64_t>(bytes), stride = 1;
  return empty_strided(like, ScalarType::Byte, 1, &size, &stride);
}

}  // namespace fused_ce
