// Softmax cross entropy where a vector holds neighbouring classes of one row.
#pragma once

#include <memory>

#include "softmax_ce_row.h"

namespace fused_ce {
namespace {

constexpr int kClassBlock = 4096;  // classes in a buffer
// From this many classes on, a vector holds classes. One that holds rows takes probabilities class
// by class, which costs more: with these, from as few as a step has.
constexpr int64_t kManyClasses = 128, kManyProbabilities = 32;

// The longest row that keeps its exponentials, where not over the gradient, in 1 MiB of each
// thread, which costs less than to compute them again even where only the third-level cache holds
// it (measured); and where logits are transformed, the slopes.
constexpr int64_t kMostKept = 64 * kClassBlock;
template <class Real>
struct KeptRow {
  alignas(64) Real exponentials[kMostKept];  // before these, the logits where they are gathered
  alignas(64) Real slope[kMostKept];
};
template <class Real>
KeptRow<Real>& kept_row_of_thread() {
  static thread_local const std::unique_ptr<KeptRow<Real>> row(new KeptRow<Real>);
  return *row;
}

// The operand's classes of one row as an operand of one dimension.
struct RowClasses : Operand {
  explicit RowClasses(const ClassOperand& operand) {
    data = operand.data;
    dtype = operand.dtype;
    strides[0] = operand.class_stride;
  }
  void move_to(const ClassOperand& operand, const IndexSpace& rows, int64_t row) {
    if (operand) data = address_of(operand, offset_of(operand, rows, row));
  }
};
inline IndexSpace class_space(int64_t classes) {
  IndexSpace space;
  space.rank = 1;
  space.sizes[0] = space.numel = classes;
  return space;
}

// Loops over classes take steps of Computing::kStep of them, of which a block has at least one; the
// last step ends where the block does, and so takes some classes again. Exponentials are kept in
// the order of load_two, a place for each class, or whole steps of places where that order is not
// the classes' (`last_place`).

// Where the last step's exponentials are kept: over those that it takes again, which are the same,
// or else behind them.
template <class T>
FUSED_CE_HOST_DEVICE int last_place(int count) {
  constexpr int kStep = Computing<RealOf<T>>::kStep;
  return std::is_same_v<T, BFloat16> ? (count - 1) / kStep * kStep : count - kStep;
}

template <class T>
auto block_max(const T* x, int count) {  // [count]
  using Real = RealOf<T>;
  using V = typename Computing<Real>::Vector;
  constexpr int kStep = Computing<Real>::kStep;
  V low = V{} - static_cast<Real>(INFINITY);
  Two<V> top{low, low};
  auto step = [&](int i) __attribute__((always_inline)) {
    Two<V> two = load_two<T>(x + i);
    top.first = math::Machine<V>::greater(two.first, top.first);
    top.second = math::Machine<V>::greater(two.second, top.second);
  };
  for (int i = 0; i + kStep <= count; i += kStep) step(i);
  step(count - kStep);
  return max_of_lanes(math::Machine<V>::greater(top.first, top.second));
}

// The coefficients of a block of classes: `factor` times what is stored for each, or for all alike.
template <class T>
struct Coefficients {
  using Real = RealOf<T>;
  const T* own;      // [count] or null: in the logits' type
  const Real* each;  // [count] or null
  Real factor;       // 0 where there are none

  FUSED_CE_HOST_DEVICE auto two(int i) const {
    using V = typename Computing<Real>::Vector;
    if (own != nullptr) return load_two<T>(own + i);
    return each != nullptr ? load_two<T>(each + i) : Two<V>{V{} + Real{1}, V{} + Real{1}};
  }
};

// The places of a step's elements in it, in the order of load_two.
template <class T>
FUSED_CE_HOST_DEVICE auto places() {
  using Real = RealOf<T>;
  Real place[Computing<Real>::kStep];
  for (int i = 0; i < Computing<Real>::kStep; ++i) place[i] = static_cast<Real>(i);
  return load_two<T>(place);
}
// The sums of those lanes that are `in`.
template <class V, class Mask>
FUSED_CE_HOST_DEVICE SoftmaxSums<V> only(const SoftmaxSums<V>& sums, Mask in) {
  return {sums.reference, in ? sums.exponentials : V{}, in ? sums.coefficients : V{},
          in ? sums.cost : V{}, in ? sums.entropy : V{}};
}

// The sums are float64: the vectors' own are added to them after a few steps. What lies at `ahead`
// is what will be read next: memory works while the exponentials are computed.
template <Terms kTerms, Precision kPrecision, class T, class Real>
__attribute__((noinline)) void block_sums(const T* x,  // [count]
                                          Coefficients<T> coefficients,
                                          Real* kept,  // [count or steps * kStep] or null
                                          int count, SoftmaxSums<double>& sums,
                                          const T* ahead) {  // [count]
  using V = typename Computing<Real>::Vector;
  using Total = typename Computing<Real>::Total;
  constexpr int kStep = Computing<Real>::kStep;
  constexpr int kStepsPerSum = 8;
  constexpr bool kWeighted = kTerms != Terms::kPlain, kEntropy = kTerms == Terms::kAll;
  const Real reference = static_cast<Real>(finite_reference(sums.reference));
  const V top = V{} + reference;
  Total exponentials, all_coefficients, cost, entropy;
  SoftmaxSums<V> one{}, other{};
  auto step = [&](int i) __attribute__((always_inline)) -> Two<V> {
    prefetch_step(ahead + i);
    Two<V> l = load_two<T>(x + i);
    Two<V> b{};
    if constexpr (kWeighted) b = coefficients.two(i);
    return {add_logit<kPrecision>(one, top, l.first, b.first, kWeighted, kEntropy),
            add_logit<kPrecision>(other, top, l.second, b.second, kWeighted, kEntropy)};
  };
  auto total = [&]() __attribute__((always_inline)) {
    exponentials.add(one.exponentials + other.exponentials);
    if constexpr (kEntropy) entropy.add(one.entropy + other.entropy);
    if constexpr (kWeighted) {
      all_coefficients.add(one.coefficients + other.coefficients);
      cost.add(one.cost + other.cost);
    }
    one = other = SoftmaxSums<V>{};
  };
  // What the last step takes, but for what the others take too; before anything is kept, which may
  // be over the logits.
  Two<V> last{};
  const int rest = count % kStep;
  if (rest != 0) {
    last = step(count - kStep);
    const Two<V> place = places<T>();
    const V fresh = V{} + static_cast<Real>(kStep - rest);
    one = only(one, place.first >= fresh);
    other = only(other, place.second >= fresh);
  }
  for (int i = 0; i + kStep <= count;) {
    int end = i + kStepsPerSum * kStep < count ? i + kStepsPerSum * kStep : count;
    for (; i + kStep <= end; i += kStep) {
      Two<V> e = step(i);
      if (kept != nullptr) store_two(kept + i, e);
    }
    total();
  }
  if (kept != nullptr && rest != 0) store_two(kept + last_place<T>(count), last);
  sums.exponentials += exponentials.total();
  if (kEntropy) sums.entropy += entropy.total();
  if (!kWeighted || coefficients.factor == 0) return;
  sums.cost += coefficients.factor * cost.total();
  sums.coefficients += coefficients.factor * all_coefficients.total();
}

// The gradient of a block, from its logits, or from kept exponentials where `kept` is not null.
template <Terms kTerms, Precision kPrecision, class T, class Real>
__attribute__((noinline)) void block_gradient(const T* x,  // [count]
                                              Coefficients<T> coefficients,
                                              const Real* kept,  // [count or steps * kStep] or null
                                              int count, Real reference,
                                              const SoftmaxGradient<Real>& factors,
                                              const T* ahead,  // [count]
                                              T* gradient) {   // [count]
  using V = typename Computing<Real>::Vector;
  constexpr int kStep = Computing<Real>::kStep;
  constexpr bool kWeighted = kTerms != Terms::kPlain, kEntropy = kTerms == Terms::kAll;
  const V top = V{} + reference;
  const Real shared = factors.coefficient * coefficients.factor;
  const SoftmaxGradient<V> f{V{} + factors.exponential, V{} + factors.entropy, V{} + shared,
                             V{} + factors.label};
  auto step = [&](int i, int place) __attribute__((always_inline)) -> Two<V> {
    Two<V> b{}, below{}, e;
    if constexpr (kWeighted) b = coefficients.two(i);
    if (!kEntropy && kept != nullptr) {
      // A gradient of the exponentials' type has held them, or goes past the caches.
      if constexpr (std::is_same_v<T, Real>) {
        prefetch_step(x + i + kAhead<T>);
      } else {
        prefetch_step<true>(gradient + i + kAhead<T>);
      }
      e = load_two<Real>(kept + place);
    } else {
      prefetch_step(ahead + i);
      Two<V> l = load_two<T>(x + i);
      below = {top - l.first, top - l.second};
      e = {math::exp_negative<kPrecision>(below.first),
           math::exp_negative<kPrecision>(below.second)};
    }
    return {gradient_of(f, e.first, below.first, b.first, kWeighted, kEntropy),
            gradient_of(f, e.second, below.second, b.second, kWeighted, kEntropy)};
  };
  // Before anything is written, which may be over the logits.
  const Two<V> last = step(count - kStep, last_place<T>(count));
  for (int i = 0; i + kStep <= count; i += kStep) store_two(gradient + i, step(i, i));
  store_two(gradient + count - kStep, last);
}

// Whether logits and gradient are of type T and lie one behind another, class by class.
template <class T>
bool lies_in_rows(const SoftmaxCeArguments& a) {
  const ClassOperand* operands[] = {&a.input, &a.gradient};
  for (const ClassOperand* operand : operands) {
    if (!*operand) continue;
    if (!lies_flat<T>(RowClasses(*operand), class_space(a.classes))) return false;
  }
  return true;
}

// T is the logits' type as the loops take them: as they lie, or else Real in a buffer.
template <class T, Terms kTerms, Precision kPrecision>
struct ClassWise {
  using Real = RealOf<T>;
  static constexpr bool kMayBuffer = std::is_same_v<T, Real>;
  static constexpr int kStep = Computing<Real>::kStep;
  // The longest row beside which the next one's logits fit into the second-level cache: they are
  // asked for in its second pass.
  static constexpr int64_t kShortRow = (int64_t{1} << 18) / static_cast<int64_t>(sizeof(T));
  static constexpr int kMostAtOnce = kClassBlock / static_cast<int>(kManyProbabilities);

  struct Buffers {
    alignas(64) T logits[kClassBlock], gradient[kClassBlock];
    alignas(64) Real slope[kClassBlock], coefficients[kClassBlock], weight[kClassBlock];
    double reference[kMostKept / kClassBlock + 1];  // of the blocks' kept exponentials
  };

  const SoftmaxCeArguments& a;
  const Options<Real>& options;
  Buffers& buffers;
  RowBuffers<Real>& rows;
  const IndexSpace space = class_space(a.classes);
  const bool is_direct = !kMayBuffer || (lies_in_rows<T>(a) && !options.transforms);
  const bool is_single = is_direct && a.classes <= kClassBlock;
  const bool keeps = kTerms != Terms::kAll && a.gradient && a.classes <= kMostKept;
  const bool streams = is_single && is_streamed(a.gradient, a.input, a.rows.numel* a.classes);
  // A row keeps its exponentials in whole steps, and as many rows go together as a buffer holds.
  // With a gradient these are fewer, 4 KiB of logits: where memory is read for longer and then
  // written for longer, it is slower (measured).
  const int64_t kept_classes = (a.classes + kStep - 1) / kStep * kStep;
  const int64_t fit = (a.gradient ? 4096 / int64_t{sizeof(T)} : kClassBlock) / kept_classes;
  const int64_t at_once = is_single && fit > 1 ? fit : 1;
  const bool takes_lse = a.is_backward && a.lse && a.half_precision && !options.has_coefficients &&
                         (!options.has_entropy || a.entropy);
  RowClasses input{a.input}, target{a.target}, weight{a.weight}, gradient{a.gradient};

  // An error of lse is a relative error of the whole gradient: one rounded to float32 is good
  // enough for half types alone, and where it is small: up to 128 it is off by 4e-6.
  bool has_lse(int i) const { return takes_lse && rows.lse[i] <= 128 && rows.lse[i] >= -128; }

  template <class F>
  void for_each_block(F f) const {
    for (int64_t c = 0; c < a.classes;) {
      int64_t left = a.classes - c;
      int count = static_cast<int>(left <= kClassBlock          ? left
                                   : left < kClassBlock + kStep ? kClassBlock - kStep
                                                                : kClassBlock);
      f(c, count);
      c += count;
    }
  }

  // `are_kept`: the place of gathered logits, where the row has its exponentials by now.
  const T* logits(int64_t c, int count, bool are_kept = false) {
    if constexpr (kMayBuffer) {
      if (!is_direct) {
        Real* to = keeps ? kept_row_of_thread<Real>().exponentials + c : buffers.logits;
        if (are_kept) return to;
        gather(input, space, c, count, to);
        if (options.transforms) options.transform(to, slope(c), count);
        return to;
      }
    }
    return static_cast<const T*>(input.data) + c;
  }
  // Of the transformed logits from class c on.
  Real* slope(int64_t c) { return keeps ? kept_row_of_thread<Real>().slope + c : buffers.slope; }
  Real label_logit(int64_t label) {
    if (is_direct) return to_real<Real>(static_cast<const T*>(input.data)[label]);
    Real logit;
    gather(input, space, label, 1, &logit);
    if (options.transforms) options.transform(&logit, nullptr, 1);
    return logit;
  }

  Coefficients<T> coefficients(int64_t c, int count) {
    if (kTerms == Terms::kPlain || !options.has_coefficients) return {nullptr, nullptr, 0};
    auto own = [&](const Operand& operand, Real factor) {
      return Coefficients<T>{static_cast<const T*>(operand.data) + c, nullptr, factor};
    };
    if (!a.has_probabilities) {
      if (!a.weight) return {nullptr, nullptr, options.share};
      if (lies_flat<T>(weight, space)) return own(weight, options.share);
    } else if (!a.weight && a.label_smoothing == 0 && lies_flat<T>(target, space)) {
      return own(target, 1);
    }
    Real* b = buffers.coefficients;
    if (a.has_probabilities) {
      gather(target, space, c, count, b);
    } else {
      for (int i = 0; i < count; ++i) b[i] = 0;
    }
    for (int i = 0; i < count; ++i) b[i] = math::multiply_add(b[i], options.keep, options.share);
    if (a.weight) {
      gather(weight, space, c, count, buffers.weight);
      for (int i = 0; i < count; ++i) b[i] *= buffers.weight[i];
    }
    return {nullptr, b, 1};
  }

  // A row on its way through the passes of `run`.
  struct Row {
    int64_t row;
    int i;       // its place in RowBuffers
    Real* kept;  // [classes or steps * kStep] or null
    SoftmaxSums<double> sums;
    SoftmaxGradient<double> factors;
    Real at_label;
  };

  // Works through some rows together: the processor goes on to the next row's logits while one's
  // sums and logarithm keep it waiting.
  void run(Row* batch, int count) {  // [count]
    for (int j = 0; j < count; ++j) {
      batch[j].kept = keeps ? kept_of(batch[j].row, j) : nullptr;
      start(batch[j]);
    }
    for (int j = 0; j < count; ++j) add_up(batch[j]);
    for (int j = 0; j < count; ++j) evaluate(batch[j]);
    if (!a.gradient) return;
    for (int j = 0; j < count; ++j) write_gradient(batch[j]);
  }

  // The memory for the exponentials of a row, the j-th of those that go together: that of its
  // gradient where this has their type and stays in the caches, or else the thread's own.
  Real* kept_of(int64_t row, int j) {
    if (!std::is_same_v<T, Real> || !is_direct || streams) {
      return kept_row_of_thread<Real>().exponentials + j * kept_classes;
    }
    gradient.move_to(a.gradient, a.rows, row);
    return static_cast<Real*>(gradient.data);
  }
  // The place of a block's reference.
  static int64_t block_of(int64_t c) { return (c + kStep) / kClassBlock; }

  void move_to(int64_t row) {
    input.move_to(a.input, a.rows, row);
    if (a.has_probabilities) target.move_to(a.target, a.rows, row);
  }

  void start(Row& row) {
    const int i = row.i;
    move_to(row.row);
    if (rows.label[i] >= 0) rows.label_logit[i] = label_logit(rows.label[i]);
    row.sums = {-INFINITY, 0, 0, 0, 0};
    if (is_single && !has_lse(i)) row.sums.reference = block_max(logits(0, a.classes), a.classes);
  }

  void add_up(Row& row) {
    const int i = row.i;
    move_to(row.row);
    if (options.finds_largest) find_largest(i);
    SoftmaxSums<double>& sums = row.sums;
    if (has_lse(i)) {
      sums.reference = rows.lse[i];
      sums.exponentials = 1;
      row.kept = nullptr;
    } else {
      for_each_block([&](int64_t c, int count) {
        const T* x = logits(c, count);
        const int64_t next = is_single ? at_once * a.classes : count;
        const int64_t ahead = next > kAhead<T> ? next : kAhead<T>;
        if (!is_single) {
          admit<double>(sums, block_max(x, count), options.has_coefficients, options.has_entropy);
        }
        Real* kept = row.kept != nullptr ? row.kept + c : nullptr;
        if (kept != nullptr) buffers.reference[block_of(c)] = sums.reference;
        block_sums<kTerms, kPrecision>(x, coefficients(c, count), kept, count, sums, x + ahead);
      });
    }
    sums.reference = finite_reference(sums.reference);
  }

  void evaluate(Row& row) {
    const int i = row.i;
    auto result = SoftmaxRow<double>::evaluate(row.sums, !a.has_probabilities, rows.label_weight[i],
                                               rows.label_logit[i], options.z_loss);
    rows.loss[i] = static_cast<Real>(result.loss);
    rows.lse[i] = static_cast<Real>(result.lse);
    if (a.is_backward && a.entropy) result.entropy = rows.entropy[i];
    rows.entropy[i] = static_cast<Real>(result.entropy);
    if (!a.gradient) return;
    row.factors =
        SoftmaxGradient<double>::evaluate(row.sums, result, rows.label_weight[i], options.z_loss,
                                          rows.upstream[i], rows.grad_lse[i], rows.grad_entropy[i]);
    if (rows.label[i] >= 0) {
      row.at_label =
          gradient_at(rows.label[i], rows.label_logit[i], static_cast<Real>(row.sums.reference),
                      factors_of(row, row.factors.exponential));
    }
  }
  // With the factor of the exponentials given.
  static SoftmaxGradient<Real> factors_of(const Row& row, double exponential) {
    return {static_cast<Real>(exponential), static_cast<Real>(row.factors.entropy),
            static_cast<Real>(row.factors.coefficient), static_cast<Real>(row.factors.label)};
  }

  void write_gradient(const Row& row) {
    if (rows.is_kept[row.i] == 0 && !a.has_ignored_gradient()) return clear(row.row);
    move_to(row.row);
    gradient.move_to(a.gradient, a.rows, row.row);
    T* row_gradient = static_cast<T*>(gradient.data);
    // A line that two rows share is read before it is written: without this, each row waits for it.
    if (streams) {
      const int64_t rows_ahead = (kAhead<T> + a.classes - 1) / a.classes;
      __builtin_prefetch(row_gradient + rows_ahead * a.classes, 1);
    }
    for_each_block([&](int64_t c, int count) {
      const Real* kept = row.kept != nullptr ? row.kept + c : nullptr;
      const T* x = logits(c, count, kept != nullptr);
      const T* ahead = a.classes <= kShortRow ? x + a.classes : x + count;
      T* to = is_direct && !streams ? row_gradient + c : buffers.gradient;
      double exponential = row.factors.exponential;
      if (kept != nullptr && !is_single) {
        double above = row.sums.reference - buffers.reference[block_of(c)];
        exponential *= math::exp_negative<Precision::kFull>(above);
      }
      block_gradient<kTerms, kPrecision>(x, coefficients(c, count), kept, count,
                                         static_cast<Real>(row.sums.reference),
                                         factors_of(row, exponential), ahead, to);
      if constexpr (kMayBuffer) {
        if (options.transforms) {
          const Real* slopes = slope(c);
          for (int k = 0; k < count; ++k) to[k] *= slopes[k];
        }
      }
      const int64_t label = rows.label[row.i] - c;
      if (label >= 0 && label < count) to[label] = from_real<T>(row.at_label);
      if constexpr (kMayBuffer) {
        if (!is_direct) return scatter(to, gradient, space, c, count);
      }
      if constexpr (std::is_same_v<T, float>) {
        if (streams) stream_run(to, count, row_gradient + c);
      }
    });
  }

  // The label's own gradient, where the two terms meet before anything is rounded.
  Real gradient_at(int64_t label, Real logit, Real reference,
                   const SoftmaxGradient<Real>& factors) {
    Real below = reference - logit;
    Real e = math::exp_negative<kPrecision>(below);
    Real b = options.share * (options.has_coefficients ? class_weight<Real>(a, label) : 1);
    Real gradient =
        gradient_of(factors, e, below, b, options.has_coefficients, options.has_entropy) -
        factors.label;
    if (options.cap != 0) {
      Real t = logit / options.cap;
      gradient *= 1 - t * t;
    }
    return gradient * options.scale;
  }

  void find_largest(int i) {
    Largest<Real> best{}, best_target{};
    for_each_block([&](int64_t c, int count) {
      gather(input, space, c, count, buffers.slope);
      if (options.transforms) options.transform(buffers.slope, nullptr, count);
      for (int k = 0; k < count; ++k) best.offer(buffers.slope[k], c + k);
      if (!a.has_probabilities) return;
      gather(target, space, c, count, buffers.slope);
      for (int k = 0; k < count; ++k) best_target.offer(buffers.slope[k], c + k);
    });
    rows.prediction[i] = best.index();
    rows.best_target[i] = best_target.index();
  }

  void clear(int64_t row) {
    gradient.move_to(a.gradient, a.rows, row);
    Real* zeros = buffers.slope;
    for (int k = 0; k < kClassBlock && k < a.classes; ++k) zeros[k] = 0;
    for_each_block([&](int64_t c, int count) { scatter(zeros, gradient, space, c, count); });
  }
};

template <class T, Terms kTerms, Precision kPrecision>
double class_wise(const SoftmaxCeArguments& a, int64_t begin, int64_t end, double scale) {
  using Real = RealOf<T>;
  RowBuffers<Real> rows(a, end - begin);
  typename ClassWise<T, kTerms, kPrecision>::Buffers buffers;
  const Options<Real> options(a);
  using Loop = ClassWise<T, kTerms, kPrecision>;
  Loop loop{a, options, buffers, rows};
  typename Loop::Row batch[Loop::kMostAtOnce];
  Sum sum;
  for (int64_t at = begin; at < end; at += kRowsAtOnce) {
    int count = static_cast<int>(end - at < kRowsAtOnce ? end - at : kRowsAtOnce);
    load_rows(a, at, count, scale, rows);
    if (a.is_backward && a.lse) gather(a.lse, a.rows, at, count, rows.lse);
    if (a.is_backward && a.entropy) gather(a.entropy, a.rows, at, count, rows.entropy);
    int waiting = 0;
    for (int i = 0; i < count; ++i) {
      if (rows.is_kept[i] != 0 || a.reads_ignored()) {
        batch[waiting].row = at + i;
        batch[waiting++].i = i;
        if (waiting < loop.at_once) continue;
        loop.run(batch, waiting);
        waiting = 0;
      } else if (a.gradient) {
        loop.clear(at + i);
      }
    }
    loop.run(batch, waiting);
    sum.add(finish_rows(a, at, count, rows));
  }
  if (loop.streams) stream_end();
  return sum.total();
}

}  // namespace
}  // namespace fused_ce
