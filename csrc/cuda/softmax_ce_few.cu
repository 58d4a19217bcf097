// Softmax cross entropy of rows that a thread, or a few lanes, take: classes that lie apart, and
// few classes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "softmax_options.cuh"

namespace fused_ce {
namespace {

// What a thread needs to write the gradient of a row without options that it has read.
struct Ending {
  bool wants = false;  // whether there is one; else it is 0
  int label = -1;      // or none
  float factor = 0;    // of the exponentials
  float shift = 0;     // of all classes
  float at_label = 0;  // the gradient of the label's class
};

// The end of a row of logits that a thread has summed up, with that of its label.
template <bool kGradient, bool kPlain, Precision kPrecision>
__device__ __forceinline__ Ending end_row(const SoftmaxCeParams& p, int64_t row,
                                          const RowTarget<float>& target,
                                          RowSums<float, Terms::kPlain> sums, float label_logit,
                                          float scale, float& loss) {
  const float logit_scale = kPlain ? 1.0f : p.in_float.logit_scale;
  const float share = kPlain ? 0.0f : p.in_float.share;
  sums.coefficients *= share;
  sums.cost *= share;
  label_logit *= logit_scale;
  auto result = row_result<kPlain>(p, target, sums, label_logit, true);
  loss += result.loss;
  if constexpr (!kPlain) store_result(p, row, result);
  Ending ending;
  if (kGradient && has_gradient<kPlain>(p, target)) {
    auto g = row_gradient<kPlain>(p, row, target, sums, result, scale);
    ending.wants = true;
    ending.label = static_cast<int>(target.label);
    ending.factor = g.exponential * logit_scale;
    ending.shift = share == 0 ? 0.0f : -g.coefficient * share * logit_scale;
    float e = math::exp_shifted<kPrecision>(label_logit - sums.reference);
    ending.at_label = fmaf(e, ending.factor, ending.shift) - g.label * logit_scale;
  }
  return ending;
}

// The targets of rows from `row` on. Returns whether the logits of any of these matter.
template <bool kPlain, int kRows>
__device__ __forceinline__ bool load_targets(const SoftmaxCeParams& p, int64_t row,
                                             RowTarget<float> (&targets)[kRows]) {
  bool reads = !kPlain && p.reads_all;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    targets[r] = load_target<float, kPlain>(p, row + r, true);
    reads |= targets[r].is_kept;
  }
  return reads;
}

// Where the row's gradient lies. `alike` are logits and gradient that have the same strides: a
// row's offset costs as much as several classes.
template <class T>
__device__ __forceinline__ T* gradient_at(const SoftmaxCeParams& p, int64_t row, bool alike,
                                          int64_t offset) {
  return static_cast<T*>(p.gradient.data) + (alike ? offset : row_offset(p.gradient, p.rows, row));
}

// The labels' own gradients of rows side by side, of which the first one's lie at `dx`.
template <class T, int kRows>
__device__ __forceinline__ void store_labels(const SoftmaxCeParams& p,
                                             const Ending (&endings)[kRows], T* dx) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (endings[r].label >= 0) {
      dx[endings[r].label * p.gradient_stride + r] = from_real<T>(endings[r].at_label);
    }
  }
}

// A thread takes kRows rows that lie side by side, and its neighbours' rows lie beside these. The
// second read, for the gradient, comes from cache.
template <class T, class S, bool kGradient, bool kPlain, Terms kTerms, int kRows>
__global__ void __launch_bounds__(
    kThreads, kTerms == Terms::kPlain && (kRows == 1 || kPlain || !kGradient) ? 4 : 3)
    spread_kernel(const __grid_constant__ SoftmaxCeParams p, bool alike) {
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  constexpr bool kHasOptions = kTerms != Terms::kPlain, kWeighted = kTerms == Terms::kWeighted;
  static_assert(!kHasOptions || (kRows == 1 && !kPlain));
  if (kGradient && !kPlain && is_done(p.unless_one)) return;
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  const float logit_scale = kPlain ? 1.0f : p.in_float.logit_scale;
  const float share = kPlain ? 0.0f : p.in_float.share;
  const bool has_coefficients = !kPlain && p.has_coefficients;
  const bool has_probabilities = kWeighted && p.has_probabilities;
  const bool wants_top = kHasOptions && (p.prediction.data != nullptr || p.correct.data != nullptr);
  const bool wants_target = has_probabilities && p.correct.data != nullptr;
  const bool reads_all = !kPlain && p.reads_all;
  float loss = 0;

  // Calls f<kN>(c) for the next kN classes from c on, of which 8 fit into registers.
  auto for_classes = [&](const auto& f) {
    const int classes = static_cast<int>(p.classes);
    int c = 0;
#pragma unroll 1
    for (; c + 8 <= classes; c += 8) f.template operator()<8>(c);
    if (classes & 4) f.template operator()<4>(c), c += 4;
    if (classes & 2) f.template operator()<2>(c), c += 2;
    if (classes & 1) f.template operator()<1>(c);
  };
  // What lies at `x` for kN classes, for each row; `x` goes on to the next class.
  auto load_classes = [&]<class X, int kN>(const X*& x, int64_t stride,
                                           float (&values)[kRows][kN]) {
    using Rows = Group<X, kRows>;
    Rows raw[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i, x += stride) raw[i] = *reinterpret_cast<const Rows*>(x);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      float of_class[kRows];
      unpack(raw[i], of_class);
#pragma unroll
      for (int r = 0; r < kRows; ++r) values[r][i] = of_class[r];
    }
  };

  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kRows;
  int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRows;
  for (; row < p.rows.numel; row += step) {
    RowTarget<float> targets[kRows];
    const bool reads = load_targets<kPlain>(p, row, targets);
    const int64_t offset = row_offset(p.input, p.rows, row);
    const T* x = static_cast<const T*>(p.input.data) + offset;
    const Options<T, S, kTerms> options(p, row);
    std::conditional_t<kPlain, RowSums<float, kTerms>, LongRowSums<float, kTerms>> gathered[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) gathered[r] = gathered[r].none();
    Peak peak{-INFINITY, 0}, target_peak = peak;
    if (reads) {
      const T* from = x;
      const S* from_target = options.probabilities;
      for_classes([&]<int kN>(int c) {
        float logits[kRows][kN];
        load_classes(from, p.input_stride, logits);
        if constexpr (kHasOptions) {
          float b[1][kN] = {};
          if (has_probabilities) load_classes(from_target, p.target_stride, b);
          const float top = largest(logits[0]);
          if (wants_top) peak.offer(top, c);
          if (wants_target) target_peak.offer(largest(b[0]), c);
          if (kWeighted) options.weigh(b[0], c);
          options.add(logits[0], b[0], top, gathered[0]);
        } else {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            add_logits(gathered[r], logits[r], logit_scale, has_coefficients);
          }
        }
      });
    }
    RowSums<float, kTerms> sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = gathered[r].settled();

    Ending endings[kRows];
    SoftmaxGradient<float> with_options{};
    bool any_wants = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const RowTarget<float>& target = targets[r];
      if (!target.is_kept && !reads_all) {
        if constexpr (!kPlain) store_result(p, row + r, SoftmaxRow<float>{});
        continue;
      }
      float label_logit[1] = {};
      if (target.label >= 0) label_logit[0] = to_real<float>(x[target.label * p.input_stride + r]);
      if constexpr (kHasOptions) {
        if (!kWeighted) {
          sums[r].coefficients *= share;
          sums[r].cost *= share;
        }
        auto result = row_result(p, target, sums[r], options.value_of(label_logit[0]), true);
        loss += result.loss;
        store_result(p, row, result);
        if (kGradient && has_gradient(p, target)) {
          auto g = row_gradient(p, row, target, sums[r], result, scale);
          with_options = {g.exponential * logit_scale, g.entropy * logit_scale,
                          g.coefficient * logit_scale, g.label * logit_scale};
          endings[r].label = static_cast<int>(target.label);
          endings[r].wants = true;
          if (target.label >= 0) {
            float b[1] = {};
            if (kWeighted) options.weigh(b, endings[r].label);
            options.differentiate(label_logit, b, sums[r].reference, with_options,
                                  with_options.label);
            endings[r].at_label = label_logit[0];
          }
        }
      } else {
        endings[r] = end_row<kGradient, kPlain, kPrecision>(p, row + r, target, sums[r],
                                                            label_logit[0], scale, loss);
      }
      any_wants |= endings[r].wants;
    }
    if constexpr (kHasOptions) {
      // The first class of those whose values are the largest.
      auto find = [&](const auto* values, int64_t stride, Peak peak) {
        int c = peak.place;
        while (c < p.classes && !Peak::is(to_real<float>(values[c * stride]), peak.value)) ++c;
        return c;
      };
      if (wants_top) {
        int predicted = reads ? find(x, p.input_stride, peak) : 0;
        int right = static_cast<int>(targets[0].label);
        if (wants_target && reads)
          right = find(options.probabilities, p.target_stride, target_peak);
        store_prediction(p, row, predicted, right, targets[0].is_kept);
      }
    }

    if constexpr (kGradient) {
      using Rows = Group<T, kRows>;
      T* const dx = gradient_at<T>(p, row, alike, offset);
      T* to = dx;
      if (!any_wants) {
        float none[kRows] = {};
        for (int64_t c = 0; c < p.classes; ++c, to += p.gradient_stride) {
          store_whole(reinterpret_cast<Rows*>(to), none);
        }
        continue;
      }
      const T* from = x;
      const S* from_target = options.probabilities;
      for_classes([&]<int kN>(int c) {
        float logits[kRows][kN];
        load_classes(from, p.input_stride, logits);
        if constexpr (kHasOptions) {
          float b[1][kN] = {};
          if (has_probabilities) load_classes(from_target, p.target_stride, b);
          if (kWeighted) options.weigh(b[0], c);
          options.differentiate(logits[0], b[0], sums[0].reference, with_options, 0.0f);
        }
#pragma unroll
        for (int i = 0; i < kN; ++i, to += p.gradient_stride) {
          float gradients[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            gradients[r] = logits[r][i];
            if constexpr (!kHasOptions) {
              float shifted = fmaf(logits[r][i], logit_scale, -sums[r].reference);
              float e = math::exp_shifted<kPrecision>(shifted);
              float g = fmaf(e, endings[r].factor, endings[r].shift);
              // An ignored row may hold anything.
              gradients[r] = kRows == 1 || endings[r].wants ? g : 0.0f;
            }
          }
          store_whole(reinterpret_cast<Rows*>(to), gradients);
        }
      });
      store_labels(p, endings, dx);
    }
  }
  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
}

// Exponentials in the place of a row's logits, of which a thread holds every kGroup-th up to `end`,
// kFewest for certain, and their sum over the row's threads; the costs' over this thread's alone.
// `logit_at` gives a logit once more.
template <Precision kPrecision, bool kPlain, int kGroup, int kFewest, int kPerLane, class Logit>
__device__ __forceinline__ RowSums<float, Terms::kPlain> exponentiate(const SoftmaxCeParams& p,
                                                                      float (&e)[kPerLane], int end,
                                                                      const Logit& logit_at) {
  // A lane's exponentials go to so many sums in turn: the roundings of a single one would add up.
  constexpr int kSums = kPrecision == Precision::kHalf ? 1 : kPerLane > 4 ? 4 : 2;
  float top = -kGreatest<float>;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (i >= kFewest && i * kGroup >= end) break;
    top = fmaxf(top, e[i]);
  }
  auto sums = RowSums<float, Terms::kPlain>::none();
  sums.reference = warp_max<kGroup>(top);
  if (!kPlain && p.has_coefficients) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i >= kFewest && i * kGroup >= end) break;
      sums.cost += sums.reference - e[i];
    }
  }
  auto add = [&]<bool kFinite>() {
    float parts[kSums] = {};
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i >= kFewest && i * kGroup >= end) break;
      if (!kFinite) e[i] = logit_at(i);
      e[i] -= sums.reference;
      e[i] = math::exp_shifted<kPrecision, kFinite>(e[i]);
      parts[i % kSums] = i < kSums ? e[i] : parts[i % kSums] + e[i];
    }
    sums.exponentials = pairwise_sum(parts);
  };
  add.template operator()<true>();
  if (sums.exponentials != sums.exponentials) {
    asm volatile("" ::: "memory");  // so that registers keep nothing for so rare a row
    add.template operator()<false>();
  }
  sums.exponentials = warp_sum<kGroup>(sums.exponentials);
  return sums;
}

// A few classes that lie apart: as spread_kernel, but the logits, kFewest to kMost of them, are
// read once and stay in registers.
template <class T, bool kGradient, bool kPlain, int kRows, int kMost, int kFewest>
__global__ void __launch_bounds__(kThreads, kRows* kMost > (kPlain ? 24 : 16) ? 2
                                            : kRows * kMost > 8               ? 3
                                                                              : 4)
    column_kernel(const __grid_constant__ SoftmaxCeParams p, bool alike) {
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  using Rows = Group<T, kRows>;
  if (kGradient && !kPlain && is_done(p.unless_one)) return;
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  const float logit_scale = kPlain ? 1.0f : p.in_float.logit_scale;
  const bool reads_all = !kPlain && p.reads_all;
  const int classes = static_cast<int>(p.classes);
  float loss = 0;

  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kRows;
  int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRows;
  for (; row < p.rows.numel; row += step) {
    RowTarget<float> targets[kRows];
    const bool reads = load_targets<kPlain>(p, row, targets);
    const int64_t offset = row_offset(p.input, p.rows, row);
    const T* x = static_cast<const T*>(p.input.data) + offset;
    float e[kRows][kMost];
    Ending endings[kRows];
    if (reads) {
      Rows raw[kMost];
      const T* from = x;
#pragma unroll
      for (int i = 0; i < kMost; ++i, from += p.input_stride) {
        if (i < kFewest || i < classes) raw[i] = *reinterpret_cast<const Rows*>(from);
      }
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (i >= kFewest && i >= classes) break;
        float of_class[kRows];
        unpack(raw[i], of_class);
#pragma unroll
        for (int r = 0; r < kRows; ++r) e[r][i] = of_class[r] * logit_scale;
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const RowTarget<float>& target = targets[r];
      if (target.is_kept || reads_all) {
        auto logit_at = [&](int c) { return to_real<float>(x[c * p.input_stride + r]); };
        auto sums = exponentiate<kPrecision, kPlain, 1, kFewest>(
            p, e[r], classes, [&](int c) { return logit_at(c) * logit_scale; });
        sums.coefficients = static_cast<float>(classes);
        float label_logit = target.label >= 0 ? logit_at(static_cast<int>(target.label)) : 0.0f;
        endings[r] = end_row<kGradient, kPlain, kPrecision>(p, row + r, target, sums, label_logit,
                                                            scale, loss);
      } else if constexpr (!kPlain) {
        store_result(p, row + r, SoftmaxRow<float>{});
      }
      if (!endings[r].wants) {
#pragma unroll
        for (int i = 0; i < kMost; ++i) e[r][i] = 0;
      }
    }

    if constexpr (kGradient) {
      T* const dx = gradient_at<T>(p, row, alike, offset);
      T* to = dx;
#pragma unroll
      for (int i = 0; i < kMost; ++i, to += p.gradient_stride) {
        if (i >= kFewest && i >= classes) break;
        float gradients[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          gradients[r] = fmaf(e[r][i], endings[r].factor, endings[r].shift);
        }
        store_whole(reinterpret_cast<Rows*>(to), gradients);
      }
      store_labels(p, endings, dx);
    }
  }
  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
}

// A few classes, dense in memory from row to row: blocks copy rows to shared memory and gradients
// back in vectors of 16 bytes, and kGroup lanes take a row in between, each up to kPerLane of its
// classes, which stay in registers. kFewest of these there are for certain.
template <class T, bool kGradient, bool kPlain, int kGroup, int kPerLane, int kFewest>
__global__ void __launch_bounds__(kThreads, 3)
    few_kernel(const __grid_constant__ SoftmaxCeParams p, bool aligned) {
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  constexpr int kCount = 16 / sizeof(T);
  constexpr int kVectors = (kPerLane + kCount - 1) / kCount;  // that a thread copies at most
  constexpr int kSureVectors = kFewest / kCount > 0 ? kFewest / kCount : 1;  // of a full tile
  using Vector = Group<T, kCount>;
  constexpr int kRows = kThreads / kGroup;
  // Rows of a power of two of vectors would all begin on the same few banks: a vector is left free
  // after each. Of the numbers of classes that an instance takes only the largest may be one.
  constexpr bool kMayPad = (kPerLane & (kPerLane - 1)) == 0;
  __shared__ alignas(16) T tile[kThreads * kPerLane + (kMayPad ? kRows * kCount : 0)];
  if (kGradient && !kPlain && is_done(p.unless_one)) return;
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  const float logit_scale = kPlain ? 1.0f : p.in_float.logit_scale;
  const float share = kPlain ? 0.0f : p.in_float.share;
  const int classes = static_cast<int>(p.classes);
  const int lane = threadIdx.x % kGroup;
  constexpr int kRowVectors = kGroup * kPerLane / kCount;
  const bool pads = kMayPad && kRowVectors > 1 && aligned && classes == kGroup * kPerLane;
  const int row_stride = classes + (pads ? kCount : 0);
  const int shift = pads ? __ffs(kRowVectors) - 1 : 31;
  const int next_slot = kThreads + (kThreads >> shift);
  Vector* const slots = reinterpret_cast<Vector*>(tile) + threadIdx.x + (threadIdx.x >> shift);
  float loss = 0;

  int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  const T* x = static_cast<const T*>(p.input.data) + first * classes;
  T* dx = static_cast<T*>(p.gradient.data) + first * classes;
  for (; first < p.rows.numel; first += step, x += step * classes, dx += step * classes) {
    int64_t left = p.rows.numel - first;
    const int rows = left < kRows ? static_cast<int>(left) : kRows;
    const int count = rows * classes;
    const int vectors = aligned ? static_cast<unsigned>(count) / kCount : 0;
    const int copied = vectors - static_cast<int>(threadIdx.x);  // from this thread's first on
    // Calls f(i) for the vectors i kThreads from its first on that this thread copies.
    auto for_vectors = [&](const auto& f) {
      if (copied > (kSureVectors - 1) * kThreads) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (i < kSureVectors || i * kThreads < copied) f(i);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kSureVectors; ++i) {
          if (i * kThreads < copied) f(i);
        }
      }
    };
    const Vector* from = reinterpret_cast<const Vector*>(x) + threadIdx.x;
    for_vectors([&](int i) { slots[i * next_slot] = from[i * kThreads]; });
    if (vectors * kCount != count) {
#pragma unroll 1
      for (int i = vectors * kCount + threadIdx.x; i < count; i += kThreads) tile[i] = x[i];
    }
    __syncthreads();

    // Threads without a row do the last one's work, and drop it.
    const bool exists = threadIdx.x / kGroup < rows;
    const int place = exists ? threadIdx.x / kGroup : rows - 1;
    int64_t row = first + place;
    T* const mine = tile + place * row_stride + lane;  // every kGroup-th is this lane's
    RowTarget<float> target = load_target<float, kPlain>(p, row, lane == 0);
    const int label = static_cast<int>(target.label);
    bool reads = target.is_kept || (!kPlain && p.reads_all);
    const int end = classes - lane;
    auto logit_at = [&](int i) { return to_real<float>(mine[i * kGroup]) * logit_scale; };
    float e[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i >= kFewest && i * kGroup >= end) break;
      e[i] = logit_at(i);
    }
    auto sums = exponentiate<kPrecision, kPlain, kGroup, kFewest>(p, e, end, logit_at);
    if (!kPlain && p.has_coefficients) {
      sums.cost = share * warp_sum<kGroup>(sums.cost);
      sums.coefficients = share * static_cast<float>(classes);
    }
    float label_logit = 0;
    if (reads && label >= 0) label_logit = to_real<float>(mine[label - lane]) * logit_scale;
    SoftmaxRow<float> result{};
    if (reads) result = row_result<kPlain>(p, target, sums, label_logit, lane == 0);
    if (lane == 0 && exists) {
      loss += result.loss;
      if constexpr (!kPlain) store_result(p, row, result);
    }

    if constexpr (kGradient) {
      __syncthreads();  // all have read their row, and the label's logit
      if (reads && has_gradient<kPlain>(p, target)) {
        auto g = row_gradient<kPlain>(p, row, target, sums, result, scale);
        const float factor = g.exponential * logit_scale;
        const float shift = share == 0 ? 0.0f : -g.coefficient * share * logit_scale;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (i >= kFewest && i * kGroup >= end) break;
          if (exists) mine[i * kGroup] = from_real<T>(fmaf(e[i], factor, shift));
        }
        if (exists && label >= 0 && label % kGroup == lane) {
          T& at_label = mine[label - lane];
          if constexpr (sizeof(T) == sizeof(float)) {
            at_label -= g.label * logit_scale;
          } else {  // which has been rounded
            float label_e = math::exp_shifted<kPrecision>(label_logit - sums.reference);
            at_label = from_real<T>(fmaf(label_e, factor, shift) - g.label * logit_scale);
          }
        }
      } else if (exists) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (i >= kFewest && i * kGroup >= end) break;
          mine[i * kGroup] = from_real<T>(0.0f);
        }
      }
      __syncthreads();
      Vector* to = reinterpret_cast<Vector*>(dx) + threadIdx.x;
      for_vectors([&](int i) { to[i * kThreads] = slots[i * next_slot]; });
      if (vectors * kCount != count) {
#pragma unroll 1
        for (int i = vectors * kCount + threadIdx.x; i < count; i += kThreads) dx[i] = tile[i];
      }
    }
    __syncthreads();  // the tile may be overwritten
  }
  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
}

// Two classes, dense in memory, or apart with rows side by side (kApart): binary cross entropy of
// the distance of the logits, one exponential a row. The two gradients are equal but for the sign,
// without a cancellation. A thread takes the rows of one vector, or as many.
template <class T, bool kGradient, bool kPlain, bool kApart>
__global__ void __launch_bounds__(kThreads, 4)
    pair_kernel(const __grid_constant__ SoftmaxCeParams p, bool alike) {
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  constexpr int kRows = 8 / sizeof(T);
  using Vector = Group<T, 2 * kRows>;
  if (kGradient && !kPlain && is_done(p.unless_one)) return;
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  float loss = 0;

  struct Pair {
    float e, upper;  // of the two probabilities, upper and e * upper, the larger
    float log_sum;   // log(1 + e)
    float loss;      // of the label
    float other;     // the probability of the other class
  };
  // `margin` is that of the other class over the label's, `below` the one of the two signs that is
  // not above 0.
  auto pair_of = []<bool kFinite>(float margin, float below, std::bool_constant<kFinite>) {
    Pair r;
    r.e = math::exp_shifted<kPrecision, kFinite>(below);
    r.upper = math::reciprocal(1 + r.e);
    r.log_sum = math::log1p_unit<Precision::kFull>(r.e);
    r.loss = fmaxf(margin, 0.0f) + r.log_sum;
    r.other = (margin >= 0 ? 1.0f : r.e) * r.upper;
    return r;
  };
  // The gradients take the place of the logits.
  auto evaluate = [&](int64_t row, float& x0, float& x1) {
    RowTarget<float> target = load_target<float>(p, row, true);
    SoftmaxRow<float> result{};
    float g0 = 0, g1 = 0;
    if (target.is_kept || p.reads_all) {
      const float logit_scale = p.in_float.logit_scale, share = p.in_float.share;
      const float z_loss = p.in_float.z_loss;
      float l0 = x0 * logit_scale, l1 = x1 * logit_scale;
      float margin = target.label == 1 ? l0 - l1 : l1 - l0;
      // An infinite logit makes the row NaN, as in torch, unless it is the smaller one.
      float top = fmaxf(l0, l1);
      if (top > kGreatest<float>) margin = quiet_nan<float>();
      Pair r = pair_of(margin, -fabsf(margin), std::false_type());
      result.loss = target.weight * r.loss;
      float g = target.weight * r.other;
      if (p.has_coefficients) {
        float difference = (1 - r.e) * r.upper;
        result.loss += share * (fabsf(margin) + 2 * r.log_sum);
        g += share * (margin >= 0 ? difference : -difference);
      }
      // Where the larger logit is infinite so is the sum of exponentials.
      result.lse = fabsf(top) > kGreatest<float> && l0 == l0 && l1 == l1 ? top : top + r.log_sum;
      if (z_loss != 0) result.loss += z_loss * result.lse * result.lse;
      result.loss = target.is_kept ? target.factor * result.loss : 0.0f;
      if (kGradient && has_gradient(p, target)) {
        float factor = target.is_kept ? target.factor * scale * logit_scale : 0.0f;
        if (p.is_backward) {
          factor *= p.grad_loss.data != nullptr ? load<float>(p.grad_loss, p.rows, row) : 0.0f;
        }
        float common = 2 * z_loss * result.lse * factor;
        if (z_loss == 0 || !target.is_kept) common = 0;
        if (p.grad_lse.data != nullptr) {
          common += load<float>(p.grad_lse, p.rows, row) * logit_scale;
        }
        g = target.is_kept ? g * factor : 0.0f;
        g1 = target.label == 1 ? -g : g;
        g0 = -g1;
        if (common != 0) {
          g0 = fmaf(common, l0 >= l1 ? r.upper : r.e * r.upper, g0);
          g1 = fmaf(common, l0 >= l1 ? r.e * r.upper : r.upper, g1);
        }
      }
    }
    loss += result.loss;
    store_result(p, row, result);
    x0 = g0;
    x1 = g1;
  };

  // The plain loss of a vector in a straight line. False, having done nothing, where a label is out
  // of bounds or the logits too far apart for the exponential's correction.
  using Labels = Group<int64_t, kRows>;
  constexpr float kFarthest = -1e4f;
  auto evaluate_plain = [&](const Labels& labels, const float (&values)[2 * kRows],
                            float (&gradients)[2 * kRows]) {
    float sum = 0, farthest = 0;
    bool is_rare = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int64_t label = labels.values[i];
      bool is_kept = label != p.ignore_index, is_second = label == 1;
      float difference = values[2 * i + 1] - values[2 * i], opposite = -difference;
      float below = fminf(difference, opposite);
      is_rare |= static_cast<uint64_t>(label) > 1 && is_kept;
      farthest = i == 0 ? below : fminf(farthest, below);
      Pair r = pair_of(is_second ? opposite : difference, below, std::true_type());
      float one = is_kept ? r.loss : 0.0f;
      sum = i == 0 ? one : sum + one;
      gradients[2 * i + 1] = is_kept ? r.other * (is_second ? -scale : scale) : 0.0f;
      gradients[2 * i] = -gradients[2 * i + 1];
    }
    if (is_rare || farthest < kFarthest) return false;
    loss += sum;
    return true;
  };

  int64_t vectors = p.rows.numel / kRows;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const Vector* from = static_cast<const Vector*>(p.input.data) + at;
  Vector* to = static_cast<Vector*>(p.gradient.data) + at;
  const Labels* labels = static_cast<const Labels*>(p.target.data) + at;  // where plain
  for (int64_t v = at; v < vectors; v += step, from += step, to += step, labels += step) {
    using Rows = Group<T, kRows>;
    auto offset_in = [&](const CudaOperand& operand) {
      return row_offset(operand, p.rows, v * kRows);
    };
    int64_t offset = 0;
    float values[2 * kRows];  // of both classes in turn
    if constexpr (kApart) {
      offset = offset_in(p.input);
      const T* x = static_cast<const T*>(p.input.data) + offset;
      float first[kRows], second[kRows];
      load_whole(reinterpret_cast<const Rows*>(x), first);
      load_whole(reinterpret_cast<const Rows*>(x + p.input_stride), second);
#pragma unroll
      for (int i = 0; i < kRows; ++i) values[2 * i] = first[i], values[2 * i + 1] = second[i];
    } else {
      load_whole(from, values);
    }
    auto write = [&](const float (&gradients)[2 * kRows]) {
      if constexpr (kGradient && kApart) {
        T* dx = static_cast<T*>(p.gradient.data) + (alike ? offset : offset_in(p.gradient));
        float first[kRows], second[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          first[i] = gradients[2 * i], second[i] = gradients[2 * i + 1];
        store_whole(reinterpret_cast<Rows*>(dx), first);
        store_whole(reinterpret_cast<Rows*>(dx + p.gradient_stride), second);
      } else if constexpr (kGradient) {
        store_whole(to, gradients);
      }
    };
    if constexpr (kPlain) {
      float gradients[2 * kRows];
      if (evaluate_plain(*labels, values, gradients)) {
        write(gradients);
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) evaluate(v * kRows + i, values[2 * i], values[2 * i + 1]);
    write(values);
  }
  if constexpr (kApart) {  // whose rows are whole vectors
    if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
    return;
  }
  int64_t row = vectors * kRows + at;
  if (row < p.rows.numel) {
    const T* x = static_cast<const T*>(p.input.data) + 2 * row;
    float x0 = to_real<float>(x[0]), x1 = to_real<float>(x[1]);
    evaluate(row, x0, x1);
    if constexpr (kGradient) {
      T* dx = static_cast<T*>(p.gradient.data) + 2 * row;
      dx[0] = from_real<T>(x0);
      dx[1] = from_real<T>(x1);
    }
  }
  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
}

template <class T, bool kGradient, bool kPlain, int kGroup, int kPerLane, int kFewest>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  auto kernel = few_kernel<T, kGradient, kPlain, kGroup, kPerLane, kFewest>;
  kernel<<<resident_blocks(kernel, plan), kThreads, 0, stream>>>(p, plan.aligned);
}

// Whether a row's offset is the same in both.
bool are_alike(const SoftmaxCeParams& p) {
  return std::equal(p.input.strides, p.input.strides + p.rows.rank, p.gradient.strides);
}

template <class T, class S, bool kGradient, bool kPlain, Terms kTerms, int kRows>
void launch_spread(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  auto kernel = spread_kernel<T, S, kGradient, kPlain, kTerms, kRows>;
  kernel<<<resident_blocks(kernel, plan), kThreads, 0, stream>>>(p, are_alike(p));
}

template <class T, bool kGradient, bool kPlain, int kRows, int kMost, int kFewest>
void launch_columns(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  auto kernel = column_kernel<T, kGradient, kPlain, kRows, kMost, kFewest>;
  kernel<<<resident_blocks(kernel, plan), kThreads, 0, stream>>>(p, are_alike(p));
}

template <class T, bool kGradient, bool kPlain, int kRows>
void launch_columns(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  if (p.classes <= 8) {
    launch_columns<T, kGradient, kPlain, kRows, 8, 2>(p, plan, stream);
  } else if (p.classes <= 16) {
    launch_columns<T, kGradient, kPlain, kRows, 16, 9>(p, plan, stream);
  } else if (p.classes <= 24) {
    // Options take the registers of a second row.
    launch_columns<T, kGradient, kPlain, kPlain ? kRows : 1, 24, 17>(p, plan, stream);
  } else {
    launch_spread<T, T, kGradient, kPlain, Terms::kPlain, kRows>(p, plan, stream);
  }
}

template <class T, bool kGradient>
void launch_spread_options(const SoftmaxCeParams& p, const SoftmaxCePlan& plan,
                           cudaStream_t stream) {
  if (plan.terms == Terms::kStatistics) {
    launch_spread<T, T, kGradient, false, Terms::kStatistics, 1>(p, plan, stream);
  } else if (p.has_probabilities && p.target.dtype == Dtype::kFloat32) {
    launch_spread<T, float, kGradient, false, Terms::kWeighted, 1>(p, plan, stream);
  } else {
    launch_spread<T, T, kGradient, false, Terms::kWeighted, 1>(p, plan, stream);
  }
}

template <class T, bool kGradient, bool kPlain>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  if (plan.kernel == SoftmaxCePlan::kSpread) {
    if (plan.rows == 2) {
      launch_columns<T, kGradient, kPlain, 2>(p, plan, stream);
    } else {
      launch_columns<T, kGradient, kPlain, 1>(p, plan, stream);
    }
  } else if (plan.kernel == SoftmaxCePlan::kPair) {
    auto kernel = p.input_stride == 1 ? pair_kernel<T, kGradient, kPlain, false>
                                      : pair_kernel<T, kGradient, kPlain, true>;
    kernel<<<resident_blocks(kernel, plan), kThreads, 0, stream>>>(p, are_alike(p));
  } else if (plan.group == 8) {
    launch_few<T, kGradient, kPlain, 8, 16, 8>(p, plan, stream);
  } else if (plan.group == 4) {
    if (p.classes <= 32) {
      launch_few<T, kGradient, kPlain, 4, 8, 6>(p, plan, stream);
    } else {
      launch_few<T, kGradient, kPlain, 4, 16, 8>(p, plan, stream);
    }
  } else if (plan.group == 2) {
    launch_few<T, kGradient, kPlain, 2, 12, 8>(p, plan, stream);
  } else if (!kPlain) {
    launch_few<T, kGradient, kPlain, 1, 16, 2>(p, plan, stream);
  } else if (p.classes <= 4) {
    launch_few<T, kGradient, kPlain, 1, 4, 2>(p, plan, stream);
  } else if (p.classes <= 8) {
    launch_few<T, kGradient, kPlain, 1, 8, 5>(p, plan, stream);
  } else if (p.classes <= 10) {
    launch_few<T, kGradient, kPlain, 1, 10, 9>(p, plan, stream);
  } else {
    launch_few<T, kGradient, kPlain, 1, 16, 11>(p, plan, stream);
  }
}

template <class T, bool kGradient>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  bool plain = !p.has_coefficients && !p.is_backward && !p.reads_all && !p.weight.data &&
               !p.sample_weight.data && !p.loss.data && p.in_float.z_loss == 0 &&
               p.in_float.logit_scale == 1 && p.in_float.keep == 1 &&
               p.target.dtype == Dtype::kInt64 && p.target.access == CudaOperand::kFlat &&
               (plan.kernel != SoftmaxCePlan::kPair || p.target.aligned);
  if (plan.terms != Terms::kPlain) {
    launch_spread_options<T, kGradient>(p, plan, stream);
  } else if (plain) {
    launch_few<T, kGradient, true>(p, plan, stream);
  } else {
    launch_few<T, kGradient, false>(p, plan, stream);
  }
}

template <class T>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  if (p.gradient.data != nullptr) {
    launch_few<T, true>(p, plan, stream);
  } else {
    launch_few<T, false>(p, plan, stream);
  }
}

}  // namespace

void launch_softmax_ce_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan,
                           cudaStream_t stream) {
  switch (p.input.dtype) {
    case Dtype::kBFloat16:
      return launch_few<__nv_bfloat16>(p, plan, stream);
    case Dtype::kFloat16:
      return launch_few<__half>(p, plan, stream);
    default:
      return launch_few<float>(p, plan, stream);
  }
}

}  // namespace fused_ce
