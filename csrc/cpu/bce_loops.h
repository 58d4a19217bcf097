// Binary cross entropy: a chunk is worked through in blocks that stay in the first-level cache.
// Logits and targets are used where they lie if they are flat and of a type that the loop takes;
// else, and all other operands that are not flat floats, they are gathered into buffers, so that
// one loop serves every dtype, stride and broadcast.
#pragma once

#include "../bce.h"
#include "computing.h"

namespace fused_ce {
namespace {

// T is the type of the logits as they lie and of what is stored, Target the targets'. The other
// operands are of the computing type, Real.
template <class T, class Target, class Real>
struct Block {
  const T* input;        // [count]
  const Target* target;  // [count]
  const Real* negative;  // [count] 1 - target where smoothing has made it, or null
  const Real* positive;  // [count] pos_weight, or null
  const Real* weight;    // [count] or null
  const Real* upstream;  // [count] or null
  Real common_upstream;  // that of every element where it is one and the same, else 1
  T* loss;               // [count] or null
  T* gradient;           // [count] or null
  bool streams;          // whether it goes past the caches
  int count;             // a multiple of kStep
};

// What is wanted of a block. kOptions: there are operands besides logits and targets.
template <BceForm form, Precision precision, bool loss, bool gradient, bool options>
struct Want {
  static constexpr BceForm kForm = form;
  static constexpr Precision kPrecision = precision;
  static constexpr bool kLoss = loss, kGradient = gradient, kOptions = options;
};

// Losses are added up in float64: a few in the vector's own type first.
template <class W, class T, class Target, class Real>
double evaluate_block(const Block<T, Target, Real>& block, const BceArguments& a, Real scale) {
  using V = typename Computing<Real>::Vector;
  constexpr int kStep = Computing<Real>::kStep;
  constexpr int kStepsPerSum = 4;
  const FocalOptions<Real> focal = focal_options<Real>(a.focal);
  const V one = V{} + static_cast<Real>(1);
  const V factor = V{} + scale;
  const V common = V{} + block.common_upstream;
  typename Computing<Real>::Total sum;

  auto evaluate = [&](V x, V t, V negative, V positive)
                      __attribute__((always_inline)) -> LossAndGradient<V> {
    if constexpr (W::kForm == BceForm::kLogits) {
      if constexpr (W::kOptions) {
        return BceLogits::evaluate<W::kPrecision>(x, negative, positive, negative + positive,
                                                  factor);
      } else {
        return BceLogits::evaluate<W::kPrecision>(x, one - t, t, one, factor);
      }
    } else {
      LossAndGradient<V> value;
      if constexpr (W::kForm == BceForm::kProbability) {
        value = BceProbability::evaluate<W::kPrecision>(x, t);
      } else {
        value = FocalLogits::evaluate<W::kPrecision>(x, t, focal);
      }
      value.gradient *= factor;
      return value;
    }
  };
  auto others =
      [&](const Real* p /* [count] or null */, int at, Two<V> absent)
          __attribute__((always_inline)) { return p != nullptr ? load_two<T>(p + at) : absent; };
  for (int at = 0; at < block.count;) {
    int last = at + kStepsPerSum * kStep;
    if (last > block.count) last = block.count;
    V few{};
    for (; at < last; at += kStep) {
      auto x = load_two<T>(block.input + at);
      auto t = load_two<T>(block.target + at);
      Two<V> negative{}, positive{};
      if constexpr (W::kOptions) {
        negative = others(block.negative, at, {one - t.first, one - t.second});
        positive = others(block.positive, at, {one, one});
        positive = {positive.first * t.first, positive.second * t.second};
      }
      auto value = evaluate(x.first, t.first, negative.first, positive.first);
      auto other = evaluate(x.second, t.second, negative.second, positive.second);
      Two<V> loss{value.loss, other.loss}, gradient{value.gradient, other.gradient};
      if constexpr (W::kOptions) {
        if (block.weight != nullptr) {
          auto weight = load_two<T>(block.weight + at);
          loss = {loss.first * weight.first, loss.second * weight.second};
          gradient = {gradient.first * weight.first, gradient.second * weight.second};
        }
        if (block.upstream != nullptr) {
          auto upstream = load_two<T>(block.upstream + at);
          gradient = {gradient.first * upstream.first, gradient.second * upstream.second};
        }
      }
      if constexpr (W::kLoss) {
        few += loss.first + loss.second;
        if (block.loss != nullptr) store_two(block.loss + at, loss);
      }
      if constexpr (W::kGradient) {
        if constexpr (!W::kLoss) gradient = {gradient.first * common, gradient.second * common};
        store_two(block.gradient + at, gradient, block.streams);
      }
    }
    sum.add(few);
  }
  return sum.total();
}

// The same for plain logits of which only the summed loss is wanted. Losses come before gradients,
// a group of steps at a time: the processor sees further ahead in two short chains of operations
// than in a long one. One logarithm serves many losses, and no loop waits for it: their factors are
// multiplied as a tree, since equal ones would all round to the same side.
template <Precision kPrecision, bool kGradient, class T, class Target, class Real>
double sum_block(const Block<T, Target, Real>& block, Real scale) {
  using V = typename Computing<Real>::Vector;
  constexpr int kStep = Computing<Real>::kStep;
  constexpr int kGroup = 8, kTree = 4;  // 2^(2 kGroup kTree) is the largest product
  const V one = V{} + static_cast<Real>(1);
  // NAN's lower half is 0, as storing without kAnyNan needs; another NaN's may not be.
  const V factor = V{} + (scale == scale ? scale : static_cast<Real>(NAN));
  auto m = [&](V x, V t) __attribute__((always_inline)) { return x >= 0.0f ? one - t : t; };
  typename Computing<Real>::Total sum;
  V products[kChunk / (kGroup * kStep) + kTree];
  int groups = 0;
  for (int begin = 0; begin < block.count; begin += kGroup * kStep) {
    const T* input = block.input + begin;                        // [steps kStep]
    const Target* target = block.target + begin;                 // [steps kStep]
    T* gradient = kGradient ? block.gradient + begin : nullptr;  // [steps kStep]
    int left = (block.count - begin) / kStep, steps = left < kGroup ? left : kGroup;
    Two<V> e[kGroup];
    V wrong_sides{}, product{};
    for (int i = 0; i < steps; ++i) {
      auto x = load_two<T>(input + i * kStep);
      auto t = load_two<T>(target + i * kStep);
      e[i] = {math::exp_negative<kPrecision>(math::absolute(x.first)),
              math::exp_negative<kPrecision>(math::absolute(x.second))};
      product = log1p_product(product, log1p_product(e[i].first, e[i].second));
      wrong_sides += BceLogits::finite_wrong_side(x.first, t.first) +
                     BceLogits::finite_wrong_side(x.second, t.second);
    }
    if (math::Machine<V>::any(wrong_sides != wrong_sides)) {
      wrong_sides = V{};
      for (int i = 0; i < steps; ++i) {
        auto x = load_two<T>(input + i * kStep);
        auto t = load_two<T>(target + i * kStep);
        wrong_sides += BceLogits::wrong_side(m(x.first, t.first), math::absolute(x.first)) +
                       BceLogits::wrong_side(m(x.second, t.second), math::absolute(x.second));
      }
    }
    sum.add(wrong_sides);
    products[groups++] = product;
    if constexpr (kGradient) {
      for (int i = 0; i < steps; ++i) {
        auto x = load_two<T>(input + i * kStep);
        auto t = load_two<T>(target + i * kStep);
        Two<V> value{
            BceLogits::gradient(x.first, e[i].first, m(x.first, t.first), one, factor),
            BceLogits::gradient(x.second, e[i].second, m(x.second, t.second), one, factor)};
        store_two</*kAnyNan=*/false>(gradient + i * kStep, value, block.streams);
      }
    }
  }
  for (int i = 0; i < kTree; ++i) products[groups + i] = V{};
  for (int i = 0; i < groups; i += kTree) {
    const V* p = products + i;
    V product = log1p_product(log1p_product(p[0], p[1]), log1p_product(p[2], p[3]));
    sum.add(math::log1p<Precision::kFull>(product, one + product));
  }
  return sum.total();
}

template <BceForm kForm, Precision kPrecision, class T, class Target, class Real>
double run_form(const Block<T, Target, Real>& block, const BceArguments& a, Real scale) {
  bool options = block.negative != nullptr || block.positive != nullptr ||
                 block.weight != nullptr || block.upstream != nullptr;
  if (kForm == BceForm::kLogits && a.loss && block.loss == nullptr && !options) {
    return a.gradient ? sum_block<kPrecision, true>(block, scale)
                      : sum_block<kPrecision, false>(block, scale);
  }
  auto run = [&]<bool kLoss, bool kGradient> {
    return options
               ? evaluate_block<Want<kForm, kPrecision, kLoss, kGradient, true>>(block, a, scale)
               : evaluate_block<Want<kForm, kPrecision, kLoss, kGradient, false>>(block, a, scale);
  };
  if (!a.gradient) return run.template operator()<true, false>();
  if (!a.loss) return run.template operator()<false, true>();
  return run.template operator()<true, true>();
}

template <Precision kPrecision, class T, class Target, class Real>
double run_block(const Block<T, Target, Real>& block, const BceArguments& a, Real scale) {
  if constexpr (std::is_same_v<T, Real> && std::is_same_v<Target, Real>) {
    if (a.form == BceForm::kProbability) {
      return run_form<BceForm::kProbability, kPrecision>(block, a, scale);
    }
    if (a.form == BceForm::kFocal) {
      return run_form<BceForm::kFocal, kPrecision>(block, a, scale);
    }
  }
  return run_form<BceForm::kLogits, kPrecision>(block, a, scale);
}

template <class Real>
struct Buffers {
  alignas(64) Real input[kBlock], target[kBlock], negative[kBlock], positive[kBlock],
      weight[kBlock], sample_weight[kBlock], upstream[kBlock], loss[kBlock], gradient[kBlock];
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

// Whether the loop can use logits, targets and results where they lie.
template <class T, class Target>
bool fits(const BceArguments& a) {
  return a.form != BceForm::kProbability && a.target_shift == 0 && !a.has_ignore_index &&
         lies_flat<T>(a.input, a.space) && lies_flat<Target>(a.target, a.space) &&
         (!a.gradient || lies_flat<T>(a.gradient, a.space)) &&
         (!a.loss || a.reduction != Reduction::kNone || lies_flat<T>(a.loss, a.space));
}

template <class T, class Target>
double bce_chunk(const BceArguments& a, int64_t begin, int64_t end, double scale,
                 unsigned* out_of_range) {
  using Real = RealOf<T>;
  constexpr bool kGathers = std::is_same_v<T, Real> && std::is_same_v<Target, Real>;
  constexpr int kStep = Computing<Real>::kStep;
  Buffers<Real> buffers;
  const bool streams = is_streamed(a.gradient, a.input, a.space.numel);
  // Where nothing goes through the buffers, the chunk is one block.
  bool two_weights = a.weight && a.sample_weight;
  bool is_flat = fits<T, Target>(a) && !two_weights;
  const Operand* others[] = {&a.weight, &a.pos_weight, &a.sample_weight, &a.upstream};
  bool is_common = a.upstream && a.space.rank == 1 && a.upstream.strides[0] == 0;
  Real common_upstream = 1;
  if (is_common && begin < end) gather(a.upstream, a.space, begin, 1, &common_upstream);
  for (const Operand* operand : others) {
    is_flat &=
        !*operand || lies_flat<Real>(*operand, a.space) || (operand == &a.upstream && is_common);
  }
  const int64_t block_size = is_flat ? kChunk : kBlock;
  bool smooths = kGathers && a.target_shift != 0, ignores = kGathers && a.has_ignore_index;
  Sum sum;
  for (int64_t at = begin; at < end;) {
    int count = static_cast<int>(end - at < block_size ? end - at : block_size);
    // Whole steps first; what is left over goes through the buffers, padded with elements of weight
    // 0.
    bool padded = count < kStep;
    if constexpr (!kGathers) {
      if (padded) {
        sum.add(bce_chunk<Real, Real>(a, at, end, scale, out_of_range));
        break;
      }
    }
    if (!padded) count -= count % kStep;
    int padded_count = padded ? kStep : count;
    bool through_buffers = padded || smooths || ignores;

    auto view = [&]<class U>(const Operand& operand, Real* buffer, Real absent, bool needed,
                             U) -> const U* {
      if (operand && !through_buffers && lies_flat<U>(operand, a.space)) {
        return static_cast<const U*>(operand.data) + at;
      }
      if constexpr (std::is_same_v<U, Real>) {
        if (!operand && !needed) return nullptr;
        if (operand) {
          gather(operand, a.space, at, count, buffer);
        } else {
          for (int i = 0; i < count; ++i) buffer[i] = absent;
        }
        for (int i = count; i < padded_count; ++i) buffer[i] = 0;
        return buffer;
      }
      return nullptr;
    };
    Block<T, Target, Real> block;
    block.input = view(a.input, buffers.input, 0, true, T{});
    block.target = view(a.target, buffers.target, 0, true, Target{});
    block.negative = view(Operand{}, buffers.negative, 0, smooths, Real{});
    block.weight =
        view(a.weight ? a.weight : a.sample_weight, buffers.weight, 1, through_buffers, Real{});
    if (two_weights) {
      const Real* other = view(a.sample_weight, buffers.sample_weight, 1, false, Real{});
      for (int i = 0; i < padded_count; ++i) buffers.weight[i] = block.weight[i] * other[i];
      block.weight = buffers.weight;
    }
    block.positive = view(a.pos_weight, buffers.positive, 1, false, Real{});
    block.common_upstream = common_upstream;
    block.upstream = is_common ? nullptr : view(a.upstream, buffers.upstream, 1, false, Real{});
    if constexpr (kGathers) {
      if (ignores) find_ignored(a, at, count, buffers.ignored);
      if (a.form == BceForm::kProbability) {
        const bool* ignored = ignores ? buffers.ignored : nullptr;
        if (!in_unit_range(block.input, ignored, count)) *out_of_range |= kInputOutOfRange;
        if (!in_unit_range(block.target, ignored, count)) *out_of_range |= kTargetOutOfRange;
      }
      if (smooths) smooth_targets(a, count, buffers);
      if (ignores) neutralize_ignored(count, buffers);
    }

    bool stores_loss = a.loss && a.reduction == Reduction::kNone;
    bool in_place = !padded && !ignores;
    bool loss_in_place = stores_loss && in_place && lies_flat<T>(a.loss, a.space);
    bool gradient_in_place = a.gradient && in_place && lies_flat<T>(a.gradient, a.space);
    block.loss = loss_in_place ? static_cast<T*>(a.loss.data) + at : nullptr;
    block.gradient = gradient_in_place ? static_cast<T*>(a.gradient.data) + at : nullptr;
    block.streams = gradient_in_place && streams;
    if constexpr (kGathers) {
      if (stores_loss && !loss_in_place) block.loss = buffers.loss;
      if (!gradient_in_place) block.gradient = buffers.gradient;
    }
    block.count = padded_count;

    Real factor = static_cast<Real>(scale);
    if (a.half_precision) {
      sum.add(run_block<Precision::kHalf>(block, a, factor));
    } else {
      sum.add(run_block<Precision::kFull>(block, a, factor));
    }
    if constexpr (kGathers) {
      if (ignores && a.gradient) {
        for (int i = 0; i < count; ++i) {
          if (buffers.ignored[i]) buffers.gradient[i] = 0;
        }
      }
      if (stores_loss && !loss_in_place) scatter(buffers.loss, a.loss, a.space, at, count);
      if (a.gradient && !gradient_in_place) {
        scatter(buffers.gradient, a.gradient, a.space, at, count);
      }
    }
    at += count;
  }
  if (streams) stream_end();
  return sum.total();
}

double bce_chunk_any(const BceArguments& a, int64_t begin, int64_t end, double scale,
                     unsigned* out_of_range) {
  if (a.form != BceForm::kLogits && !a.in_double) {
    return bce_chunk<float, float>(a, begin, end, scale, out_of_range);
  }
  auto chunk = a.in_double                   ? bce_chunk<double, double>
               : fits<BFloat16, BFloat16>(a) ? bce_chunk<BFloat16, BFloat16>
               : fits<BFloat16, uint8_t>(a)  ? bce_chunk<BFloat16, uint8_t>
               : fits<Float16, Float16>(a)   ? bce_chunk<Float16, Float16>
               : fits<Float16, uint8_t>(a)   ? bce_chunk<Float16, uint8_t>
               : fits<float, uint8_t>(a)     ? bce_chunk<float, uint8_t>
                                             : bce_chunk<float, float>;
  return chunk(a, begin, end, scale, out_of_range);
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

}  // namespace
}  // namespace fused_ce
