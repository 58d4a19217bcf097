// What the loops of all losses compute in.
#pragma once

#include "body.h"
#include "vector.h"

namespace fused_ce {
namespace {

// Elements of a buffer of the first-level cache.
constexpr int kBlock = 1024;

// All lanes of a vector, combined by halves.
template <class V, class F, int kHalf = sizeof(V) / sizeof(V{}[0]) / 2>
FUSED_CE_HOST_DEVICE auto combine_lanes(V v, F combine) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    typedef std::conditional_t<sizeof(v[0]) == 4, int32_t, int64_t> Index
        __attribute__((vector_size(sizeof(V))));
    Index other;
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) other[i] = i ^ kHalf;
    return combine_lanes<V, F, kHalf / 2>(combine(shuffle(v, v, other), v), combine);
  }
}

struct FloatsSum {
  typedef float HalfFloats __attribute__((vector_size(kLanes * 2)));
  typedef double HalfDoubles __attribute__((vector_size(kLanes * 4)));
  HalfDoubles low{}, high{};
  FUSED_CE_HOST_DEVICE static HalfDoubles wide(HalfFloats v) {
#if defined(__AVX512F__)
    return (HalfDoubles)_mm512_maskz_cvtps_pd(0xff, (__m256)v);  // GCC takes the vector apart
#else
    return __builtin_convertvector(v, HalfDoubles);
#endif
  }
  FUSED_CE_HOST_DEVICE void add(Floats v) {
    HalfFloats halves[2];
    memcpy(halves, &v, sizeof(v));
    low += wide(halves[0]);
    high += wide(halves[1]);
  }
  FUSED_CE_HOST_DEVICE double total() const {
    return combine_lanes(low + high, [](HalfDoubles x, HalfDoubles y) { return x + y; });
  }
};

struct DoublesSum {
  Doubles value{}, lost{};
  FUSED_CE_HOST_DEVICE void add(Doubles x) {
    Doubles next = value + x;
    lost += math::lost_in(value, x, next);
    value = next;
  }
  FUSED_CE_HOST_DEVICE double total() const {
    Sum sum;
    for (int i = 0; i < kLanes / 2; ++i) {
      sum.add(value[i]);
      sum.lost += lost[i];
    }
    return sum.total();
  }
};

// What Real is computed in, how its vectors are added up, and how many elements a step takes.
template <class Real>
struct Computing;
template <>
struct Computing<float> {
  using Vector = Floats;
  using Total = FloatsSum;
  static constexpr int kStep = 2 * kLanes;
};
template <>
struct Computing<double> {
  using Vector = Doubles;
  using Total = DoublesSum;
  static constexpr int kStep = kLanes;
};
template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Asks for the memory of a step's elements, which need not exist, so that it comes while others are
// computed.
template <bool kWrite = false, class T>
FUSED_CE_HOST_DEVICE void prefetch_step(const T* x) {  // [kStep]
  constexpr int kBytes = Computing<RealOf<T>>::kStep * static_cast<int>(sizeof(T));
  for (int byte = 0; byte < kBytes; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(x) + byte, kWrite);
  }
}
// How many elements ahead: nearer ones come too late (measured with rows of 1,000 classes).
template <class T>
constexpr int kAhead = 12288 / static_cast<int>(sizeof(T));

// Whether a gradient is to be stored past the caches, so that its memory is not read before it is
// written: one that does not overwrite the logits and that no cache would hold until it is used.
// Of float32 alone, since half types gain nothing (measured).
inline bool is_streamed(const Operand& gradient, const Operand& input, int64_t numel) {
  return gradient && gradient.dtype == Dtype::kFloat32 && gradient.data != input.data &&
         numel * size_of(gradient.dtype) >= int64_t{1} << 24;
}

FUSED_CE_HOST_DEVICE float max_of_lanes(Floats v) {
  return combine_lanes(v, math::Machine<Floats>::greater);
}
FUSED_CE_HOST_DEVICE double max_of_lanes(Doubles v) {
  return combine_lanes(v, math::Machine<Doubles>::greater);
}

}  // namespace
}  // namespace fused_ce
