// Vectors of floats and doubles, and the memory formats of these. Written with the compiler's
// vector extension: the same source gives AVX-512, AVX2, NEON or SSE2 code, by the flags that
// CMakeLists.txt compiles it with.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../elementwise.h"
#include "../math.h"

namespace fused_ce {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

typedef double Doubles __attribute__((vector_size(kLanes * 4)));
typedef int64_t Longs __attribute__((vector_size(kLanes * 4)));

template <>
struct ElementOf<Floats> {
  using type = float;
};
template <>
struct ElementOf<Doubles> {
  using type = double;
};
#if defined(__AVX512F__)
// The unmasked intrinsics make GCC 12 warn of its own headers (https://gcc.gnu.org/PR105593); with
// this mask they are the same instructions.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

namespace math {
template <>
struct Machine<Floats> : OperatorMachine<Floats> {
  using Bits = Ints;
#if defined(__AVX512F__)
  FUSED_CE_HOST_DEVICE static Floats at_most(float limit, Floats x) {
    return (Floats)_mm512_maskz_min_ps(kAllLanes, _mm512_set1_ps(limit), (__m512)x);
  }
  FUSED_CE_HOST_DEVICE static Floats greater(Floats x, Floats y) {
    return (Floats)_mm512_maskz_max_ps(kAllLanes, (__m512)x, (__m512)y);
  }
  FUSED_CE_HOST_DEVICE static Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
  // One Newton step on 14 bits: within an ulp of 1 / x where neither is subnormal.
  FUSED_CE_HOST_DEVICE static Floats reciprocal(Floats x) {
    Floats guess = (Floats)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)x);
    return multiply_add(guess, multiply_add(-x, guess, Floats{} + 1.0f), guess);
  }
  FUSED_CE_HOST_DEVICE static Floats times_power_of_two(Floats x, Floats n) {
    return (Floats)_mm512_maskz_scalef_ps(kAllLanes, (__m512)x, (__m512)n);
  }
  FUSED_CE_HOST_DEVICE static bool any(Ints mask) {
    return _mm512_movepi32_mask((__m512i)mask) != 0;
  }
#elif defined(__AVX2__)
  FUSED_CE_HOST_DEVICE static Floats at_most(float limit, Floats x) {
    return (Floats)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)x);
  }
  FUSED_CE_HOST_DEVICE static Floats greater(Floats x, Floats y) {
    return (Floats)_mm256_max_ps((__m256)x, (__m256)y);
  }
  FUSED_CE_HOST_DEVICE static Floats multiply_add(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
  FUSED_CE_HOST_DEVICE static bool any(Ints mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
#endif
};

template <>
struct Machine<Doubles> : OperatorMachine<Doubles> {
  using Bits = Longs;
#if defined(__AVX512F__)
  FUSED_CE_HOST_DEVICE static Doubles at_most(double limit, Doubles x) {
    return (Doubles)_mm512_maskz_min_pd(0xff, _mm512_set1_pd(limit), (__m512d)x);
  }
  FUSED_CE_HOST_DEVICE static Doubles greater(Doubles x, Doubles y) {
    return (Doubles)_mm512_maskz_max_pd(0xff, (__m512d)x, (__m512d)y);
  }
  FUSED_CE_HOST_DEVICE static Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
    return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
  FUSED_CE_HOST_DEVICE static Doubles times_power_of_two(Doubles x, Doubles n) {
    return (Doubles)_mm512_maskz_scalef_pd(0xff, (__m512d)x, (__m512d)n);
  }
  FUSED_CE_HOST_DEVICE static bool any(Longs mask) {
    return _mm512_movepi64_mask((__m512i)mask) != 0;
  }
#elif defined(__AVX2__)
  FUSED_CE_HOST_DEVICE static Doubles at_most(double limit, Doubles x) {
    return (Doubles)_mm256_min_pd(_mm256_set1_pd(limit), (__m256d)x);
  }
  FUSED_CE_HOST_DEVICE static Doubles greater(Doubles x, Doubles y) {
    return (Doubles)_mm256_max_pd((__m256d)x, (__m256d)y);
  }
  FUSED_CE_HOST_DEVICE static Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
    return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
  FUSED_CE_HOST_DEVICE static bool any(Longs mask) {
    return _mm256_movemask_pd((__m256d)mask) != 0;
  }
#endif
};
}  // namespace math

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// One element or kLanes of them: W is uint32_t or Words, V the float type of the same lanes.
template <class V, class W>
FUSED_CE_HOST_DEVICE V widen(BFloat16, W bits) {
  return math::bit_cast<V>(bits << 16);
}
// The exponent is rebiased by a multiplication, which is exact for subnormal numbers too.
template <class V, class W>
FUSED_CE_HOST_DEVICE V widen(Float16, W bits) {
  V magnitude =
      math::bit_cast<V>((bits & 0x7fffu) << 13) * 5.192296858534827628530496e33f;  // 2^112
  W word = math::bit_cast<W>(magnitude);
  word = (bits & 0x7c00u) == 0x7c00u ? word | 0x7f800000u : word;
  return math::bit_cast<V>(word | ((bits & 0x8000u) << 16));
}
// Round to nearest, ties to even. The result is the upper half of the word. A NaN stays one.
// kAnyNan may be false where every NaN has a lower half of 0, as those of bfloat16 and of invalid
// operations have, since rounding then carries nothing out of it.
template <class W, bool kAnyNan = true, class V>
FUSED_CE_HOST_DEVICE W narrow_in_place(BFloat16, V x) {
  W word = math::bit_cast<W>(x), rounded = word + (0x7fffu + ((word >> 16) & 1u));
  if constexpr (!kAnyNan) return rounded;
  return x == x ? rounded : word | 0x400000u;
}
template <class W, class V>
FUSED_CE_HOST_DEVICE W narrow(BFloat16, V x) {
  return narrow_in_place<W>(BFloat16{}, x) >> 16;
}
template <class W, class V>
FUSED_CE_HOST_DEVICE W narrow(Float16, V x) {
  W word = math::bit_cast<W>(x);
  W sign = (word >> 16) & 0x8000u;
  W magnitude = word & 0x7fffffffu;
  W normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  normal = normal > 0x7c00u ? (normal & 0u) + 0x7c00u : normal;
  // Below 2^-14, adding 1/2 puts the last bit of the subnormal result at the last bit of the sum.
  W subnormal = math::bit_cast<W>(math::bit_cast<V>(magnitude) + 0.5f) - 0x3f000000u;
  W result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude > 0x7f800000u ? (result & 0u) + 0x7e00u : result;
  return result | sign;
}

FUSED_CE_HOST_DEVICE Floats load(const float* p /* [kLanes] */) {
  Floats v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FUSED_CE_HOST_DEVICE void store(float* p /* [kLanes] */, Floats v) { memcpy(p, &v, sizeof(v)); }
FUSED_CE_HOST_DEVICE Doubles load(const double* p /* [kLanes / 2] */) {
  Doubles v;
  memcpy(&v, p, sizeof(v));
  return v;
}
FUSED_CE_HOST_DEVICE void store(double* p /* [kLanes / 2] */, Doubles v) {
  memcpy(p, &v, sizeof(v));
}
// Integers as wider ones: GCC takes a vector of them apart for it.
FUSED_CE_HOST_DEVICE Ints wide(Halves v) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)v);
#else
  return __builtin_convertvector(v, Ints);
#endif
}
FUSED_CE_HOST_DEVICE Ints wide(Bytes v) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepu8_epi32(kAllLanes, (__m128i)v);
#else
  return __builtin_convertvector(__builtin_convertvector(v, Halves), Ints);
#endif
}
template <class T>
FUSED_CE_HOST_DEVICE Floats load(const T* p /* [kLanes] */) {
  Halves bits;
  memcpy(&bits, p, sizeof(bits));
  return widen<Floats>(T{}, (Words)wide(bits));
}
template <class T>
FUSED_CE_HOST_DEVICE void store(T* p /* [kLanes] */, Floats v) {
  Halves bits = __builtin_convertvector(narrow<Words>(T{}, v), Halves);
  memcpy(p, &bits, sizeof(bits));
}
FUSED_CE_HOST_DEVICE Floats load(const uint8_t* p /* [kLanes] */) {
  Bytes bytes;
  memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(wide(bytes), Floats);
}
#if defined(__AVX512F__)
FUSED_CE_HOST_DEVICE Floats load(const Float16* p /* [kLanes] */) {
  return (Floats)_mm512_maskz_cvtph_ps(kAllLanes,
                                       _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FUSED_CE_HOST_DEVICE void store(Float16* p /* [kLanes] */, Floats v) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p),
      _mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
FUSED_CE_HOST_DEVICE Floats load(const Float16* p /* [kLanes] */) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FUSED_CE_HOST_DEVICE void store(Float16* p /* [kLanes] */, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Stores past the caches, for what will not be read soon; p is a multiple of the vector's size.
// Other threads see it after stream_end().
#if defined(__AVX512F__)
FUSED_CE_HOST_DEVICE void stream(float* p /* [kLanes] */, Floats v) {
  _mm512_stream_ps(p, (__m512)v);
}
FUSED_CE_HOST_DEVICE void stream_end() { _mm_sfence(); }
#elif defined(__AVX2__)
FUSED_CE_HOST_DEVICE void stream(float* p /* [kLanes] */, Floats v) {
  _mm256_stream_ps(p, (__m256)v);
}
FUSED_CE_HOST_DEVICE void stream_end() { _mm_sfence(); }
#else
FUSED_CE_HOST_DEVICE void stream(float* p /* [kLanes] */, Floats v) { store(p, v); }
FUSED_CE_HOST_DEVICE void stream_end() {}
#endif
// Stores, past the caches if that is wanted and can be done.
template <class T, class V>
FUSED_CE_HOST_DEVICE void put(T* p /* [lanes of V] */, V v, bool streams) {
  if constexpr (std::is_same_v<T, float>) {
    if (streams && reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0) return stream(p, v);
  }
  store(p, v);
}

// The elements of low and high, one behind another, at these places.
template <class V, class Places>
FUSED_CE_HOST_DEVICE V shuffle(V low, V high, Places places) {
#if defined(__clang__)
  constexpr int kCount = sizeof(V) / sizeof(V{}[0]);
  V to;
  for (int i = 0; i < kCount; ++i) {
    to[i] = places[i] < kCount ? low[places[i]] : high[places[i] - kCount];
  }
  return to;
#else
  return __builtin_shuffle(low, high, places);
#endif
}

// Two vectors at once, in the order of T: the first half of the elements and the second, but of
// bfloat16 those in even places and those in odd ones, which a shift and a mask take apart. What is
// loaded beside T's elements is brought into their order.
template <class V>
struct Two {
  V first, second;
};
template <class T, class U>
FUSED_CE_HOST_DEVICE auto load_two(const U* p /* [2 kLanes], of double [kLanes] */) {
  using V = decltype(load(p));
  constexpr int kStep = sizeof(V) / sizeof(ScalarOf<V>);
  V low = load(p), high = load(p + kStep);
  if constexpr (std::is_same_v<T, BFloat16>) {
    Ints even;
    for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
    return Two<V>{shuffle(low, high, even), shuffle(low, high, even + 1)};
  } else {
    return Two<V>{low, high};
  }
}
template <>
FUSED_CE_HOST_DEVICE auto load_two<BFloat16>(const BFloat16* p /* [2 kLanes] */) {
  Words words;
  memcpy(&words, p, sizeof(words));
  return Two<Floats>{math::bit_cast<Floats>(words << 16),
                     math::bit_cast<Floats>(words & 0xffff0000u)};
}
template <>
FUSED_CE_HOST_DEVICE auto load_two<BFloat16>(const uint8_t* p /* [2 kLanes] */) {
  Halves pairs;
  memcpy(&pairs, p, sizeof(pairs));
  Ints words = wide(pairs);
  return Two<Floats>{__builtin_convertvector(words & 0xff, Floats),
                     __builtin_convertvector(words >> 8, Floats)};
}
template <bool kAnyNan = true, class T, class V>
FUSED_CE_HOST_DEVICE void store_two(T* p /* [2 kLanes], of double [kLanes] */, Two<V> v,
                                    bool streams = false) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    Words words = narrow_in_place<Words, kAnyNan>(T{}, v.first) >> 16 |
                  (narrow_in_place<Words, kAnyNan>(T{}, v.second) & 0xffff0000u);
    memcpy(p, &words, sizeof(words));
  } else {
    put(p, v.first, streams);
    put(p + sizeof(V) / sizeof(ScalarOf<V>), v.second, streams);
  }
}

template <class Real, class T>
FUSED_CE_HOST_DEVICE Real to_real(T x) {
  if constexpr (sizeof(T) == 2 && __is_class(T)) {
    return static_cast<Real>(widen<float>(x, static_cast<uint32_t>(x.bits)));
  } else {
    return static_cast<Real>(x);
  }
}
template <class T, class Real>
FUSED_CE_HOST_DEVICE T from_real(Real x) {
  if constexpr (sizeof(T) == 2 && __is_class(T)) {
    return T{static_cast<uint16_t>(narrow<uint32_t>(T{}, static_cast<float>(x)))};
  } else {
    return static_cast<T>(x);
  }
}

// Local to each file that includes this, so that code for one instruction set never serves another.
namespace {

// Calls f with a value of the C++ type that `dtype` stands for.
template <class F>
void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat16:
      return f(Float16{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kBool:
    case Dtype::kUInt8:
      return f(uint8_t{});
    case Dtype::kInt8:
      return f(int8_t{});
    case Dtype::kInt16:
      return f(int16_t{});
    case Dtype::kInt32:
      return f(int32_t{});
    case Dtype::kInt64:
      return f(int64_t{});
  }
}
// The same for what a loss or gradient can be stored as.
template <class F>
void with_float_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kFloat16:
      return f(Float16{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

// The offset of an element, by its place in the index space.
inline int64_t offset_of(const Operand& operand, const IndexSpace& space, int64_t place) {
  int64_t offset = 0;
  for (int d = 0; d < space.rank - 1; ++d) {
    offset += place % space.sizes[d] * operand.strides[d];
    place /= space.sizes[d];
  }
  return offset + place * operand.strides[space.rank - 1];
}

// The address of an element that lies `offset` elements behind the first.
inline void* address_of(const Operand& operand, int64_t offset) {
  return static_cast<char*>(operand.data) + offset * size_of(operand.dtype);
}

// Calls f(pointer to the first element, stride, length, position in the block) for each run of
// elements begin .. begin + count of the operand that lies along dimension 0.
template <class T, class F>
void for_each_run(const Operand& operand, const IndexSpace& space, int64_t begin, int count, F f) {
  T* data = static_cast<T*>(operand.data);
  if (space.rank == 1) return f(data + begin * operand.strides[0], operand.strides[0], count, 0);
  int64_t index[kMaxRank];
  int64_t rest = begin;
  for (int d = 0; d < space.rank; ++d) {
    index[d] = rest % space.sizes[d];
    rest /= space.sizes[d];
  }
  for (int done = 0; done < count;) {
    int64_t offset = 0;
    for (int d = 0; d < space.rank; ++d) offset += index[d] * operand.strides[d];
    int64_t left = space.sizes[0] - index[0];
    int length = left < count - done ? static_cast<int>(left) : count - done;
    f(data + offset, operand.strides[0], length, done);
    done += length;
    index[0] = 0;
    for (int d = 1; d < space.rank && ++index[d] == space.sizes[d]; ++d) index[d] = 0;
  }
}

// Elements that lie one behind another, as Real.
template <class T, class Real>
void load_run(const T* p, int count, Real* to) {  // [count]
  int i = 0;
  if constexpr (sizeof(Real) == 4 && sizeof(T) == 2 && __is_class(T)) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(p + i));
  }
  for (; i < count; ++i) to[i] = to_real<Real>(p[i]);
}
template <class T, class Real>
void store_run(const Real* from, int count, T* p) {  // [count]
  int i = 0;
  if constexpr (sizeof(Real) == 4 && sizeof(T) == 2 && __is_class(T)) {
    for (; i + kLanes <= count; i += kLanes) store(p + i, load(from + i));
  }
  for (; i < count; ++i) p[i] = from_real<T>(from[i]);
}

// The same past the caches.
inline void stream_run(const float* from, int count, float* p) {  // [count]
  int i = 0;
  for (; i < count && reinterpret_cast<uintptr_t>(p + i) % sizeof(Floats) != 0; ++i) p[i] = from[i];
  for (; i + kLanes <= count; i += kLanes) stream(p + i, load(from + i));
  for (; i < count; ++i) p[i] = from[i];
}

// Elements begin .. begin + count as Real.
template <class Real>
__attribute__((noinline)) void gather(const Operand& operand, const IndexSpace& space,
                                      int64_t begin, int count, Real* out /* [count] */) {
  with_type(operand.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_run<const T>(operand, space, begin, count,
                          [&](const T* p, int64_t stride, int length, int place) {
                            Real* to = out + place;
                            if (stride == 1) {
                              load_run(p, length, to);
                            } else if (stride == 0) {
                              Real value = to_real<Real>(*p);
                              for (int i = 0; i < length; ++i) to[i] = value;
                            } else {
                              for (int i = 0; i < length; ++i) to[i] = to_real<Real>(p[i * stride]);
                            }
                          });
  });
}

// The reverse: writes elements begin .. begin + count.
template <class Real>
__attribute__((noinline)) void scatter(const Real* from /* [count] */, const Operand& operand,
                                       const IndexSpace& space, int64_t begin, int count) {
  with_float_type(operand.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_run<T>(operand, space, begin, count, [&](T* p, int64_t stride, int length, int place) {
      if (stride == 1) {
        store_run(from + place, length, p);
      } else {
        for (int i = 0; i < length; ++i) p[i * stride] = from_real<T>(from[place + i]);
      }
    });
  });
}

// Whether the operand's elements lie one behind another and are of type T.
template <class T>
bool lies_flat(const Operand& operand, const IndexSpace& space) {
  if (space.rank != 1 || operand.strides[0] != 1) return false;
  bool is_type = false;
  with_type(operand.dtype, [&](auto type) { is_type = std::is_same_v<decltype(type), T>; });
  return is_type;
}

}  // namespace
}  // namespace fused_ce
