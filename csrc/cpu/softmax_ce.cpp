// Softmax cross entropy on the CPU: registers the ops and divides the rows among torch's threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>

#include "../softmax_ce_ops.h"
#include "body.h"
#include "memory.h"
#include "scalar.h"

namespace fused_ce {
namespace {

// Calls f(chunk, first row, last row) for chunks of `rows` rows, on torch's threads. These take a
// few chunks at a time as they get done, since rows that are ignored cost nothing and lie together.
template <class F>
void for_each_chunk(const SoftmaxCeArguments& a, int64_t rows, int64_t grain, F f) {
  constexpr int64_t kTurns = 4;  // of a thread, if all take the same time
  int64_t chunks = (a.rows.numel + rows - 1) / rows;
  std::atomic<int64_t> taken{0};
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    const int64_t count = std::max<int64_t>((last - first) / kTurns, 1);
    for (int64_t i; (i = taken.fetch_add(count)) < chunks;) {
      for (int64_t end = std::min(i + count, chunks); i < end; ++i) {
        f(i, i * rows, std::min((i + 1) * rows, a.rows.numel));
      }
    }
  });
}

// The summed weights of the labels. Raises where one is out of range, in torch's own words, which
// STD_TORCH_CHECK would put a source line before.
double check_labels(const SoftmaxCeArguments& a) {
  std::unique_ptr<Labels[]> labels(new Labels[a.rows.numel / kChunk + 1]);
  for_each_chunk(a, kChunk, kChunksPerThread, [&](int64_t chunk, int64_t begin, int64_t end) {
    labels[chunk] = cpu_bodies().softmax_ce_labels(a, begin, end);
  });
  Sum sum;
  for (int64_t i = 0; i * kChunk < a.rows.numel; ++i) {
    if (labels[i].has_bad) {
      throw std::runtime_error("Target " + std::to_string(labels[i].bad) + " is out of bounds.");
    }
    sum.add(labels[i].weights);
  }
  return sum.total();
}

void run_cpu(const SoftmaxCeArguments& a, const Tensor&) {
  if (a.is_written && load_scalar(a.grad_loss) == 1.0) return;
  // First, so that nothing is written where a label is wrong: the gradient may lie over the logits.
  double weights = a.has_probabilities ? static_cast<double>(a.rows.numel) : check_labels(a);
  double denominator = a.reduction != Reduction::kMean ? 1.0
                       : a.normalizer                  ? load_scalar(a.normalizer)
                       : a.has_denominator             ? a.denominator
                       : a.has_probabilities           ? weights
                                                       : checked_weights(weights, a.zero_on_empty);
  double inverse = inverse_of(denominator, a.zero_on_empty);
  if (a.gradient && a.gradient.data != a.input.data && a.classes > 0) {
    int64_t last = last_offset(a.gradient, a.rows);
    use_huge_pages(a.gradient, last < 0 ? last : last + (a.classes - 1) * a.gradient.class_stride);
  }

  // Where a class's rows are neighbours in memory they go in groups, so that chunks keep to whole
  // lines of it; so do rows of few classes.
  int64_t rows = a.classes < kChunk ? kChunk / (a.classes > 0 ? a.classes : 1) : 1;
  int64_t group = a.classes <= 64 ? 512 : lies_in_columns(a) ? kRowsInColumns : rows >= 16 ? 16 : 1;
  rows = rows > group ? rows / group * group : group;
  int64_t chunks = (a.rows.numel + rows - 1) / rows;
  std::unique_ptr<double[]> sums(new double[chunks]);
  int64_t grain = rows * a.classes < kChunk ? kChunksPerThread : 1;
  for_each_chunk(a, rows, grain, [&](int64_t chunk, int64_t begin, int64_t end) {
    sums[chunk] = cpu_bodies().softmax_ce_chunk(a, begin, end, inverse);
  });
  if (!a.loss || a.reduction == Reduction::kNone) return;
  store_reduced(a.loss, sums.get(), chunks, denominator, a.zero_on_empty);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) {
  m.impl("_softmax_ce", TORCH_BOX(&softmax_ce<run_cpu>));
  m.impl("_softmax_ce_with_gradient", TORCH_BOX(&softmax_ce_with_gradient<run_cpu>));
  m.impl("_softmax_ce_backward", TORCH_BOX(&softmax_ce_backward<run_cpu>));
}

}  // namespace fused_ce
