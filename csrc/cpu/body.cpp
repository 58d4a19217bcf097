// The inner loops of the CPU ops, compiled once for each instruction set: FUSED_CE_BODIES names the
// table they end up in.
#include "body.h"

#include "bce_loops.h"
#include "softmax_ce_loops.h"

namespace fused_ce {
namespace {

template <class Real>
void scale_chunk(const Operand& values, const IndexSpace& space, int64_t begin, int64_t end,
                 double factor) {
  alignas(64) Real buffer[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    int count = end - at < kBlock ? static_cast<int>(end - at) : kBlock;
    gather(values, space, at, count, buffer);
    for (int i = 0; i < count; ++i) buffer[i] *= static_cast<Real>(factor);
    scatter(buffer, values, space, at, count);
  }
}

void scale_chunk_any(const Operand& values, const IndexSpace& space, int64_t begin, int64_t end,
                     double factor) {
  values.dtype == Dtype::kFloat64 ? scale_chunk<double>(values, space, begin, end, factor)
                                  : scale_chunk<float>(values, space, begin, end, factor);
}

}  // namespace

#define FUSED_CE_STRING(x) #x
#define FUSED_CE_NAME(x) FUSED_CE_STRING(x)
extern const CpuBodies FUSED_CE_BODIES{FUSED_CE_NAME(FUSED_CE_CAPABILITY),
                                       bce_chunk_any,
                                       bce_count_kept,
                                       softmax_ce_labels,
                                       softmax_ce_chunk,
                                       scale_chunk_any};

}  // namespace fused_ce
