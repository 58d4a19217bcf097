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
  const Real* negative;  // [count] 1 - target where smoothing has made it, or null
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

struct FloatsSum {
  Doubles lanes{};
  FUSED_CE_HOST_DEVICE void add(Floats v) { lanes += __builtin_convertvector(v, Doubles); }
  FUSED_CE_HOST_DEVICE double total() const {
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
    return sum;
  }
};
template <class Real>
struct SumOf {
  using type = Sum;
};
template <>
struct SumOf<float> {
  using type = FloatsSum;
};

// kLoss and kGradient say what is wanted; the optional operands are tested once a vector, which
// costs nothing beside the arithmetic. Losses are added up in float64: a few in the vector's own
// type first.
template <class Real, BceForm kForm, Precision kPrecision, bool kLoss, bool kGradient>
double run_block(const Block<Real>& block, const BceArguments& a, Real scale) {
  using V = typename VectorOf<Real>::type;
  constexpr int kStep = sizeof(V) / sizeof(Real);
  constexpr int kVectorsPerSum = 8;
  const FocalOptions<Real> focal = focal_options<Real>(a.focal);
  const V one = V{} + static_cast<Real>(1);
  const V factor = V{} + scale;
  typename SumOf<Real>::type sum;
  for (int first = 0; first < block.count;) {
    int last = first + kVectorsPerSum * kStep;
    if (last > block.count) last = block.count;
    V few{};
    for (; first < last; first += kStep) {
      V x = load(block.input + first);
      V t = load(block.target + first);
      LossAndGradient<V> value;
      if constexpr (kForm == BceForm::kLogits) {
        V negative = block.negative != nullptr ? load(block.negative + first) : one - t;
        if (block.positive != nullptr) {
          V positive = load(block.positive + first) * t;
          value =
              BceLogits::evaluate<kPrecision>(x, negative, positive, negative + positive, factor);
        } else {
          value = BceLogits::evaluate<kPrecision>(x, negative, t, one, factor);
        }
      } else {
        if constexpr (kForm == BceForm::kProbability) {
          value = BceProbability::evaluate(x, t);
        } else {
          value = FocalLogits::evaluate<kPrecision>(x, t, focal);
        }
        value.gradient *= factor;
      }
      V weight = block.weight != nullptr ? load(block.weight + first) : one;
      if constexpr (kLoss) {
        V loss = block.weight != nullptr ? value.loss * weight : value.loss;
        few += loss;
        if (block.loss != nullptr) store(block.loss + first, loss);
      }
      if constexpr (kGradient) {
        V gradient = value.gradient;
        if (block.weight != nullptr) gradient *= weight;
        if (block.upstream != nullptr) gradient *= load(block.upstream + first);
        store(block.gradient + first, gradient);
      }
    }
    sum.add(few);
  }
  return sum.total();
}

template <class Real, BceForm kForm, Precision kPrecision>
double run_block(const Block<Real>& block, const BceArguments& a, Real scale) {
  if (!a.gradient) {
    return run_block<Real, kForm, kPrecision, true, false>(block, a, scale);
  }
  if (!a.loss) {
    return run_block<Real, kForm, kPrecision, false, true>(block, a, scale);
  }
  return run_block<Real, kForm, kPrecision, true, true>(block, a, scale);
}

template <class Real, Precision kPrecision>
double run_block(const Block<Real>& block, const BceArguments& a, Real scale) {
  switch (a.form) {
    case BceForm::kLogits:
      return run_block<Real, BceForm::kLogits, kPrecision>(block, a, scale);
    case BceForm::kProbability:
      return run_block<Real, BceForm::kProbability, kPrecision>(block, a, scale);
    case BceForm::kFocal:
      return run_block<Real, BceForm::kFocal, kPrecision>(block, a, scale);
  }
  return 0;
}

template <class Real>
struct Buffers {
  alignas(64) Real input[kBlock], target[kBlock], negative[kBlock], positive[kBlock],
      weight[kBlock], upstream[kBlock], loss[kBlock], gradient[kBlock];
  bool ignored[kBlock];
};

// Which of the targets are ignore_index; they are compared as stored, not as computed with.
void find_ignored(const BceArguments& a, int64_t begin, int count, bool* ignored /* [count] */) {
  double targets[kBlock];
  gather(a.target, a.space, begin, count, targets);
  double index = static_cast<double>(a.ignore_index);
  for (int i = 0; i < count; ++i) ignored[i] = targets[i] == index;
}

// Whether every element that is not ignored lies in [0, 1].
template <class Real>
bool in_unit_range(const Real* values, const bool* ignored,
                   int count) {  // [count], [count] or null
  bool outside = false;
  for (int i = 0; i < count; ++i) {
    outside |= !(values[i] >= 0 && values[i] <= 1) && !(ignored != nullptr && ignored[i]);
  }
  return !outside;
}

// Label smoothing and ignore_index change what the loop reads, so that the loop knows neither.
template <class Real>
void smooth_targets(const BceArguments& a, int count, Buffers<Real>& buffers) {
  Real scale = static_cast<Real>(a.target_scale), shift = static_cast<Real>(a.target_shift);
  for (int i = 0; i < count; ++i) {
    Real t = buffers.target[i];
    buffers.target[i] = t * scale + shift;
    buffers.negative[i] = (1 - t) * scale + shift;
  }
}

// An ignored element costs nothing whatever it holds: it is computed as one that is finite, with
// weight 0, and its gradient is cleared afterwards, since the scale may be infinite.
template <class Real>
void neutralize_ignored(int count, Buffers<Real>& buffers) {
  for (int i = 0; i < count; ++i) {
    if (!buffers.ignored[i]) continue;
    buffers.input[i] = buffers.target[i] = buffers.weight[i] = 0;
    buffers.negative[i] = buffers.positive[i] = 1;
  }
}

template <class Real>
double bce_chunk(const BceArguments& a, int64_t begin, int64_t end, double scale,
                 unsigned* out_of_range) {
  constexpr int kStep = sizeof(typename VectorOf<Real>::type) / sizeof(Real);
  Buffers<Real> buffers;
  bool smooths = a.target_shift != 0, ignores = a.has_ignore_index;
  Sum sum;
  for (int64_t at = begin; at < end;) {
    int count = end - at < kBlock ? static_cast<int>(end - at) : kBlock;
    // Whole vectors first; what is left over goes through the buffers, padded with elements of
    // weight 0.
    bool padded = count < kStep;
    if (!padded) count -= count % kStep;
    int padded_count = padded ? kStep : count;
    bool through_buffers = padded || smooths || ignores;

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
    block.negative = view(Operand{}, buffers.negative, 0, smooths);
    block.weight = view(a.weight, buffers.weight, 1, through_buffers);
    block.positive = view(a.pos_weight, buffers.positive, 1, false);
    block.upstream = view(a.upstream, buffers.upstream, 1, false);
    if (ignores) find_ignored(a, at, count, buffers.ignored);
    if (a.form == BceForm::kProbability) {
      const bool* ignored = ignores ? buffers.ignored : nullptr;
      if (!in_unit_range(block.input, ignored, count)) *out_of_range |= kInputOutOfRange;
      if (!in_unit_range(block.target, ignored, count)) *out_of_range |= kTargetOutOfRange;
    }
    if (smooths) smooth_targets(a, count, buffers);
    if (ignores) neutralize_ignored(count, buffers);

    bool stores_loss = a.loss && a.reduction == Reduction::kNone;
    bool in_place = !padded && !ignores;
    bool loss_in_place = stores_loss && in_place && lies_flat<Real>(a.loss, a.space);
    bool gradient_in_place = a.gradient && in_place && lies_flat<Real>(a.gradient, a.space);
    block.loss = loss_in_place ? static_cast<Real*>(a.loss.data) + at
                 : stores_loss ? buffers.loss
                               : nullptr;
    block.gradient =
        gradient_in_place ? static_cast<Real*>(a.gradient.data) + at : buffers.gradient;
    block.count = padded_count;

    Real factor = static_cast<Real>(scale);
    if (a.half_precision) {
      sum.add(run_block<Real, Precision::kHalf>(block, a, factor));
    } else {
      sum.add(run_block<Real, Precision::kFull>(block, a, factor));
    }
    if (ignores && a.gradient) {
      for (int i = 0; i < count; ++i) {
        if (buffers.ignored[i]) buffers.gradient[i] = 0;
      }
    }
    if (stores_loss && !loss_in_place) scatter(buffers.loss, a.loss, a.space, at, count);
    if (a.gradient && !gradient_in_place) {
      scatter(buffers.gradient, a.gradient, a.space, at, count);
    }
    at += count;
  }
  return sum.total();
}

double bce_chunk_any(const BceArguments& a, int64_t begin, int64_t end, double scale,
                     unsigned* out_of_range) {
  return a.in_double ? bce_chunk<double>(a, begin, end, scale, out_of_range)
                     : bce_chunk<float>(a, begin, end, scale, out_of_range);
}

int64_t bce_count_kept(const BceArguments& a, int64_t begin, int64_t end) {
  bool ignored[kBlock];
  int64_t kept = 0;
  for (int64_t at = begin; at < end; at += kBlock) {
    int count = end - at < kBlock ? static_cast<int>(end - at) : kBlock;
    find_ignored(a, at, count, ignored);
    for (int i = 0; i < count; ++i) kept += !ignored[i];
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
