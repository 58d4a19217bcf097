// Softmax cross entropy where a vector holds one class of neighbouring rows.
#pragma once

#include "softmax_ce_row.h"
#include "transpose.h"

namespace fused_ce {
namespace {

constexpr int kRowBlock = 16384;   // classes x rows in a buffer
constexpr int kClassesPerSum = 4;  // terms added up by themselves before they join the sum

template <class Real, Terms kTerms, Precision kPrecision>
struct RowWise {
  using V = typename Computing<Real>::Vector;
  static constexpr int kWidth = Computing<Real>::kStep / 2;
  static constexpr bool kHasTerms = kTerms == Terms::kAll;

  // SoftmaxSums of each row: without coefficients and entropy, the first two.
  struct Sums {
    alignas(64) Real reference[kRowsAtOnce], exponentials[kRowsAtOnce],
        coefficients[kRowsAtOnce], cost[kRowsAtOnce], entropy[kRowsAtOnce];

    SoftmaxSums<V> at(int i) const {
      V from = load(reference + i), e = load(exponentials + i);
      if constexpr (!kHasTerms) return {from, e, V{}, V{}, V{}};
      return {from, e, load(coefficients + i), load(cost + i), load(entropy + i)};
    }
    void put(int i, const SoftmaxSums<V>& sums) {
      store(reference + i, sums.reference);
      store(exponentials + i, sums.exponentials);
      if constexpr (!kHasTerms) return;
      store(coefficients + i, sums.coefficients);
      store(cost + i, sums.cost);
      store(entropy + i, sums.entropy);
    }
  };

  // SoftmaxGradient of each row.
  struct Factors {
    alignas(64) Real exponential[kRowsAtOnce], entropy[kRowsAtOnce],
        coefficient[kRowsAtOnce], label[kRowsAtOnce];

    SoftmaxGradient<V> at(int i) const {
      return {load(exponential + i), load(entropy + i), load(coefficient + i), load(label + i)};
    }
    void put(int i, const SoftmaxGradient<V>& factors) {
      store(exponential + i, factors.exponential);
      store(entropy + i, factors.entropy);
      store(coefficient + i, factors.coefficient);
      store(label + i, factors.label);
    }
  };

  struct Buffers {
    // [classes of a block][stride]
    alignas(64) Real logits[kRowBlock], slope[kRowBlock], coefficients[kRowBlock];
    alignas(64) Real label[kRowsAtOnce];
    Real class_coefficients[kRowBlock];  // [classes of a block]: where all rows have the same
    Sums sums;
    Factors factors;
    Largest<Real> best[kRowsAtOnce], best_target[kRowsAtOnce];
  };

  const SoftmaxCeArguments& a;
  const Options<Real>& options;
  Buffers& buffers;
  RowBuffers<Real>& rows;
  // The rows of the moment, and how many elements of a buffer they take: whole vectors, an odd
  // number of them, so that the classes of a row do not all compete for one place in the cache.
  int64_t begin = 0;
  int count = 0, padded = 0, stride = 0;
  bool keeps = false;  // whether the exponentials take the logits' place in the buffer
  bool clears_ignored = false;
  // Whether all rows have the same coefficients, or each has its own (probabilities).
  const bool smooths = kHasTerms && options.has_coefficients && !a.has_probabilities;
  const bool weighs = kHasTerms && a.has_probabilities;
  // Whether rows have two classes, and no more than the label's loss is wanted. Float64 has no
  // log1p of vectors.
  const bool is_pair = std::is_same_v<Real, float> && !kHasTerms && a.classes == 2 &&
                       !options.finds_largest && options.z_loss == 0 && !a.grad_lse;
  const bool streams = is_streamed(a.gradient, a.input, a.rows.numel* a.classes);

  // What is prefetched lies this many classes ahead: fewer than the first-level cache has ways,
  // since the classes' memory is often a power of two apart.
  static constexpr int kClassesAhead = 8;

  static Operand class_at(const ClassOperand& operand, int64_t c) {
    Operand one = operand;
    one.data = address_of(operand, c * operand.class_stride);
    return one;
  }
  // Calls f with a value of the dtype's C++ type, if that is computed in Real. Returns whether.
  template <class F>
  static bool with_own_type(Dtype dtype, F f) {
    bool is_own = false;
    with_float_type(dtype, [&](auto type) {
      if constexpr (std::is_same_v<RealOf<decltype(type)>, Real>) {
        f(type);
        is_own = true;
      }
    });
    return is_own;
  }

  // The first row's value for class c, if the rows lie `stride` apart; else null.
  char* strided(const ClassOperand& operand, int64_t c, int64_t row_stride) const {
    if (operand.strides[0] != row_stride) return nullptr;
    if (a.rows.rank > 1 && begin % a.rows.sizes[0] + count > a.rows.sizes[0]) return nullptr;
    int64_t offset = offset_of(operand, a.rows, begin) + c * operand.class_stride;
    return static_cast<char*>(address_of(operand, offset));
  }
  // The same if the rows' values for a class lie one behind another.
  char* dense(const ClassOperand& operand, int64_t c) const { return strided(operand, c, 1); }
  // The first row's classes, if all rows' classes lie one behind another.
  char* in_rows(const ClassOperand& operand) const {
    bool wanted =
        a.classes > 1 && operand.class_stride == 1 && with_own_type(operand.dtype, [](auto) {});
    return wanted ? strided(operand, 0, a.classes) : nullptr;
  }
  // The values of classes from c on, which may be all that there are.
  void fill(const ClassOperand& operand, int64_t c, int classes, Real* to) const {
    const char* from = dense(operand, c);
    const char* turned = classes == a.classes ? in_rows(operand) : nullptr;
    if (turned != nullptr) {
      with_own_type(operand.dtype, [&](auto type) {
        rows_to_columns(reinterpret_cast<const decltype(type)*>(turned), count, classes, to,
                        stride);
      });
    } else if (from == nullptr) {
      for (int k = 0; k < classes; ++k) {
        gather(class_at(operand, c + k), a.rows, begin, count, to + k * stride);
      }
    } else {
      with_float_type(operand.dtype, [&](auto type) {
        using T = decltype(type);
        const T* run = reinterpret_cast<const T*>(from);
        for (int k = 0; k < classes; ++k, run += operand.class_stride) {
          load_run(run, count, to + k * stride);
        }
      });
    }
  }
  void fill(int64_t c, int classes) {
    fill(a.input, c, classes, buffers.logits);
    for (int k = 0; k < classes; ++k) {
      Real* to = buffers.logits + k * stride;
      for (int i = count; i < padded; ++i) to[i] = 0;
      if (options.transforms) options.transform(to, buffers.slope + k * stride, padded);
    }
    const auto most = static_cast<uint64_t>(classes);
    for (int i = 0; i < padded; ++i) {
      int64_t k = rows.label[i] - c;
      int32_t place = static_cast<uint64_t>(k) < most ? static_cast<int32_t>(k) : -1;
      buffers.label[i] = static_cast<Real>(place);
    }
    if (weighs) fill_coefficients(c, classes);
    if (!smooths) return;
    for (int k = 0; k < classes; ++k) {
      buffers.class_coefficients[k] = options.share * class_weight<Real>(a, c + k);
    }
  }
  void fill_coefficients(int64_t c, int classes) {
    fill(a.target, c, classes, buffers.coefficients);
    for (int k = 0; k < classes; ++k) {
      Real* to = buffers.coefficients + k * stride;
      if (options.finds_largest) {
        for (int i = 0; i < count; ++i) buffers.best_target[i].offer(to[i], c + k);
      }
      const Real weight = class_weight<Real>(a, c + k);
      for (int i = 0; i < count; ++i) {
        to[i] = math::multiply_add(to[i], options.keep, options.share) * weight;
      }
      for (int i = count; i < padded; ++i) to[i] = 0;
    }
  }

  // Asks for logits of the next rows, from the i-th on, while memory has nothing else to do: for
  // their first classes, or, where the classes lie one behind another, for all of them, for which
  // the second-level cache has room.
  auto next_rows(int classes) const {
    const char* next = dense(a.input, 0);
    const char* turned = next == nullptr && classes == a.classes ? in_rows(a.input) : nullptr;
    const int64_t apart = bytes_of(a.input, a.input.class_stride), each = bytes_of(a.input, 1);
    const int ahead = next == nullptr             ? 0
                      : a.classes < kClassesAhead ? static_cast<int>(a.classes)
                                                  : kClassesAhead;
    return [=, this](int i) __attribute__((always_inline)) {
      for (int k = 0; k < ahead; ++k) __builtin_prefetch(next + k * apart + (count + i) * each);
      if (turned == nullptr) return;
      const char* from = turned + (count + i) * a.classes * each;
      for (int64_t byte = 0; byte < kWidth * a.classes * each; byte += 64) {
        __builtin_prefetch(from + byte, 0, 2);
      }
    };
  }

  // Adds up a block of classes.
  void add(int64_t c, int classes) {
    if (options.finds_largest) {
      for (int k = 0; k < classes; ++k) {
        for (int i = 0; i < count; ++i)
          buffers.best[i].offer(buffers.logits[k * stride + i], c + k);
      }
    }
    const bool entropy = kHasTerms && options.has_entropy;
    const auto ask_for_next = next_rows(classes);
    for (int i = 0; i < padded; i += kWidth) {
      ask_for_next(i);
      const Real* at = buffers.logits + i;
      const V low = V{} - static_cast<Real>(INFINITY);
      V top = math::Machine<V>::greater(load(at), low);
      for (int k = 1; k < classes; ++k) top = math::Machine<V>::greater(load(at + k * stride), top);
      SoftmaxSums<V> sums{top, V{}, V{}, V{}, V{}};
      if (c > 0) {
        sums = buffers.sums.at(i);
        admit(sums, top, smooths || weighs, entropy);
      }
      V label = load(buffers.label + i), label_logit = load(rows.label_logit + i), place{};
      V reference = finite_reference(sums.reference);
      // The terms of a few classes are added up by themselves.
      SoftmaxSums<V> lost{};
      auto add_part = [&](int first, int part_classes) __attribute__((always_inline)) {
        SoftmaxSums<V> part{};
        for (int k = first; k < first + part_classes; ++k, place += static_cast<Real>(1)) {
          V x = load(at + k * stride);
          label_logit = label == place ? x : label_logit;
          V e = add_logit<kPrecision>(part, reference, x, coefficient_of(k, i), smooths || weighs,
                                      entropy);
          if (keeps) store(buffers.logits + k * stride + i, e);
        }
        sums = sum_of(sums, part, lost, c + first == 0);
      };
      int first = 0;
      for (; first + kClassesPerSum <= classes; first += kClassesPerSum) {
        add_part(first, kClassesPerSum);
      }
      if (first < classes) add_part(first, classes - first);
      store(rows.label_logit + i, label_logit);
      buffers.sums.put(i, with_lost(sums, lost));
    }
  }

  // Of the block's class k, for the vector of rows from i on.
  V coefficient_of(int k, int i) const {
    if (weighs) return load(buffers.coefficients + k * stride + i);
    return smooths ? V{} + buffers.class_coefficients[k] : V{};
  }

  static SoftmaxSums<V> sum_of(const SoftmaxSums<V>& sums, const SoftmaxSums<V>& part) {
    return {sums.reference, sums.exponentials + part.exponentials,
            sums.coefficients + part.coefficients, sums.cost + part.cost,
            sums.entropy + part.entropy};
  }

  // The same, where what rounding takes from the sums goes to `lost`: over many classes it would be
  // most of the error. The first part has nothing to lose to.
  static SoftmaxSums<V> sum_of(const SoftmaxSums<V>& sums, const SoftmaxSums<V>& part,
                               SoftmaxSums<V>& lost, bool is_first) {
    using math::lost_in;
    SoftmaxSums<V> all = sum_of(sums, part);
    if (kPrecision == Precision::kFull && !is_first) {
      lost.exponentials += lost_in(sums.exponentials, part.exponentials, all.exponentials);
      if constexpr (kHasTerms) {
        lost.coefficients += lost_in(sums.coefficients, part.coefficients, all.coefficients);
        lost.cost += lost_in(sums.cost, part.cost, all.cost);
        lost.entropy += lost_in(sums.entropy, part.entropy, all.entropy);
      }
    }
    return all;
  }
  static SoftmaxSums<V> with_lost(const SoftmaxSums<V>& sums, const SoftmaxSums<V>& lost) {
    using math::with_lost;
    return {sums.reference, with_lost(sums.exponentials, lost.exponentials),
            with_lost(sums.coefficients, lost.coefficients), with_lost(sums.cost, lost.cost),
            with_lost(sums.entropy, lost.entropy)};
  }

  // The gradient of the block's class k, for the vector of rows from i on. In kShort, the usual
  // case, the buffer holds exponentials, and nothing scales or clears what they give.
  template <bool kShort>
  FUSED_CE_HOST_DEVICE V gradient_at(int i, int k) const {
    const bool entropy = kHasTerms && !kShort && options.has_entropy;
    SoftmaxGradient<V> factors = buffers.factors.at(i);
    V below{}, e = load(buffers.logits + k * stride + i);
    if (!kShort && !keeps) {
      below = finite_reference(load(buffers.sums.reference + i)) - e;
      e = math::exp_negative<kPrecision>(below);
    }
    V gradient = gradient_of(factors, e, below, coefficient_of(k, i), smooths || weighs, entropy);
    const V place = V{} + static_cast<Real>(k);
    gradient = load(buffers.label + i) == place ? gradient - factors.label : gradient;
    if constexpr (kShort) return gradient;
    if (options.transforms) gradient *= load(buffers.slope + k * stride + i);
    if (clears_ignored) gradient = load(rows.is_kept + i) == 0.0f ? V{} : gradient;
    return gradient;
  }

  // Puts the gradient of the block's class k at `to`, where its rows are neighbours.
  template <bool kShort, class T>
  void put_gradient(int k, T* to) {  // [count]
    for (int i = 0; i < padded; i += kWidth) {
      V gradient = gradient_at<kShort>(i, k);
      if (i + kWidth > count) {
        Real* values = buffers.logits + k * stride + i;
        store(values, gradient);
        return store_run(values, count - i, to + i);
      }
      put(to + i, gradient, streams);
    }
  }

  template <bool kShort>
  void write_gradient(int64_t c, int classes) {
    if (char* turned = classes == a.classes ? in_rows(a.gradient) : nullptr) {
      with_own_type(a.gradient.dtype, [&](auto type) {
        auto at = [&](int i, int k)
                      __attribute__((always_inline)) { return gradient_at<kShort>(i, k); };
        using T = decltype(type);
        T* to = reinterpret_cast<T*>(turned);
        if constexpr (kShort && std::is_same_v<T, float>) {
          // By way of a buffer, which logits that are not transformed leave free: rows end anywhere
          // in a line of memory, and only whole ones go past the caches.
          if (streams) {
            columns_to_rows<Real>(at, count, classes, buffers.slope);
            return stream_run(buffers.slope, count * classes, to);
          }
        }
        columns_to_rows<Real>(at, count, classes, to);
      });
      return;
    }
    for (int k = 0; k < classes; ++k) {
      Real* values = buffers.logits + k * stride;
      char* to = dense(a.gradient, c + k);
      bool written = to != nullptr && with_own_type(a.gradient.dtype, [&](auto type) {
                       put_gradient<kShort>(k, reinterpret_cast<decltype(type)*>(to));
                     });
      if (written) continue;
      for (int i = 0; i < padded; i += kWidth) {
        store(values + i, gradient_at<kShort>(i, k));
      }
      scatter(values, class_at(a.gradient, c + k), a.rows, begin, count);
    }
  }

  // From the sums to the results, and to the factors of the gradient. Without extras there is
  // nothing but the labels' loss.
  template <bool kExtras>
  void evaluate() {
    auto extra = [](const Real* values) { return kExtras ? load(values) : V{}; };
    const V z_loss = kExtras ? V{} + options.z_loss : V{};
    for (int i = 0; i < padded; i += kWidth) {
      SoftmaxSums<V> sums = buffers.sums.at(i);
      sums.reference = finite_reference(sums.reference);
      V label_weight = load(rows.label_weight + i);
      auto row = SoftmaxRow<V>::evaluate(sums, !a.has_probabilities, label_weight,
                                         load(rows.label_logit + i), z_loss);
      store(rows.loss + i, row.loss);
      store(rows.lse + i, row.lse);
      if constexpr (kHasTerms) store(rows.entropy + i, row.entropy);
      if (!a.gradient) continue;
      buffers.factors.put(
          i, SoftmaxGradient<V>::evaluate(sums, row, label_weight, z_loss, load(rows.upstream + i),
                                          extra(rows.grad_lse + i), extra(rows.grad_entropy + i)));
    }
  }

  // Of two classes. The gradients take the logits' place, as exponentials whose factor is 1.
  void evaluate_pair() {
    const V one = V{} + static_cast<Real>(1);
    const auto ask_for_next = next_rows(2);
    for (int i = 0; i < padded; i += kWidth) {
      ask_for_next(i);
      Real *first = buffers.logits + i, *second = first + stride;
      const auto is_second = load(buffers.label + i) == one;
      auto row =
          SoftmaxPair<V>::template evaluate<kPrecision>(load(first), load(second), is_second);
      V label_weight = load(rows.label_weight + i);
      store(rows.loss + i, label_weight * row.loss);
      store(rows.lse + i, row.lse);
      if (!a.gradient) continue;
      V gradient = row.gradient(label_weight * load(rows.upstream + i));
      store(first, is_second ? gradient : -gradient);
      store(second, is_second ? -gradient : gradient);
      buffers.factors.put(i, {one, V{}, V{}, V{}});
    }
  }

  void run(int64_t first_row, int row_count) {
    begin = first_row;
    count = row_count;
    int vectors = (count + kWidth - 1) / kWidth;
    padded = vectors * kWidth;
    stride = (vectors | 1) * kWidth;
    int block = static_cast<int>(a.classes < kRowBlock / stride ? a.classes : kRowBlock / stride);
    bool single = a.classes <= block;
    keeps = single && a.gradient && !a.grad_entropy && !options.has_entropy;
    clears_ignored = rows.ignored > 0 && !a.has_ignored_gradient();
    // Of no classes there is no first block, which sets the sums.
    if (a.classes == 0) {
      for (int i = 0; i < padded; i += kWidth) {
        buffers.sums.put(i, {V{} - static_cast<Real>(INFINITY), V{}, V{}, V{}, V{}});
      }
    }
    if (options.finds_largest) {
      for (int i = 0; i < count; ++i) buffers.best[i] = buffers.best_target[i] = {};
    }
    for (int i = count; i < padded; ++i) {
      rows.label_weight[i] = rows.label_logit[i] = rows.upstream[i] = rows.grad_lse[i] =
          rows.grad_entropy[i] = 0;
      rows.label[i] = -1;
    }
    if (is_pair) {
      fill(0, 2);
      evaluate_pair();
    } else {
      for (int64_t c = 0; c < a.classes; c += block) {
        int classes = static_cast<int>(a.classes - c < block ? a.classes - c : block);
        fill(c, classes);
        add(c, classes);
      }
      const bool has_extras = kHasTerms || options.z_loss != 0 || a.grad_lse;
      has_extras ? evaluate<true>() : evaluate<false>();
    }
    if (options.finds_largest) {
      for (int i = 0; i < count; ++i) {
        rows.prediction[i] = buffers.best[i].index();
        rows.best_target[i] = buffers.best_target[i].index();
      }
    }
    if (!a.gradient) return;
    for (int64_t c = 0; c < a.classes; c += block) {
      int classes = static_cast<int>(a.classes - c < block ? a.classes - c : block);
      if (!single) fill(c, classes);
      if (keeps && !options.transforms && !clears_ignored) {
        write_gradient<true>(c, classes);
      } else {
        write_gradient<false>(c, classes);
      }
    }
  }
};

template <class Real, Terms kTerms, Precision kPrecision>
double row_wise(const SoftmaxCeArguments& a, int64_t begin, int64_t end, double scale) {
  using Loop = RowWise<Real, kTerms, kPrecision>;
  RowBuffers<Real> rows(a, end - begin);
  typename Loop::Buffers buffers;
  const Options<Real> options(a);
  Loop loop{a, options, buffers, rows};
  // As many rows as fit into the buffer with all their classes, but whole vectors of them.
  int64_t vectors = a.classes > 0 ? kRowBlock / a.classes / Loop::kWidth - 1 : kRowsAtOnce;
  int64_t step = vectors * Loop::kWidth;
  step = step > kRowsAtOnce ? kRowsAtOnce : step < 4 * Loop::kWidth ? 4 * Loop::kWidth : step;
  Sum sum;
  for (int64_t at = begin; at < end; at += step) {
    int count = static_cast<int>(end - at < step ? end - at : step);
    load_rows(a, at, count, scale, rows);
    loop.run(at, count);
    sum.add(finish_rows(a, at, count, rows));
  }
  if (loop.streams) stream_end();
  return sum.total();
}

}  // namespace
}  // namespace fused_ce
