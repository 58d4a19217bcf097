// Softmax cross entropy. A vector holds neighbouring classes of one row (`ClassWise`) where a row
// has many, or one class of neighbouring rows (`RowWise`) where it has few or its neighbours in
// memory are other rows (`holds_rows`). Both take the classes in blocks that stay in the
// first-level cache: one pass over memory for the sums, whose reference moves up as larger logits
// come, and for the gradient one over the exponentials if these have been kept, or else a second
// one over the logits. Both ask for what comes next before they compute, so that memory does not
// wait for the arithmetic.
#pragma once

#include "softmax_ce_class_wise.h"
#include "softmax_ce_row_wise.h"

namespace fused_ce {
namespace {

using Chunk = double (*)(const SoftmaxCeArguments& a, int64_t begin, int64_t end, double scale);

// Whether a vector is to hold rows: of a few classes, or where these are neighbours in memory.
inline bool holds_rows(const SoftmaxCeArguments& a) {
  return a.classes < (a.has_probabilities ? kManyProbabilities : kManyClasses) ||
         lies_in_columns(a);
}

template <class T, Precision kPrecision>
Chunk class_wise_of(bool has_coefficients) {
  return has_coefficients ? class_wise<T, Terms::kCoefficients, kPrecision>
                          : class_wise<T, Terms::kPlain, kPrecision>;
}
template <class Real, Precision kPrecision>
Chunk chunk_of(const SoftmaxCeArguments& a) {
  const Options<Real> options(a);
  if (holds_rows(a)) {
    bool plain = !options.has_coefficients && !options.has_entropy;
    return plain ? row_wise<Real, Terms::kPlain, kPrecision>
                 : row_wise<Real, Terms::kAll, Precision::kFull>;
  }
  if (options.has_entropy) return class_wise<Real, Terms::kAll, kPrecision>;
  if (options.transforms || std::is_same_v<Real, double>) {
    return class_wise_of<Real, kPrecision>(options.has_coefficients);
  }
  return lies_in_rows<BFloat16>(a)  ? class_wise_of<BFloat16, kPrecision>(options.has_coefficients)
         : lies_in_rows<Float16>(a) ? class_wise_of<Float16, kPrecision>(options.has_coefficients)
                                    : class_wise_of<float, kPrecision>(options.has_coefficients);
}

double softmax_ce_chunk(const SoftmaxCeArguments& a, int64_t begin, int64_t end, double scale) {
  auto chunk = a.in_double        ? chunk_of<double, Precision::kFull>(a)
               : a.half_precision ? chunk_of<float, Precision::kHalf>(a)
                                  : chunk_of<float, Precision::kFull>(a);
  return chunk(a, begin, end, scale);
}

Labels softmax_ce_labels(const SoftmaxCeArguments& a, int64_t begin, int64_t end) {
  const auto classes = static_cast<uint64_t>(a.classes);
  Labels found;
  Sum sum;
  for (int64_t at = begin; at < end; at += kRowsAtOnce) {
    int count = static_cast<int>(end - at < kRowsAtOnce ? end - at : kRowsAtOnce);
    int64_t ignored = 0, bad = 0;
    with_type(a.target.dtype, [&](auto type) {
      using T = decltype(type);
      for_each_run<const T>(a.target, a.rows, at, count,
                            [&](const T* p, int64_t stride, int length, int) {
                              for (int i = 0; i < length; ++i) {
                                auto label = to_real<int64_t>(p[i * stride]);
                                bool is_ignored = label == a.ignore_index;
                                ignored += is_ignored;
                                bad += !is_ignored && static_cast<uint64_t>(label) >= classes;
                              }
                            });
    });
    if (bad == 0 && !a.weight) {
      sum.add(static_cast<double>(count - ignored));
      continue;
    }
    int64_t labels[kRowsAtOnce];
    gather(a.target, a.rows, at, count, labels);
    for (int i = 0; bad > 0 && i < count; ++i) {
      if (labels[i] == a.ignore_index || static_cast<uint64_t>(labels[i]) < classes) continue;
      found.has_bad = true;
      found.bad = labels[i];
      return found;
    }
    if (a.classes == 0) continue;  // and all are ignored
    double weights[kRowsAtOnce];
    for (int i = 0; i < count; ++i) labels[i] = labels[i] == a.ignore_index ? -1 : labels[i];
    label_weights(a, labels, count, weights);
    constexpr int kSums = 8;
    double sums[kSums] = {};
    for (int i = count; i % kSums != 0; ++i) weights[i] = 0;
    for (int i = 0; i < count; i += kSums) {
      for (int j = 0; j < kSums; ++j) sums[j] += weights[i + j];
    }
    for (double part : sums) sum.add(part);
  }
  found.weights = sum.total();
  return found;
}

}  // namespace
}  // namespace fused_ce
