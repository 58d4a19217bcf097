// What the options do to the classes of a row: statistics, the cap, probabilities and weights.
#pragma once

#include "softmax_row.cuh"

namespace fused_ce {

// The larger one, or NaN where either is.
__device__ __forceinline__ float larger(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}
template <int kCount>
__device__ __forceinline__ float largest(const float (&values)[kCount]) {
  float top = values[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = larger(top, values[i]);
  return top;
}
template <int kWidth>
__device__ __forceinline__ float largest_of_lanes(float value) {
  if constexpr (kWidth > 1) {
    return largest_of_lanes<kWidth / 2>(larger(value, from_lane<kWidth / 2>(value)));
  } else {
    return value;
  }
}

// The largest of the values that a thread sees, and where in its row it saw that first. NaN counts
// as the largest, as it does in torch.argmax.
struct Peak {
  float value;
  int place;

  __device__ __forceinline__ void offer(float top, int at) {
    if (!(top <= value) && value == value) *this = {top, at};
  }
  static __device__ __forceinline__ bool is(float value, float top) {
    return top == top ? value == top : value != value;
  }
};

template <class Vector, class T>
__device__ __forceinline__ bool holds_vector(const T* address) {  // [1 Vector]
  return reinterpret_cast<uintptr_t>(address) % alignof(Vector) == 0;
}
// From any address.
template <int kCount, class T>
__device__ __forceinline__ Group<T, kCount> load_vector(const T* from) {  // [kCount]
  using Vector = Group<T, kCount>;
  if (holds_vector<Vector>(from)) return *reinterpret_cast<const Vector*>(from);
  Vector vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.values[i] = from[i];
  return vector;
}

// What the options do to some classes of a row of logits in T, with probabilities in S and weights,
// which lie dense, in T or float.
template <class T, class S, Terms kTerms>
struct Options {
  static constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  static constexpr bool kWeighted = kTerms == Terms::kWeighted;
  const SoftmaxCeParams& p;
  const S* probabilities;  // [classes] or null

  __device__ __forceinline__ Options(const SoftmaxCeParams& params, int64_t row)
      : p(params), probabilities(nullptr) {
    if (kWeighted && p.has_probabilities) {
      probabilities = static_cast<const S*>(p.target.data) + row_offset(p.target, p.rows, row);
    }
  }

  // The coefficients of classes from c on, in the place of their probabilities.
  template <int kN>
  __device__ __forceinline__ void weigh(float (&b)[kN], int c) const {
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      b[i] = p.has_probabilities ? fmaf(b[i], p.in_float.keep, p.in_float.share) : p.in_float.share;
    }
    if (p.weight.data == nullptr) return;
    with_type_like<T>(p.weight.dtype, [&](auto* type) {
      using W = std::remove_pointer_t<decltype(type)>;
      auto weights = load_vector<kN>(static_cast<const W*>(p.weight.data) + c);
#pragma unroll
      for (int i = 0; i < kN; ++i) b[i] *= to_real<float>(weights.values[i]);
    });
  }

  // A stored logit as the loss sees it: scaled and capped.
  __device__ __forceinline__ float value_of(float logit) const {
    const auto& k = p.in_float;
    if (k.softcap == 0) return logit * k.logit_scale;
    return cap<kPrecision>(k.softcap, logit * (k.logit_scale * k.inverse_softcap)).value;
  }

  // Logits less the reference, and the cap's derivatives, if there is one.
  template <bool kCap, int kN>
  __device__ __forceinline__ void shift(float (&logits)[kN], float (&slopes)[kN],
                                        float reference) const {
    const auto& k = p.in_float;
    const float inner = k.logit_scale * k.inverse_softcap;
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if constexpr (kCap) {
        auto capped = cap<kPrecision>(k.softcap, logits[i] * inner);
        logits[i] = capped.value - reference;
        slopes[i] = capped.slope;
      } else {
        logits[i] = fmaf(logits[i], k.logit_scale, -reference);
      }
    }
  }

  // Adds up logits, the largest of which is `top`, with coefficients b, or 1.
  template <int kN, class Sums>
  __device__ __forceinline__ void add(float (&logits)[kN], const float (&b)[kN], float top,
                                      Sums& sums) const {
    sums.admit(value_of(top));
    auto add_all = [&]<bool kCap>() {
      // Added up among themselves first, since a row may be long.
      float e[kN], slopes[kN];
      float exponentials = 0;
      shift<kCap>(logits, slopes, sums.reference);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        e[i] = sums.exponential(logits[i]);
        exponentials = i == 0 ? e[0] : exponentials + e[i];
      }
      sums.gather(exponentials);
      if (p.has_coefficients) {
        float coefficients = kN, cost = 0;
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          float coefficient = kWeighted ? b[i] : 1;
          if (kWeighted) coefficients = i == 0 ? coefficient : coefficients + coefficient;
          cost = i == 0 ? -coefficient * logits[0] : cost - coefficient * logits[i];
        }
        sums.gather_terms(coefficients, cost);
      }
      if (p.entropy.data != nullptr || p.grad_entropy.data != nullptr) {
        float entropy = 0;
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          entropy = i == 0 ? -e[0] * finite(logits[0]) : entropy - e[i] * finite(logits[i]);
        }
        sums.entropy += entropy;
      }
    };
    if (p.in_float.softcap == 0) {
      add_all.template operator()<false>();
    } else {
      add_all.template operator()<true>();
    }
  }

  // The gradient at logits with coefficients b, or `share`, in the place of the logits. g is that
  // of scaled logits; `of_label` is the term of a label's class, which comes alone.
  template <int kN>
  __device__ __forceinline__ void differentiate(float (&logits)[kN], const float (&b)[kN],
                                                float reference, const SoftmaxGradient<float>& g,
                                                float of_label) const {
    const float constant = p.has_coefficients ? g.coefficient * p.in_float.share : 0.0f;
    auto differentiate_all = [&]<bool kCap, bool kEntropy>() {
      float slopes[kN];
      shift<kCap>(logits, slopes, reference);
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        float factor = g.exponential - (kEntropy ? g.entropy * finite(logits[i]) : 0);
        float coefficient = kWeighted ? g.coefficient * b[i] : constant;
        logits[i] = fmaf(math::exp_shifted<kPrecision>(logits[i]), factor, -coefficient);
        if constexpr (kN == 1) logits[i] -= of_label;
        if constexpr (kCap) logits[i] *= slopes[i];
      }
    };
    if (p.grad_entropy.data != nullptr) {
      if (p.in_float.softcap == 0) {
        differentiate_all.template operator()<false, true>();
      } else {
        differentiate_all.template operator()<true, true>();
      }
    } else if (p.in_float.softcap == 0) {
      differentiate_all.template operator()<false, false>();
    } else {
      differentiate_all.template operator()<true, false>();
    }
  }
};

}  // namespace fused_ce
