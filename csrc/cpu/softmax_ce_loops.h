// Softmax cross entropy, in two ways. Where the classes of a row lie one behind another and are
// many, a vector holds neighbouring classes of one row (`ClassWise`); else it holds one class of
// neighbouring rows (`RowWise`). Both take the classes in blocks that stay in the first-level
// cache: one pass over memory for the sums, whose reference moves up as larger logits come, and for
// the gradient a second one, or none if the exponentials of all classes have been kept. Both ask
// for what comes next before they compute, so that memory does not wait for the arithmetic.
#pragma once

#include "../softmax_ce.h"
#include "computing.h"

namespace fused_ce {
namespace {

constexpr int kRowsAtOnce = 512;
constexpr int kClassBlock = 4096;
constexpr int kRowBlock = 16384;
constexpr int kClassesPerSum = 4;
// From so many classes on, a vector holds classes; with probabilities, which rows take one class at
// a time, from as few as a step has.
constexpr int64_t kManyClasses = 128, kManyProbabilities = 32;

// What is read and written once a row, for up to kRowsAtOnce of them.
template <class Real>
struct RowBuffers {
  int ignored;                         // how many rows are
  int64_t label[kRowsAtOnce];          // -1 where there is none
  alignas(64) Real kept[kRowsAtOnce],  // 0 where the row is ignored, else 1
      label_weight[kRowsAtOnce], sample_weight[kRowsAtOnce], grad_loss[kRowsAtOnce],
      grad_lse[kRowsAtOnce], grad_entropy[kRowsAtOnce],
      upstream[kRowsAtOnce],  // of the row's loss before its sample weight; 0 where it is ignored
      label_logit[kRowsAtOnce], loss[kRowsAtOnce], lse[kRowsAtOnce], entropy[kRowsAtOnce];
  int64_t prediction[kRowsAtOnce];
  int64_t best_target[kRowsAtOnce];

  // For up to `most` rows at once. What is absent is the same for all rows.
  RowBuffers(const SoftmaxCeArguments& a, int64_t most) {
    const Real grad_of_loss = a.is_backward ? 0 : 1;
    for (int i = 0; i < kRowsAtOnce && i < most; ++i) {
      sample_weight[i] = 1;
      grad_loss[i] = grad_of_loss;
      grad_lse[i] = grad_entropy[i] = 0;
    }
  }
};

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

template <class Real>
Real class_weight(const SoftmaxCeArguments& a, int64_t c) {
  Real weight = 1;
  if (!a.weight) return weight;
  with_type(a.weight.dtype, [&](auto type) {
    using T = decltype(type);
    weight = to_real<Real>(static_cast<const T*>(a.weight.data)[c * a.weight.class_stride]);
  });
  return weight;
}

// The weights of the labels; 0 where a label is negative.
template <class Real>
void label_weights(const SoftmaxCeArguments& a, const int64_t* labels, int count,  // [count]
                   Real* weights) {                                                // [count]
  with_type(a.weight.dtype, [&](auto type) {
    using T = decltype(type);
    const T* of_classes = static_cast<const T*>(a.weight.data);
    for (int i = 0; i < count; ++i) {
      int64_t label = labels[i] < 0 ? 0 : labels[i];
      Real weight = to_real<Real>(of_classes[label * a.weight.class_stride]);
      weights[i] = labels[i] < 0 ? 0 : weight;
    }
  });
}

template <class Real>
void load_rows(const SoftmaxCeArguments& a, int64_t begin, int count, double scale,
               RowBuffers<Real>& rows) {
  auto read = [&](const Operand& operand, Real* to) {
    if (operand) gather(operand, a.rows, begin, count, to);
  };
  read(a.sample_weight, rows.sample_weight);
  read(a.grad_loss, rows.grad_loss);
  read(a.grad_lse, rows.grad_lse);
  read(a.grad_entropy, rows.grad_entropy);
  rows.ignored = 0;
  if (a.has_probabilities) {
    for (int i = 0; i < count; ++i) {
      rows.label[i] = -1;
      rows.kept[i] = 1;
      rows.label_weight[i] = 0;
    }
  } else {
    gather(a.target, a.rows, begin, count, rows.label);
    const Real share = static_cast<Real>(1 - a.label_smoothing);
    int64_t ignored = 0;
    for (int i = 0; i < count; ++i) ignored += rows.label[i] == a.ignore_index;
    rows.ignored = static_cast<int>(ignored);
    for (int i = 0; i < count; ++i) {
      bool kept = rows.label[i] != a.ignore_index;
      rows.kept[i] = kept ? 1 : 0;
      rows.label_weight[i] = kept ? share : 0;
      rows.label[i] = kept ? rows.label[i] : -1;
    }
    if (a.weight && a.classes > 0) {
      label_weights(a, rows.label, count, rows.label_weight);
      for (int i = 0; i < count; ++i) rows.label_weight[i] *= share;
    }
  }
  const Real factor = static_cast<Real>(scale);
  for (int i = 0; i < count; ++i) {
    Real upstream = rows.grad_loss[i] * rows.sample_weight[i] * factor;
    rows.upstream[i] = rows.kept[i] != 0 ? upstream : 0;
    rows.label_logit[i] = 0;
  }
}

// Whether an ignored row's logits count for nothing that is wanted.
inline bool skips_ignored(const SoftmaxCeArguments& a) {
  return !a.has_stats() && !a.grad_lse && !a.grad_entropy;
}

template <class T, class From>
void store_rows(const Operand& operand, const IndexSpace& space, int64_t begin, int count,
                const From* values /* [count] */) {
  for_each_run<T>(operand, space, begin, count, [&](T* p, int64_t stride, int length, int place) {
    for (int i = 0; i < length; ++i) p[i * stride] = static_cast<T>(values[place + i]);
  });
}

// Returns the summed loss.
template <class Real>
double finish_rows(const SoftmaxCeArguments& a, int64_t begin, int count, RowBuffers<Real>& rows) {
  if (a.is_backward) return 0;
  for (int i = 0; i < count; ++i) {
    Real loss = rows.loss[i] * rows.sample_weight[i];
    rows.loss[i] = rows.kept[i] != 0 ? loss : 0;
  }
  typename Computing<Real>::Total sum;
  constexpr int kWidth = Computing<Real>::kStep / 2;
  int padded = (count + kWidth - 1) / kWidth * kWidth;
  for (int i = count; i < padded; ++i) rows.loss[i] = 0;
  for (int i = 0; i < padded; i += kWidth) sum.add(load(rows.loss + i));
  if (a.loss && a.reduction == Reduction::kNone) {
    scatter(rows.loss, a.loss, a.rows, begin, count);
  }
  if (a.lse) scatter(rows.lse, a.lse, a.rows, begin, count);
  if (a.entropy) scatter(rows.entropy, a.entropy, a.rows, begin, count);
  if (a.prediction) {
    store_rows<int64_t>(a.prediction, a.rows, begin, count, rows.prediction);
  }
  if (a.correct) {
    bool correct[kRowsAtOnce];
    for (int i = 0; i < count; ++i) {
      int64_t right = a.has_probabilities ? rows.best_target[i] : rows.label[i];
      correct[i] = rows.kept[i] != 0 && rows.prediction[i] == right;
    }
    store_rows<bool>(a.correct, a.rows, begin, count, correct);
  }
  return sum.total();
}

// The first of the largest values seen; a NaN is larger than all. {} has seen none.
template <class Real>
struct Largest {
  Real value;
  int64_t seen;  // 1 + its index
  void offer(Real x, int64_t at) {
    if (seen == 0 || (x > value && value == value) || (x != x && value == value)) {
      value = x;
      seen = at + 1;
    }
  }
  int64_t index() const { return seen - 1; }
};

// What the loops need to know of the arguments, in their own type.
template <class Real>
struct Options {
  explicit Options(const SoftmaxCeArguments& a)
      : scale(static_cast<Real>(a.logit_scale)),
        cap(static_cast<Real>(a.softcap)),
        smoothed(a.classes > 0 ? static_cast<Real>(a.label_smoothing / a.classes) : 0),
        kept(static_cast<Real>(1 - a.label_smoothing)),
        z_loss(static_cast<Real>(a.z_loss)),
        transforms(a.logit_scale != 1 || a.softcap != 0),
        has_coefficients(a.has_probabilities || a.label_smoothing != 0),
        has_entropy(a.is_backward ? !!a.grad_entropy : !!a.entropy),
        finds_largest(!a.is_backward && (a.prediction || a.correct)) {}

  Real scale, cap, smoothed, kept, z_loss;
  bool transforms, has_coefficients, has_entropy, finds_largest;

  // Logits as the loss sees them; `slope`, if not null, becomes their derivative.
  void transform(Real* logits, Real* slope, int count) const {  // [count]
    using V = typename Computing<Real>::Vector;
    constexpr int kWidth = Computing<Real>::kStep / 2;
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      V x = load(logits + i), derivative = transform(x);
      store(logits + i, x);
      if (slope != nullptr) store(slope + i, derivative);
    }
    for (; i < count; ++i) {
      Real derivative = transform(logits[i]);
      if (slope != nullptr) slope[i] = derivative;
    }
  }

 private:
  // Returns the derivative.
  template <class V>
  V transform(V& x) const {
    x = x * scale;
    if (cap == 0) return V{} + scale;
    V t = math::tanh(x / cap);
    x = cap * t;
    return scale * (1 - t * t);
  }
};

// Moves the reference of sums to at least `top`, the largest of the logits to come.
template <class V>
FUSED_CE_HOST_DEVICE void admit(SoftmaxSums<V>& sums, V top, bool has_coefficients,
                                bool has_entropy) {
  // Of a row that is -inf so far, the reference is 0, so that no difference is NaN.
  const V low = V{} - INFINITY;
  V reference = sums.reference > top ? sums.reference : top;
  V from = sums.reference == low ? V{} : sums.reference;
  V to = reference == low ? V{} : reference;
  V shift = to - from;
  V factor = sums.reference == low ? V{} : math::exp_negative<Precision::kFull>(shift);
  if (has_entropy) {
    V moved = factor * math::multiply_add(shift, sums.exponentials, sums.entropy);
    sums.entropy = factor == 0.0f ? V{} : moved;
  }
  if (has_coefficients) {
    V moved = math::multiply_add(shift, sums.coefficients, sums.cost);
    sums.cost = sums.reference == low ? sums.cost : moved;
  }
  sums.exponentials = sums.exponentials * factor;
  sums.reference = reference;
}
template <class V>
FUSED_CE_HOST_DEVICE V finite_reference(V reference) {
  return reference == V{} - INFINITY ? V{} : reference;
}

// One logit's terms. Returns its exponential.
template <Precision kPrecision, class V>
FUSED_CE_HOST_DEVICE V add_logit(SoftmaxSums<V>& sums, V reference, V logit, V coefficient,
                                 bool has_coefficients, bool has_entropy) {
  V below = reference - logit;
  V e = math::exp_negative<kPrecision>(below);
  sums.exponentials += e;
  if (has_coefficients) {
    sums.cost += coefficient * below;
    sums.coefficients += coefficient;
  }
  if (has_entropy) {
    V term = e * below;
    sums.entropy += e == 0.0f ? e : term;
  }
  return e;
}

template <class V>
FUSED_CE_HOST_DEVICE V gradient_of(const SoftmaxGradient<V>& factors, V e, V below, V coefficient,
                                   bool has_coefficients, bool has_entropy) {
  V gradient = e * factors.exponential;
  if (has_entropy) {
    V term = e * factors.entropy * below;
    gradient += e == 0.0f ? e : term;
  }
  // Rounded like the other term, so that the two cancel where they should, as with one class.
  if (has_coefficients) gradient -= coefficient * factors.coefficient;
  return gradient;
}

// What a loop adds up: exponentials alone, with the coefficients' terms, or with the entropy too.
enum class Terms { kPlain, kCoefficients, kAll };

// ---- a vector holds classes ----

// Loops over classes take steps of Computing::kStep of them, of which a block has at least one; the
// last step ends where the block does, and so takes some classes again. Exponentials are kept step
// behind step, each in the order of load_two.

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

inline int64_t bytes_of(const Operand& operand, int64_t count) {
  return static_cast<char*>(address_of(operand, count)) - static_cast<char*>(operand.data);
}
template <class T>
void prefetch(const T* from, int count) {  // [count]
  for (int i = 0; i < count; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(from + i);
}

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
                                          Real* kept,  // [steps][kStep] or null
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
  auto step = [&](int i, int place) __attribute__((always_inline)) {
    prefetch_step(ahead + i);
    Two<V> l = load_two<T>(x + i);
    Two<V> b{};
    if constexpr (kWeighted) b = coefficients.two(i);
    Two<V> e{add_logit<kPrecision>(one, top, l.first, b.first, kWeighted, kEntropy),
             add_logit<kPrecision>(other, top, l.second, b.second, kWeighted, kEntropy)};
    if (kept != nullptr) store_two(kept + place, e);
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
  int i = 0;
  while (i + kStep <= count) {
    int last = i + kStepsPerSum * kStep < count ? i + kStepsPerSum * kStep : count;
    for (; i + kStep <= last; i += kStep) step(i, i);
    total();
  }
  if (i < count) {
    step(count - kStep, i);
    const Two<V> place = places<T>();
    const V fresh = V{} + static_cast<Real>(i - (count - kStep));
    one = only(one, place.first >= fresh);
    other = only(other, place.second >= fresh);
    total();
  }
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
                                              const Real* kept,  // [steps][kStep] or null
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
      prefetch_step<true>(gradient + i + kAhead<T>);
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
  const Two<V> last = step(count - kStep, (count - 1) / kStep * kStep);
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
  // A row of which the second pass leaves this much of the second-level cache to the next row.
  static constexpr int64_t kShortRow = (int64_t{1} << 18) / static_cast<int64_t>(sizeof(T));
  static constexpr int kMostAtOnce = kClassBlock / static_cast<int>(kManyProbabilities);

  struct Buffers {
    alignas(64) T logits[kClassBlock], gradient[kClassBlock];
    alignas(64) Real slope[kClassBlock],
        coefficients[kClassBlock], weight[kClassBlock], kept[kClassBlock];
  };

  const SoftmaxCeArguments& a;
  const Options<Real>& options;
  Buffers& buffers;
  const IndexSpace space = class_space(a.classes);
  const bool is_direct = !kMayBuffer || (lies_in_rows<T>(a) && !options.transforms);
  const bool is_single = is_direct && a.classes <= kClassBlock;
  // What a row keeps: whole steps. Rows that go together keep no more than a buffer holds; with a
  // gradient they are fewer, since memory likes to read and write in turn (measured).
  const int64_t kept_classes = (a.classes + kStep - 1) / kStep * kStep;
  const int64_t fit = (a.gradient ? 4096 / int64_t{sizeof(T)} : kClassBlock) / kept_classes;
  const int64_t at_once = is_single && fit > 1 ? fit : 1;
  // The rounding of lse is that of a whole gradient: it is good enough for half types alone.
  const bool has_lse = a.is_backward && a.lse && a.half_precision && !options.has_coefficients &&
                       (!options.has_entropy || a.entropy);
  RowClasses input{a.input}, target{a.target}, weight{a.weight}, gradient{a.gradient};

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

  const T* logits(int64_t c, int count) {
    if constexpr (kMayBuffer) {
      if (!is_direct) {
        gather(input, space, c, count, buffers.logits);
        if (options.transforms) options.transform(buffers.logits, buffers.slope, count);
        return buffers.logits;
      }
    }
    return static_cast<const T*>(input.data) + c;
  }
  Real label_logit(int64_t label) {
    if (is_direct) return to_real<Real>(static_cast<const T*>(input.data)[label]);
    Real logit;
    gather(input, space, label, 1, &logit);
    if (options.transforms) options.transform(&logit, nullptr, 1);
    return logit;
  }

  Coefficients<T> coefficients(int64_t c, int count) {
    if (kTerms == Terms::kPlain || !options.has_coefficients) return {nullptr, nullptr, 0};
    const Real smoothed = options.smoothed;
    auto own = [&](const Operand& operand, Real factor) {
      return Coefficients<T>{static_cast<const T*>(operand.data) + c, nullptr, factor};
    };
    if (!a.has_probabilities) {
      if (!a.weight) return {nullptr, nullptr, smoothed};
      if (lies_flat<T>(weight, space)) return own(weight, smoothed);
    } else if (!a.weight && a.label_smoothing == 0 && lies_flat<T>(target, space)) {
      return own(target, 1);
    }
    Real* b = buffers.coefficients;
    if (a.has_probabilities) {
      gather(target, space, c, count, b);
    } else {
      for (int i = 0; i < count; ++i) b[i] = 0;
    }
    for (int i = 0; i < count; ++i) b[i] = math::multiply_add(b[i], options.kept, smoothed);
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
    Real* kept;  // [steps][kStep] or null
    SoftmaxSums<double> sums;
    SoftmaxGradient<Real> factors;
    Real at_label;
  };

  // Works through some rows together: the processor goes on to the next row's logits while one's
  // sums and logarithm keep it waiting.
  void run(Row* batch, int count, RowBuffers<Real>& rows) {  // [count]
    const bool keeps = is_single && a.gradient && !options.has_entropy;
    for (int j = 0; j < count; ++j) {
      batch[j].kept = keeps ? buffers.kept + j * kept_classes : nullptr;
      start(batch[j], rows);
    }
    for (int j = 0; j < count; ++j) add_up(batch[j], rows);
    for (int j = 0; j < count; ++j) evaluate(batch[j], rows);
    for (int j = 0; j < count && a.gradient; ++j) write_gradient(batch[j], rows);
  }

  void move_to(int64_t row) {
    input.move_to(a.input, a.rows, row);
    if (a.has_probabilities) target.move_to(a.target, a.rows, row);
  }

  void start(Row& row, RowBuffers<Real>& rows) {
    const int i = row.i;
    move_to(row.row);
    if (rows.label[i] >= 0) rows.label_logit[i] = label_logit(rows.label[i]);
    row.sums = {-INFINITY, 0, 0, 0, 0};
    if (is_single && !has_lse) row.sums.reference = block_max(logits(0, a.classes), a.classes);
  }

  void add_up(Row& row, RowBuffers<Real>& rows) {
    const int i = row.i;
    move_to(row.row);
    SoftmaxSums<double>& sums = row.sums;
    if (has_lse) {
      sums.reference = rows.lse[i];
      sums.exponentials = isfinite(rows.lse[i]) ? 1 : NAN;
      row.kept = nullptr;
    } else {
      for_each_block([&](int64_t c, int count) {
        const T* x = logits(c, count);
        const int64_t next = is_single ? at_once * a.classes : count;
        const int64_t ahead = next > kAhead<T> ? next : kAhead<T>;
        if (!is_single) {
          admit<double>(sums, block_max(x, count), options.has_coefficients, options.has_entropy);
        }
        block_sums<kTerms, kPrecision>(x, coefficients(c, count), row.kept, count, sums, x + ahead);
      });
    }
    if (options.finds_largest) find_largest(rows, i);
    sums.reference = finite_reference(sums.reference);
  }

  void evaluate(Row& row, RowBuffers<Real>& rows) {
    const int i = row.i;
    auto result = SoftmaxRow<double>::evaluate(row.sums, !a.has_probabilities, rows.label_weight[i],
                                               rows.label_logit[i], options.z_loss);
    rows.loss[i] = static_cast<Real>(result.loss);
    rows.lse[i] = static_cast<Real>(result.lse);
    if (a.is_backward && a.entropy) result.entropy = rows.entropy[i];
    rows.entropy[i] = static_cast<Real>(result.entropy);
    if (!a.gradient) return;
    auto exact =
        SoftmaxGradient<double>::evaluate(row.sums, result, rows.label_weight[i], options.z_loss,
                                          rows.upstream[i], rows.grad_lse[i], rows.grad_entropy[i]);
    row.factors = {static_cast<Real>(exact.exponential), static_cast<Real>(exact.entropy),
                   static_cast<Real>(exact.coefficient), static_cast<Real>(exact.label)};
    if (rows.label[i] >= 0) {
      row.at_label = gradient_at(rows.label[i], rows.label_logit[i],
                                 static_cast<Real>(row.sums.reference), row.factors);
    }
  }

  void write_gradient(const Row& row, const RowBuffers<Real>& rows) {
    move_to(row.row);
    gradient.move_to(a.gradient, a.rows, row.row);
    for_each_block([&](int64_t c, int count) {
      const T* x = logits(c, count);
      const T* ahead = a.classes <= kShortRow ? x + a.classes : x + count;
      T* to = is_direct ? static_cast<T*>(gradient.data) + c : buffers.gradient;
      block_gradient<kTerms, kPrecision>(x, coefficients(c, count), row.kept, count,
                                         static_cast<Real>(row.sums.reference), row.factors, ahead,
                                         to);
      if constexpr (kMayBuffer) {
        if (is_direct) return;
        if (options.transforms) {
          for (int k = 0; k < count; ++k) to[k] *= buffers.slope[k];
        }
        scatter(to, gradient, space, c, count);
      }
    });
    const int64_t label = rows.label[row.i];
    if (label < 0) return;
    if (is_direct) {
      static_cast<T*>(gradient.data)[label] = from_real<T>(row.at_label);
    } else {
      scatter(&row.at_label, gradient, space, label, 1);
    }
  }

  // The label's own gradient, where the two terms meet before anything is rounded.
  Real gradient_at(int64_t label, Real logit, Real reference,
                   const SoftmaxGradient<Real>& factors) {
    Real below = reference - logit;
    Real e = math::exp_negative<kPrecision>(below);
    Real b = options.smoothed * (options.has_coefficients ? class_weight<Real>(a, label) : 1);
    Real gradient =
        gradient_of(factors, e, below, b, options.has_coefficients, options.has_entropy) -
        factors.label;
    if (options.cap != 0) {
      Real t = logit / options.cap;
      gradient *= 1 - t * t;
    }
    return gradient * options.scale;
  }

  void find_largest(RowBuffers<Real>& rows, int i) {
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
    for (int k = 0; k < kClassBlock && k < a.classes; ++k) buffers.kept[k] = 0;
    for_each_block([&](int64_t c, int count) { scatter(buffers.kept, gradient, space, c, count); });
  }
};

template <class T, Terms kTerms, Precision kPrecision>
double class_wise(const SoftmaxCeArguments& a, int64_t begin, int64_t end, double scale) {
  using Real = RealOf<T>;
  RowBuffers<Real> rows(a, end - begin);
  typename ClassWise<T, kTerms, kPrecision>::Buffers buffers;
  const Options<Real> options(a);
  using Loop = ClassWise<T, kTerms, kPrecision>;
  Loop loop{a, options, buffers};
  typename Loop::Row batch[Loop::kMostAtOnce];
  Sum sum;
  for (int64_t at = begin; at < end; at += kRowsAtOnce) {
    int count = static_cast<int>(end - at < kRowsAtOnce ? end - at : kRowsAtOnce);
    load_rows(a, at, count, scale, rows);
    if (a.is_backward && a.lse) gather(a.lse, a.rows, at, count, rows.lse);
    if (a.is_backward && a.entropy) gather(a.entropy, a.rows, at, count, rows.entropy);
    int waiting = 0;
    for (int i = 0; i < count; ++i) {
      if (rows.kept[i] != 0 || !skips_ignored(a)) {
        batch[waiting].row = at + i;
        batch[waiting++].i = i;
        if (waiting < loop.at_once) continue;
        loop.run(batch, waiting, rows);
        waiting = 0;
      } else if (a.gradient) {
        loop.clear(at + i);
      }
    }
    loop.run(batch, waiting, rows);
    sum.add(finish_rows(a, at, count, rows));
  }
  return sum.total();
}

// ---- a vector holds rows ----

template <class Real, Terms kTerms, Precision kPrecision>
struct RowWise {
  using V = typename Computing<Real>::Vector;
  static constexpr int kWidth = Computing<Real>::kStep / 2;
  static constexpr bool kAll = kTerms == Terms::kAll;

  // SoftmaxSums of each row: without coefficients and entropy, the first two.
  struct Sums {
    alignas(64) Real reference[kRowsAtOnce], exponentials[kRowsAtOnce],
        coefficients[kRowsAtOnce], cost[kRowsAtOnce], entropy[kRowsAtOnce];

    SoftmaxSums<V> at(int i) const {
      V from = load(reference + i), e = load(exponentials + i);
      if constexpr (!kAll) return {from, e, V{}, V{}, V{}};
      return {from, e, load(coefficients + i), load(cost + i), load(entropy + i)};
    }
    void put(int i, const SoftmaxSums<V>& sums) {
      store(reference + i, sums.reference);
      store(exponentials + i, sums.exponentials);
      if constexpr (!kAll) return;
      store(coefficients + i, sums.coefficients);
      store(cost + i, sums.cost);
      store(entropy + i, sums.entropy);
    }
  };

  struct Buffers {
    alignas(64) Real logits[kRowBlock], slope[kRowBlock];  // [classes of a block][stride]
    alignas(64) Real coefficients[kRowsAtOnce], label[kRowsAtOnce];
    Real class_coefficients[kRowBlock];  // [classes of a block]: where all rows have the same
    int32_t place[kRowsAtOnce];
    Sums sums, part, lost;
    alignas(64) Real factor[4][kRowsAtOnce];
    Largest<Real> best[kRowsAtOnce], best_target[kRowsAtOnce];
  };

  const SoftmaxCeArguments& a;
  const Options<Real>& options;
  Buffers& b;
  RowBuffers<Real>& rows;
  // The rows of the moment, and how many elements of a buffer they take: whole vectors, an odd
  // number of them, so that the classes of a row do not all compete for one place in the cache.
  int64_t begin = 0;
  int count = 0, padded = 0, stride = 0;
  bool has_dead = false;
  // Whether there are coefficients, the same for all rows, and other ones.
  const bool smooths = kAll && options.has_coefficients && !a.has_probabilities;
  const bool weighs = kAll && a.has_probabilities;
  // A fresh gradient that no cache holds: its memory need not be read before it is written.
  const bool streams = a.gradient && a.gradient.data != a.input.data &&
                       bytes_of(a.gradient, a.rows.numel* a.classes) >= int64_t{1} << 26;

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
  // Calls few.operator()<classes>(row) for groups of kWidth rows of few classes, or square(row,
  // class) for squares of kWidth rows and classes, which cover the leading rows, and returns how
  // many these are. With fewer classes, squares reach into the rows that follow.
  template <class Few, class Square>
  int turn(int classes, Few few, Square square) const {
    int row = 0;
    auto groups = [&]<int kClasses> {
      for (; row + kWidth <= count; row += kWidth) few.template operator()<kClasses>(row);
      return row;
    };
    if (classes == 2) return groups.template operator()<2>();
    if (classes == 3) return groups.template operator()<3>();
    if (classes == 4) return groups.template operator()<4>();
    int beyond = classes < kWidth ? (kWidth + classes - 1) / classes : 0;
    for (; row + kWidth + beyond <= count; row += kWidth) {
      for (int k = 0; k < classes; k += kWidth) {
        square(row, classes < kWidth || k + kWidth <= classes ? k : classes - kWidth);
      }
    }
    return row;
  }
  template <class T>
  void turn_in(const T* from, int classes) {  // [count][classes]
    auto few = [&]<int kClasses>(int i) {
      V v[kClasses];
      for (int k = 0; k < kClasses; ++k) {
        const T* p = from + i * kClasses + k * kWidth;
        __builtin_prefetch(p + kAhead<T>);
        v[k] = load(p);
      }
      to_columns(v);
      for (int k = 0; k < kClasses; ++k) store(b.logits + k * stride + i, v[k]);
    };
    int row = turn(classes, few, [&](int i, int k) {
      V square[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        const T* p = from + int64_t{i + j} * classes + k;
        __builtin_prefetch(p + kAhead<T>);
        square[j] = load(p);
      }
      transpose(square);
      int columns = classes < kWidth ? classes : kWidth;
      for (int j = 0; j < columns; ++j) store(b.logits + (k + j) * stride + i, square[j]);
    });
    for (int i = row; i < count; ++i) {
      for (int k = 0; k < classes; ++k) {
        b.logits[k * stride + i] = to_real<Real>(from[i * classes + k]);
      }
    }
  }
  template <class T>
  void turn_out(T* to, int classes) const {  // [count][classes]
    auto few = [&]<int kClasses>(int i) {
      V v[kClasses];
      for (int k = 0; k < kClasses; ++k) v[k] = load(b.logits + k * stride + i);
      to_rows(v);
      for (int k = 0; k < kClasses; ++k) {
        T* p = to + i * kClasses + k * kWidth;
        __builtin_prefetch(p + kAhead<T>, 1);
        store(p, v[k]);
      }
    };
    int row = turn(classes, few, [&](int i, int k) {
      V square[kWidth];
      int columns = classes < kWidth ? classes : kWidth;
      for (int j = 0; j < columns; ++j) square[j] = load(b.logits + (k + j) * stride + i);
      for (int j = columns; j < kWidth; ++j) square[j] = V{};
      transpose(square);
      for (int j = 0; j < kWidth; ++j) {
        T* p = to + int64_t{i + j} * classes + k;
        __builtin_prefetch(p + kAhead<T>, 1);
        store(p, square[j]);
      }
    });
    for (int i = row; i < count; ++i) {
      for (int k = 0; k < classes; ++k) {
        to[i * classes + k] = from_real<T>(b.logits[k * stride + i]);
      }
    }
  }

  void fill(int64_t c, int classes) {
    const char* from = dense(a.input, c);
    const char* turned = classes == a.classes ? in_rows(a.input) : nullptr;
    if (turned != nullptr) {
      with_own_type(a.input.dtype, [&](auto type) {
        turn_in(reinterpret_cast<const decltype(type)*>(turned), classes);
      });
    } else if (from == nullptr) {
      for (int k = 0; k < classes; ++k) {
        gather(class_at(a.input, c + k), a.rows, begin, count, b.logits + k * stride);
      }
    } else {
      with_float_type(a.input.dtype, [&](auto type) {
        using T = decltype(type);
        const T* run = reinterpret_cast<const T*>(from);
        for (int k = 0; k < classes; ++k, run += a.input.class_stride) {
          if (k + kClassesAhead < classes) {
            prefetch(run + kClassesAhead * a.input.class_stride, count);
          }
          load_run(run, count, b.logits + k * stride);
        }
      });
    }
    for (int k = 0; k < classes; ++k) {
      Real* to = b.logits + k * stride;
      for (int i = count; i < padded; ++i) to[i] = 0;
      if (options.transforms) options.transform(to, b.slope + k * stride, padded);
    }
    const auto most = static_cast<uint64_t>(classes);
    for (int i = 0; i < padded; ++i) {
      int64_t k = rows.label[i] - c;
      b.place[i] = static_cast<uint64_t>(k) < most ? static_cast<int32_t>(k) : -1;
    }
    for (int i = 0; i < padded; ++i) b.label[i] = static_cast<Real>(b.place[i]);
    for (int k = 0; smooths && k < classes; ++k) {
      b.class_coefficients[k] = options.smoothed * class_weight<Real>(a, c + k);
    }
  }
  void fill_coefficients(int64_t c) {
    Real weight = class_weight<Real>(a, c);
    Real* to = b.coefficients;
    gather(class_at(a.target, c), a.rows, begin, count, to);
    if (options.finds_largest) {
      for (int i = 0; i < count; ++i) b.best_target[i].offer(to[i], c);
    }
    for (int i = 0; i < count; ++i) {
      to[i] = math::multiply_add(to[i], options.kept, options.smoothed) * weight;
    }
    for (int i = count; i < padded; ++i) to[i] = 0;
  }

  // One block of classes: `keeps` where the exponentials take the logits' place.
  void add(int64_t c, int classes, bool keeps) {
    if (options.finds_largest) {
      for (int k = 0; k < classes; ++k) {
        for (int i = 0; i < count; ++i) b.best[i].offer(b.logits[k * stride + i], c + k);
      }
    }
    const bool entropy = kAll && options.has_entropy;
    // The next rows' first classes, while memory has nothing else to do.
    const char* next = dense(a.input, 0);
    const int64_t apart = bytes_of(a.input, a.input.class_stride), each = bytes_of(a.input, 1);
    const int ahead = next == nullptr             ? 0
                      : a.classes < kClassesAhead ? static_cast<int>(a.classes)
                                                  : kClassesAhead;
    for (int i = 0; i < padded; i += kWidth) {
      for (int k = 0; k < ahead; ++k) __builtin_prefetch(next + k * apart + (count + i) * each);
      const Real* at = b.logits + i;
      const V low = V{} - static_cast<Real>(INFINITY);
      V top = math::Machine<V>::greater(load(at), low);
      for (int k = 1; k < classes; ++k) top = math::Machine<V>::greater(load(at + k * stride), top);
      SoftmaxSums<V> sums{top, V{}, V{}, V{}, V{}};
      if (c > 0) {
        sums = b.sums.at(i);
        admit(sums, top, smooths || weighs, entropy);
      }
      if (weighs) {
        b.sums.put(i, sums);
        continue;
      }
      V label = load(b.label + i), label_logit = load(rows.label_logit + i), place{};
      V reference = finite_reference(sums.reference);
      // The terms of a few classes are added up by themselves.
      SoftmaxSums<V> lost{};
      for (int first = 0; first < classes; first += kClassesPerSum) {
        int last = first + kClassesPerSum < classes ? first + kClassesPerSum : classes;
        SoftmaxSums<V> part{};
        for (int k = first; k < last; ++k, place += static_cast<Real>(1)) {
          V x = load(at + k * stride);
          label_logit = label == place ? x : label_logit;
          V coefficient = smooths ? V{} + b.class_coefficients[k] : V{};
          V e = add_logit<kPrecision>(part, reference, x, coefficient, smooths, entropy);
          if (keeps) store(b.logits + k * stride + i, e);
        }
        sums = sum_of(sums, part, lost, c + first == 0);
      }
      store(rows.label_logit + i, label_logit);
      b.sums.put(i, with_lost(sums, lost));
    }
    if (!weighs) return;
    for (int i = 0; i < padded; i += kWidth) b.lost.put(i, SoftmaxSums<V>{});
    for (int first = 0; first < classes; first += kClassesPerSum) {
      int last = first + kClassesPerSum < classes ? first + kClassesPerSum : classes;
      add_weighted(c, first, last, keeps);
    }
    for (int i = 0; i < padded; i += kWidth) {
      b.sums.put(i, with_lost(b.sums.at(i), b.lost.at(i)));
    }
  }

  static SoftmaxSums<V> sum_of(const SoftmaxSums<V>& sums, const SoftmaxSums<V>& part) {
    return {sums.reference, sums.exponentials + part.exponentials,
            sums.coefficients + part.coefficients, sums.cost + part.cost,
            sums.entropy + part.entropy};
  }

  // The same, where what rounding takes from the sums that the gradient is made of goes to `lost`:
  // over many classes it would be most of the gradient's error.
  static SoftmaxSums<V> sum_of(const SoftmaxSums<V>& sums, const SoftmaxSums<V>& part,
                               SoftmaxSums<V>& lost, bool is_first) {
    SoftmaxSums<V> all = sum_of(sums, part);
    auto rounding = [](V before, V term, V after) __attribute__((always_inline)) {
      V added = after - before;
      return (before - (after - added)) + (term - added);
    };
    if (kPrecision == Precision::kFull && !is_first) {
      lost.exponentials += rounding(sums.exponentials, part.exponentials, all.exponentials);
      if constexpr (kAll) {
        lost.coefficients += rounding(sums.coefficients, part.coefficients, all.coefficients);
      }
    }
    return all;
  }
  // Beside an infinite sum what was lost is NaN, and says nothing.
  static SoftmaxSums<V> with_lost(const SoftmaxSums<V>& sums, const SoftmaxSums<V>& lost) {
    SoftmaxSums<V> all = sum_of(sums, lost);
    all.exponentials =
        lost.exponentials == lost.exponentials ? all.exponentials : sums.exponentials;
    all.coefficients =
        lost.coefficients == lost.coefficients ? all.coefficients : sums.coefficients;
    return all;
  }

  // Classes c + first .. c + last, whose coefficients are read one class at a time.
  void add_weighted(int64_t c, int first, int last, bool keeps) {
    for (int i = 0; i < padded; i += kWidth) b.part.put(i, SoftmaxSums<V>{});
    for (int k = first; k < last; ++k) {
      fill_coefficients(c + k);
      for (int i = 0; i < padded; i += kWidth) {
        SoftmaxSums<V> part = b.part.at(i);
        Real* at = b.logits + k * stride + i;
        V x = load(at), label_logit = load(rows.label_logit + i);
        label_logit = load(b.label + i) == V{} + static_cast<Real>(k) ? x : label_logit;
        store(rows.label_logit + i, label_logit);
        V e = add_logit<kPrecision>(part, finite_reference(load(b.sums.reference + i)), x,
                                    load(b.coefficients + i), true, options.has_entropy);
        if (keeps) store(at, e);
        b.part.put(i, part);
      }
    }
    for (int i = 0; i < padded; i += kWidth) {
      SoftmaxSums<V> lost = b.lost.at(i);
      b.sums.put(i, sum_of(b.sums.at(i), b.part.at(i), lost, c + first == 0));
      b.lost.put(i, lost);
    }
  }

  // The gradient of class c + k, the block's k-th: calls put(i, values) for each vector of rows.
  template <class Put>
  void class_gradient(int k, bool kept, Put put) {
    const bool entropy = kAll && options.has_entropy && !kept;
    const V place = V{} + static_cast<Real>(k);
    const V same = smooths ? V{} + b.class_coefficients[k] : V{};
    for (int i = 0; i < padded; i += kWidth) {
      SoftmaxGradient<V> factors{load(b.factor[0] + i), load(b.factor[1] + i),
                                 load(b.factor[2] + i), load(b.factor[3] + i)};
      V coefficient = weighs ? load(b.coefficients + i) : same;
      V below{}, e = load(b.logits + k * stride + i);
      if (!kept) {
        below = finite_reference(load(b.sums.reference + i)) - e;
        e = math::exp_negative<kPrecision>(below);
      }
      V gradient = gradient_of(factors, e, below, coefficient, smooths || weighs, entropy);
      gradient = load(b.label + i) == place ? gradient - factors.label : gradient;
      if (options.transforms) gradient *= load(b.slope + k * stride + i);
      if (has_dead) gradient = load(rows.kept + i) == 0.0f ? V{} : gradient;
      put(i, gradient);
    }
  }

  // Puts the gradient of class c + k at `to`, where its rows are neighbours.
  template <class T>
  void put_gradient(int k, bool kept, T* to) {  // [count]
    class_gradient(k, kept, [&](int i, V gradient) {
      if (i + kWidth > count) {
        Real* values = b.logits + k * stride + i;
        store(values, gradient);
        return store_run(values, count - i, to + i);
      }
      if constexpr (std::is_same_v<T, float>) {
        if (streams && reinterpret_cast<uintptr_t>(to + i) % sizeof(V) == 0) {
          return stream(to + i, gradient);
        }
      }
      store(to + i, gradient);
    });
  }

  void write_gradient(int64_t c, int classes, bool kept) {
    char* turned = classes == a.classes ? in_rows(a.gradient) : nullptr;
    for (int k = 0; k < classes; ++k) {
      if (weighs) fill_coefficients(c + k);
      Real* values = b.logits + k * stride;
      char* to = dense(a.gradient, c + k);
      bool written = to != nullptr && with_own_type(a.gradient.dtype, [&](auto type) {
                       put_gradient(k, kept, reinterpret_cast<decltype(type)*>(to));
                     });
      if (written) continue;
      class_gradient(k, kept, [&](int i, V gradient) { store(values + i, gradient); });
      if (turned == nullptr) scatter(values, class_at(a.gradient, c + k), a.rows, begin, count);
    }
    if (turned == nullptr) return;
    with_own_type(a.gradient.dtype,
                  [&](auto type) { turn_out(reinterpret_cast<decltype(type)*>(turned), classes); });
  }

  // From the sums to the results, and to the factors of the gradient. Without extras there is
  // nothing but the labels' loss.
  template <bool kExtras>
  void evaluate() {
    auto extra = [](const Real* values) { return kExtras ? load(values) : V{}; };
    const V z_loss = kExtras ? V{} + options.z_loss : V{};
    for (int i = 0; i < padded; i += kWidth) {
      SoftmaxSums<V> sums = b.sums.at(i);
      sums.reference = finite_reference(sums.reference);
      V label_weight = load(rows.label_weight + i);
      auto row = SoftmaxRow<V>::evaluate(sums, !a.has_probabilities, label_weight,
                                         load(rows.label_logit + i), z_loss);
      store(rows.loss + i, row.loss);
      store(rows.lse + i, row.lse);
      store(rows.entropy + i, row.entropy);
      if (!a.gradient) continue;
      auto factors =
          SoftmaxGradient<V>::evaluate(sums, row, label_weight, z_loss, load(rows.upstream + i),
                                       extra(rows.grad_lse + i), extra(rows.grad_entropy + i));
      store(b.factor[0] + i, factors.exponential);
      store(b.factor[1] + i, factors.entropy);
      store(b.factor[2] + i, factors.coefficient);
      store(b.factor[3] + i, factors.label);
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
    bool keeps = single && a.gradient && !a.grad_entropy && !options.has_entropy;
    has_dead = rows.ignored > 0 && skips_ignored(a);
    // Of no classes there is no first block, which sets the sums.
    for (int i = 0; a.classes == 0 && i < padded; i += kWidth) {
      b.sums.put(i, {V{} - static_cast<Real>(INFINITY), V{}, V{}, V{}, V{}});
    }
    for (int i = 0; i < count && options.finds_largest; ++i) b.best[i] = b.best_target[i] = {};
    for (int i = count; i < padded; ++i) {
      rows.label_weight[i] = rows.label_logit[i] = rows.upstream[i] = rows.grad_lse[i] =
          rows.grad_entropy[i] = 0;
      rows.label[i] = -1;
    }
    for (int64_t c = 0; c < a.classes; c += block) {
      int classes = static_cast<int>(a.classes - c < block ? a.classes - c : block);
      fill(c, classes);
      add(c, classes, keeps);
    }
    if (kAll || options.z_loss != 0 || a.grad_lse) {
      evaluate<true>();
    } else {
      evaluate<false>();
    }
    for (int i = 0; i < count && options.finds_largest; ++i) {
      rows.prediction[i] = b.best[i].index();
      rows.best_target[i] = b.best_target[i].index();
    }
    if (!a.gradient) return;
    for (int64_t c = 0; c < a.classes; c += block) {
      int classes = static_cast<int>(a.classes - c < block ? a.classes - c : block);
      if (!single) fill(c, classes);
      write_gradient(c, classes, keeps);
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

using Chunk = double (*)(const SoftmaxCeArguments& a, int64_t begin, int64_t end, double scale);

// Whether a vector is to hold rows: of a few classes, or where neighbouring rows are neighbours in
// memory.
inline bool holds_rows(const SoftmaxCeArguments& a) {
  bool in_columns =
      a.input.class_stride != 1 && a.input.strides[0] == 1 && a.rows.sizes[0] >= kLanes;
  return a.classes < (a.has_probabilities ? kManyProbabilities : kManyClasses) || in_columns;
}

template <class T, Precision kPrecision>
Chunk class_wise_of(bool has_coefficients) {
  return has_coefficients ? class_wise<T, Terms::kCoefficients, kPrecision>
                          : class_wise<T, Terms::kPlain, kPrecision>;
}
template <Precision kPrecision>
Chunk chunk_of(const SoftmaxCeArguments& a) {
  const Options<float> options(a);
  if (holds_rows(a)) {
    bool plain = !options.has_coefficients && !options.has_entropy;
    return plain ? row_wise<float, Terms::kPlain, kPrecision>
                 : row_wise<float, Terms::kAll, Precision::kFull>;
  }
  if (options.has_entropy) return class_wise<float, Terms::kAll, kPrecision>;
  if (options.transforms) return class_wise_of<float, kPrecision>(options.has_coefficients);
  return lies_in_rows<BFloat16>(a)  ? class_wise_of<BFloat16, kPrecision>(options.has_coefficients)
         : lies_in_rows<Float16>(a) ? class_wise_of<Float16, kPrecision>(options.has_coefficients)
                                    : class_wise_of<float, kPrecision>(options.has_coefficients);
}

double softmax_ce_chunk(const SoftmaxCeArguments& a, int64_t begin, int64_t end, double scale) {
  auto chunk = a.in_double ? (holds_rows(a) ? row_wise<double, Terms::kAll, Precision::kFull>
                                            : class_wise<double, Terms::kAll, Precision::kFull>)
               : a.half_precision ? chunk_of<Precision::kHalf>(a)
                                  : chunk_of<Precision::kFull>(a);
  return chunk(a, begin, end, scale);
}

Labels softmax_ce_labels(const SoftmaxCeArguments& a, int64_t begin, int64_t end) {
  int64_t labels[kRowsAtOnce];
  double weights[kRowsAtOnce];
  const auto classes = static_cast<uint64_t>(a.classes);
  Labels found;
  Sum sum;
  for (int64_t at = begin; at < end; at += kRowsAtOnce) {
    int count = static_cast<int>(end - at < kRowsAtOnce ? end - at : kRowsAtOnce);
    gather(a.target, a.rows, at, count, labels);
    int64_t kept = 0, bad = 0;
    for (int i = 0; i < count; ++i) {
      bool is_kept = labels[i] != a.ignore_index;
      kept += is_kept;
      bad += is_kept && static_cast<uint64_t>(labels[i]) >= classes;
    }
    for (int i = 0; bad > 0; ++i) {
      if (labels[i] == a.ignore_index || static_cast<uint64_t>(labels[i]) < classes) continue;
      found.has_bad = true;
      found.bad = labels[i];
      return found;
    }
    if (!a.weight) {
      sum.add(static_cast<double>(kept));
      continue;
    }
    if (a.classes == 0) continue;  // and all are ignored
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
