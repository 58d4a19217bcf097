// How a kernel tells the host of bad input without a synchronisation: it writes to memory that both
// see, and the next call into the package, or fused_ce.check(), raises.
#pragma once

#include <stdint.h>

namespace fused_ce {

struct Report {
  unsigned state;  // 0: none, 1: being written, 2: complete
  bool is_target;  // else it is the input
  int64_t index;   // of the element in memory order
  double value;
};

}  // namespace fused_ce
