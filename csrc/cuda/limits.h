// What a launcher must know of the device, and of the kernels.
#pragma once

namespace fused_ce {

constexpr int kCudaRank = 16;  // dimensions that a kernel takes, merged

struct DeviceLimits {
  int multiprocessors;
  int shared_memory;                 // bytes that a block may ask for
  int multiprocessor_shared_memory;  // bytes for all blocks of a multiprocessor
  bool has_clusters;
};

}  // namespace fused_ce
