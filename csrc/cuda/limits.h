// What a launcher must know of the device, and of the kernels.
#pragma once

namespace fused_ce {

constexpr int kThreads = 256;  // of a block
constexpr int kCudaRank = 16;  // dimensions that a kernel takes, merged

struct DeviceLimits {
  int multiprocessors;
  int shared_memory;                 // bytes that a block may ask for
  int multiprocessor_shared_memory;  // bytes for all blocks of a multiprocessor
  bool has_clusters;
};

// The architecture, such as 90, that the code for the current device was compiled for: an older one
// than the device's where that translates it from PTX.
int compiled_architecture();

// How many blocks of kThreads of a kernel, in clusters of `cluster`, the current device holds at
// once, or `blocks` if that is less: each block goes on to further work, and those that had to wait
// would do theirs when the others are done. The kernel may then be launched with that shared
// memory.
int resident_blocks(const void* kernel, int shared_bytes, int cluster, int blocks);

}  // namespace fused_ce
