// What a launcher must know of the device.
#pragma once

namespace fused_ce {

struct DeviceLimits {
  int multiprocessors;
  int shared_memory;                 // bytes that a block may ask for
  int multiprocessor_shared_memory;  // bytes for all blocks of a multiprocessor
  bool has_clusters;
};

}  // namespace fused_ce
