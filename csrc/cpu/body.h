// What CMakeLists.txt compiles once for each instruction set, and how the one for this machine is
// picked.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "../bce.h"
#include "../softmax_ce.h"

namespace fused_ce {

// Elements of one chunk: the unit of work, and of the fixed order of summation.
constexpr int64_t kChunk = 16384;
// Chunks a thread takes at least, so that small losses stay on one.
constexpr int64_t kChunksPerThread = 2;

enum OutOfRange : unsigned { kInputOutOfRange = 1, kTargetOutOfRange = 2 };

// A running sum with the rounding of each addition kept, so that a sum of many equal losses is as
// good as one of few.
struct Sum {
  double value = 0, lost = 0;
  __attribute__((always_inline)) void add(double x) {
    double next = value + x;
    lost += math::lost_in(value, x, next);
    value = next;
  }
  __attribute__((always_inline)) double total() const { return math::with_lost(value, lost); }
};

// Whether neighbouring rows of logits are neighbours in memory, and there is a vector of them.
inline bool lies_in_columns(const SoftmaxCeArguments& a) {
  return a.input.class_stride != 1 && a.input.strides[0] == 1 && a.rows.sizes[0] >= 16;
}
constexpr int64_t kRowsInColumns = 32;  // then of a chunk, at least

// The labels of some rows.
struct Labels {
  double weights = 0;    // of those that are not ignore_index, summed
  bool has_bad = false;  // one is out of range
  int64_t bad = 0;       // the first such
};

struct CpuBodies {
  const char* name;
  // Loss and gradient of elements begin .. end. Returns the chunk's summed loss; `scale` multiplies
  // each gradient, and no loss. A probability or its target outside [0, 1] sets its bit in
  // *out_of_range.
  double (*bce_chunk)(const BceArguments& arguments, int64_t begin, int64_t end, double scale,
                      unsigned* out_of_range);
  // How many targets among begin .. end are not ignore_index.
  int64_t (*bce_count_kept)(const BceArguments& arguments, int64_t begin, int64_t end);
  // The labels of rows begin .. end: these must be in range, or ignore_index, for softmax_ce_chunk.
  Labels (*softmax_ce_labels)(const SoftmaxCeArguments& arguments, int64_t begin, int64_t end);
  // Loss, statistics and gradient of rows begin .. end. Returns the summed loss; `scale` multiplies
  // each gradient, and no loss.
  double (*softmax_ce_chunk)(const SoftmaxCeArguments& arguments, int64_t begin, int64_t end,
                             double scale);
  // Multiplies elements begin .. end by `factor`.
  void (*scale_chunk)(const Operand& values, const IndexSpace& space, int64_t begin, int64_t end,
                      double factor);
};

extern const CpuBodies kPortableBodies;
#if defined(FUSED_CE_X86)
extern const CpuBodies kAvx2Bodies;
extern const CpuBodies kAvx512Bodies;
#endif

// The best bodies for this machine, or no better ones than ATEN_CPU_CAPABILITY says, torch's own
// switch for its kernels.
inline const CpuBodies& cpu_bodies() {
#if defined(FUSED_CE_X86)
  static const CpuBodies* const best = [] {
    const char* limit = getenv("ATEN_CPU_CAPABILITY");
    if (limit != nullptr && strcmp(limit, "default") == 0) return &kPortableBodies;
    bool wide = limit == nullptr || strcmp(limit, "avx2") != 0;
    __builtin_cpu_init();
    if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return &kAvx512Bodies;
    }
    // F16C, which these use too, is older than AVX2, and Clang does not know it here.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return &kAvx2Bodies;
    }
    return &kPortableBodies;
  }();
  return *best;
#else
  return kPortableBodies;
#endif
}

}  // namespace fused_ce
