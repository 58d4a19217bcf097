// What the loops of softmax cross entropy share: what is read and written once a row, and the terms
// of one logit.
#pragma once

#include "../softmax_ce.h"
#include "computing.h"

namespace fused_ce {
namespace {

// Rows whose labels, weights and results are read and written together.
constexpr int kRowsAtOnce = 512;

// What is read and written once a row, for up to kRowsAtOnce of them.
template <class Real>
struct RowBuffers {
  int ignored;                            // how many rows are
  int64_t label[kRowsAtOnce];             // -1 where there is none
  alignas(64) Real is_kept[kRowsAtOnce],  // 0 where the row is ignored, else 1
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
  const Real keep = a.has_probabilities ? 0 : static_cast<Real>(1 - a.label_smoothing);
  const Real factor = static_cast<Real>(scale);
  if (a.has_probabilities) {
    for (int i = 0; i < count; ++i) {
      rows.label[i] = -1;
      rows.is_kept[i] = 1;
    }
  } else {
    gather(a.target, a.rows, begin, count, rows.label);
    for (int i = 0; i < count; ++i) {
      bool is_kept = rows.label[i] != a.ignore_index;
      rows.is_kept[i] = is_kept ? 1 : 0;
      rows.label[i] = is_kept ? rows.label[i] : -1;
    }
  }
  int32_t ignored = 0;
  for (int i = 0; i < count; ++i) {
    bool is_kept = rows.is_kept[i] != 0;
    ignored += !is_kept;
    rows.label_weight[i] = is_kept ? keep : 0;
    Real upstream = rows.grad_loss[i] * rows.sample_weight[i] * factor;
    rows.upstream[i] = is_kept ? upstream : 0;
    rows.label_logit[i] = 0;
  }
  rows.ignored = ignored;
  if (!a.has_probabilities && a.weight && a.classes > 0) {
    label_weights(a, rows.label, count, rows.label_weight);
    for (int i = 0; i < count; ++i) rows.label_weight[i] *= keep;
  }
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
    rows.loss[i] = rows.is_kept[i] != 0 ? loss : 0;
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
      correct[i] = rows.is_kept[i] != 0 && rows.prediction[i] == right;
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
        keep(static_cast<Real>(1 - a.label_smoothing)),
        share(a.classes > 0 ? static_cast<Real>(a.label_smoothing / a.classes) : 0),
        z_loss(static_cast<Real>(a.z_loss)),
        transforms(a.logit_scale != 1 || a.softcap != 0),
        has_coefficients(a.has_probabilities || a.label_smoothing != 0),
        has_entropy(a.is_backward ? !!a.grad_entropy : !!a.entropy),
        finds_largest(!a.is_backward && (a.prediction || a.correct)) {}

  Real scale, cap, keep, share, z_loss;
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
  // Not multiply_add: the product is rounded as the other term is, so that the two cancel where
  // they should, as with one class.
  if (has_coefficients) gradient -= coefficient * factors.coefficient;
  return gradient;
}

// What a loop adds up: exponentials alone, with the coefficients' terms, or with the entropy too.
enum class Terms { kPlain, kCoefficients, kAll };

inline int64_t bytes_of(const Operand& operand, int64_t count) {
  return static_cast<char*>(address_of(operand, count)) - static_cast<char*>(operand.data);
}

}  // namespace
}  // namespace fused_ce
