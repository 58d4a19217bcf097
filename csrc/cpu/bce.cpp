// Binary cross entropy on the CPU: registers the ops and divides the work among torch's threads.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>
#include <stdexcept>

#include "../bce_ops.h"
#include "body.h"
#include "memory.h"
#include "scalar.h"

namespace fused_ce {
namespace {

double denominator_of(const BceArguments& a, int64_t chunks) {
  if (a.normalizer) return load_scalar(a.normalizer);
  if (a.has_denominator) return a.denominator;
  if (!a.has_ignore_index) return static_cast<double>(a.space.numel);
  std::atomic<int64_t> kept{0};
  torch::stable::parallel_for(0, chunks, kChunksPerThread, [&](int64_t first, int64_t last) {
    int64_t end = last * kChunk < a.space.numel ? last * kChunk : a.space.numel;
    kept += cpu_bodies().bce_count_kept(a, first * kChunk, end);
  });
  return static_cast<double>(kept.load());
}

void run_cpu(const BceArguments& a, const Tensor&) {
  if (a.is_written && load_scalar(a.upstream) == 1.0) return;
  const CpuBodies& bodies = cpu_bodies();
  int64_t numel = a.space.numel;
  int64_t chunks = (numel + kChunk - 1) / kChunk;
  double denominator = a.reduction == Reduction::kMean ? denominator_of(a, chunks) : 1.0;
  double inverse = inverse_of(denominator, a.zero_on_empty);
  if (a.gradient && a.gradient.data != a.input.data) {
    use_huge_pages(a.gradient, last_offset(a.gradient, a.space));
  }

  double few[64];
  std::unique_ptr<double[]> many(chunks > 64 ? new double[chunks] : nullptr);
  double* sums = chunks > 64 ? many.get() : few;  // [chunks]
  std::atomic<unsigned> out_of_range{0};
  torch::stable::parallel_for(0, chunks, kChunksPerThread, [&](int64_t first, int64_t last) {
    unsigned found = 0;
    for (int64_t i = first; i < last; ++i) {
      int64_t end = (i + 1) * kChunk < numel ? (i + 1) * kChunk : numel;
      sums[i] = bodies.bce_chunk(a, i * kChunk, end, inverse, &found);
    }
    if (found != 0) out_of_range |= found;
  });
  // Torch's own words, which STD_TORCH_CHECK would put a source line before.
  if (out_of_range & kInputOutOfRange) {
    throw std::runtime_error("all elements of input should be between 0 and 1");
  }
  if (out_of_range & kTargetOutOfRange) {
    throw std::runtime_error("all elements of target should be between 0 and 1");
  }
  if (!a.loss || a.reduction == Reduction::kNone) return;
  store_reduced(a.loss, sums, chunks, denominator, a.zero_on_empty);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) {
  m.impl("_bce", TORCH_BOX(&bce<run_cpu>));
  m.impl("_bce_with_gradient", TORCH_BOX(&bce_with_gradient<run_cpu>));
  m.impl("_bce_backward", TORCH_BOX(&bce_backward<run_cpu>));
}

}  // namespace fused_ce
