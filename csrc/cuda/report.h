// How a kernel tells the host of bad input without a synchronisation: it writes to memory that both
// see, and the next call into the package, or fused_ce.check(), raises.
#pragma once

#include <stdint.h>

namespace fused_ce {

struct Report {
  enum Kind : int32_t { kInputProbability, kTargetProbability, kLabel };
  unsigned state;  // 0: none, 1: being written, 2: complete
  Kind kind;
  int64_t index;  // of the element or row in memory order
  int64_t rows;   // of which the label's is one
  int64_t label;
  double value;  // of the probability
};

#if defined(__CUDACC__)
// Leaves the first piece of bad input; later ones are dropped.
__device__ __forceinline__ void write_report(Report* report,  // [1] host-mapped
                                             const Report& record) {
  // All devices, and the host, share the record.
  if (atomicCAS_system(&report->state, 0u, 1u) != 0u) return;
  report->kind = record.kind;
  report->index = record.index;
  report->rows = record.rows;
  report->label = record.label;
  report->value = record.value;
  __threadfence_system();
  atomicExch_system(&report->state, 2u);
}
#endif

}  // namespace fused_ce
