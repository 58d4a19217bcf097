// The inner loops of the CPU ops, compiled once for each instruction set (FUSED_CE_BODIES names the
// table they end up in). A chunk is worked through in blocks that stay in the first-level cache:
// each operand is used where it lies if it is flat and of the computing type, else gathered into a
// buffer, so that one loop serves every dtype, stride and broadcast.
#include "body.h"

#include "vector.h"

namespace fused_ce {
namespace {

constexpr int kBlock = 1024;

template <class Real>
struct Block {
  const Real* input;     // [count]
  const Real* target;    // [count]
  const Real* positive;  // [count] pos_weight, or null
  const Real* weight;    // [count] or null
  const Real* upstream;  // [count] or null
  Real* loss;            // [count] or null
  Real* gradient;        // [count] or null
  int count;             // a multiple of the lanes
};

template <class Real>
struct VectorOf {
  using type = Real;
};
template <>
struct VectorOf<float> {
  using type = Floats;
};
FUSED_CE_HOST_DEVICE double sum_of(double v) { return v; }
FUSED_CE_HOST_DEVICE double sum_of(Floats v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(v[i]);
  return sum;
}
FUSED_CE_HOST_DEVICE bool any(bool mask) { return mask; }
FUSED_CE_HOST_DEVICE bool any(Ints mask) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
}

template <BceForm kForm, Precision kPrecision, class V>
FUSED_CE_HOST_DEVICE LossAndGradient<V> evaluate(V x, V t, const BceArguments& a) {
  if constexpr (kForm == BceForm::kProbability) {
    return BceProbability::evaluate(x, t);
  } else {
    return FocalLogits::evaluate<kPrecision>(x, t, a.alpha, a.gamma, a.parity);
  }
}

// kLoss and kGradient say what is wanted; the optional operands are tested once a vector, which
// costs nothing beside the arithmetic.
template <class Real, BceForm kForm, Precision kPrecision, bool kLoss, bool kGradient>
double run_block(const Block<Real>& block, const BceArguments& a, Real scale, bool* out_of_range) {
  using V = typename VectorOf<Real>::type;
  constexpr int kStep = sizeof(V) / sizeof(Real);
  V sum{};
  V one = V{} + static_cast<Real>(1);
  V lowest = one, highest = V{};
  bool not_a_number = false;
  for (int i = 0; i < block.count; i += kStep) {
    V x = load(block.input + i);
    V t = load(block.target + i);
    LossAndGradient<V> value;
    if constexpr (kForm == BceForm::kLogits) {
      if (block.positive != nullptr) {
        V negative = one - t, positive = load(block.positive + i) * t;
        value = BceLogits::evaluate<kPrecision>(x, negative, positive, negative + positive);
      } else {
        value = BceLogits::evaluate<kPrecision>(x, one - t, t, one);
      }
    } else {
      value = evaluate<kForm, kPrecision>(x, t, a);
    }
    if constexpr (kForm == BceForm::kProbability) {
      lowest = x < lowest ? x : lowest;
      highest = x > highest ? x : highest;
      not_a_number |= any(x != x);
    }
    V weight = block.weight != nullptr ? load(block.weight + i) : one;
    if constexpr (kLoss) {
      V loss = block.weight != nullptr ? value.loss * weight : value.loss;
      sum += loss;
      if (block.loss != nullptr) store(block.loss + i, loss);
    }
    if constexpr (kGradient) {
      V gradient = value.gradient * scale;
      if (block.weight != nullptr) gradient *= weight;
      if (block.upstream != nullptr) gradient *= load(block.upstream + i);
      store(block.gradient + i, gradient);
    }
  }
  if constexpr (kForm == BceForm::kProbability) {
    *out_of_range |=
        not_a_number || any(lowest < static_cast<Real>(0)) || any(highest > static_cast<Real>(1));
  }
  return sum_of(sum);
}

template <class Real, BceForm kForm, Precision kPrecision>
double run_block(const Block<Real>& block, const BceArguments& a, Real scale, bool* out_of_range) {
  if (!a.gradient) {
    return run_block<Real, kForm, kPrecision, true, false>(block, a, scale, out_of_range);
  }
  if (!a.loss) {
    return run_block<Real, kForm, kPrecision, false, true>(block, a, scale, out_of_range);
  }
  return run_block<Real, kForm, kPrecision, true, true>(block, a, scale, out_of_range);
}

template <class Real, Precision kPrecision>
double run_block(const Block<Real>& block, const BceArguments& a, Real scale, bool* out_of_range) {
  switch (a.form) {
    case BceForm::kLogits:
      return run_block<Real, BceForm::kLogits, kPrecision>(block, a, scale, out_of_range);
    case BceForm::kProbability:
      return run_block<Real, BceForm::kProbability, kPrecision>(block, a, scale, out_of_range);
    case BceForm::kFocal:
      return run_block<Real, BceForm::kFocal, kPrecision>(block, a, scale, out_of_range);
  }
  return 0;
}

template <class Real>
struct Buffers {
  alignas(64) Real input[kBlock], target[kBlock], positive[kBlock], weight[kBlock],
      upstream[kBlock], loss[kBlock], gradient[kBlock];
};

bool is_ignored(const BceArguments& a, double target) {
  return target == static_cast<double>(a.ignore_index);
}

// ignore_index and label smoothing change what the loop reads, so that the loop knows neither: an
// ignored element becomes one of weight 0.
template <class Real>
void prepare_targets(const BceArguments& a, int count, Buffers<Real>& buffers) {
  for (int i = 0; i < count; ++i) {
    Real t = buffers.target[i];
    bool ignored = a.has_ignore_index && is_ignored(a, static_cast<double>(t));
    t = t * static_cast<Real>(a.target_scale) + static_cast<Real>(a.target_shift);
    buffers.target[i] = ignored ? 0 : t;
    buffers.input[i] = ignored ? 0 : buffers.input[i];
    buffers.weight[i] = ignored ? 0 : buffers.weight[i];
  }
}

template <class Real>
double bce_chunk(const BceArguments& a, int64_t begin, int64_t end, double scale,
                 bool* out_of_range) {
  constexpr int kStep = sizeof(typename VectorOf<Real>::type) / sizeof(Real);
  Buffers<Real> buffers;
  bool changes_targets = a.has_ignore_index || a.target_shift != 0;
  double sum = 0;
  for (int64_t at = begin; at < end;) {
    int count = end - at < kBlock ? static_cast<int>(end - at) : kBlock;
    // Whole vectors first; what is left over goes through the buffers, padded with elements of
    // weight 0.
    bool padded = count < kStep;
    if (!padded) count -= count % kStep;
    int padded_count = padded ? kStep : count;
    bool through_buffers = padded || changes_targets;

    auto view = [&](const Operand& operand, Real* buffer, Real absent, bool needed) -> const Real* {
      if (!operand && !needed) return nullptr;
      if (operand && !through_buffers && lies_flat<Real>(operand, a.space)) {
        return static_cast<const Real*>(operand.data) + at;
      }
      if (operand) {
        gather(operand, a.space, at, count, buffer);
      } else {
        for (int i = 0; i < count; ++i) buffer[i] = absent;
      }
      for (int i = count; i < padded_count; ++i) buffer[i] = 0;
      return buffer;
    };
    Block<Real> block;
    block.input = view(a.input, buffers.input, 0, true);
    block.target = view(a.target, buffers.target, 0, true);
    block.weight = view(a.weight, buffers.weight, 1, through_buffers);
    block.positive = view(a.pos_weight, buffers.positive, 1, false);
    block.upstream = view(a.upstream, buffers.upstream, 1, false);
    if (changes_targets) prepare_targets(a, count, buffers);

    bool stores_loss = a.loss && a.reduction == Reduction::kNone;
    bool loss_in_place = stores_loss && !padded && lies_flat<Real>(a.loss, a.space);
    bool gradient_in_place = a.gradient && !padded && lies_flat<Real>(a.gradient, a.space);
    block.loss = loss_in_place ? static_cast<Real*>(a.loss.data) + at
                 : stores_loss ? buffers.loss
                               : nullptr;
    block.gradient =
        gradient_in_place ? static_cast<Real*>(a.gradient.data) + at : buffers.gradient;
    block.count = padded_count;

    Real factor = static_cast<Real>(scale);
    if (a.half_precision) {
      sum += run_block<Real, Precision::kHalf>(block, a, factor, out_of_range);
    } else {
      sum += run_block<Real, Precision::kFull>(block, a, factor, out_of_range);
    }
    if (stores_loss && !loss_in_place) scatter(buffers.loss, a.loss, a.space, at, count);
    if (a.gradient && !gradient_in_place) {
      scatter(buffers.gradient, a.gradient, a.space, at, count);
    }
    at += count;
  }
  return sum;
}

double bce_chunk_any(const BceArguments& a, int64_t begin, int64_t end, double scale,
                     bool* out_of_range) {
  return a.in_double ? bce_chunk<double>(a, begin, end, scale, out_of_range)
                     : bce_chunk<float>(a, begin, end, scale, out_of_range);
}

int64_t bce_count_kept(const BceArguments& a, int64_t begin, int64_t end) {
  double targets[kBlock];
  int64_t kept = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    int count = end - at < kBlock ? static_cast<int>(end - at) : kBlock;
    gather(a.target, a.space, at, count, targets);
    for (int i = 0; i < count; ++i) kept += !is_ignored(a, targets[i]);
  }
  return kept;
}

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
extern const CpuBodies FUSED_CE_BODIES{FUSED_CE_NAME(FUSED_CE_CAPABILITY), bce_chunk_any,
                                       bce_count_kept, scale_chunk_any};

}  // namespace fused_ce
