// The per-element formulas of every loss, shared by the CPU bodies and the CUDA kernels.
//
// Each formula is a template over V: a scalar (float, double) or a GCC vector of these on the CPU,
// a scalar on the GPU. The operators and the ternary read the same for all of them, so the formula
// is written once. Only the primitives (exponential, logarithms) differ by platform; they come
// first.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__CUDACC__)
#define FUSED_CE_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Forced inlining keeps code built for AVX-512 out of the symbols that other files could link to.
#define FUSED_CE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fused_ce {

// How exact exponential and logarithm are: kFull to about one unit in the last place of float32,
// kHalf to 2e-5, a four hundredth of bfloat16's spacing beside 1 and a fiftieth of float16's.
enum class Precision { kFull, kHalf };

// The type of V's elements.
template <class V>
struct ElementOf {
  using type = V;
};
template <class V>
using ScalarOf = typename ElementOf<V>::type;

namespace math {

// Remez fits on [0, 1]: of (log1p(e) - e) / e^2, relative error of log1p 9.4e-9; and of log1p(e) /
// e, 8.4e-6.
#define FUSED_CE_LOG1P_FULL                                                                    \
  {-0.499999605332f, 0.333311536702f,   -0.249635297753f, 0.197126676023f,   -0.153843851882f, \
   0.1069882282f,    -0.0575786435285f, 0.0200345166107f, -0.00325637847955f}
#define FUSED_CE_LOG1P_HALF                             \
  {0.999991598744f,  -0.499361349683f, 0.325206566685f, \
   -0.210048436723f, 0.10122206172f,   -0.0238690834899f}

// a b + c, rounded once where the machine can. Said outright, and the compiler is kept from
// choosing: a formula then gives the same bits in every kernel that uses it, so that a second
// backward gives the first one's.
#if defined(__CUDA_ARCH__) || defined(__FMA__)
FUSED_CE_HOST_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FUSED_CE_HOST_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
#else
FUSED_CE_HOST_DEVICE float multiply_add(float a, float b, float c) { return a * b + c; }
FUSED_CE_HOST_DEVICE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif
#if !defined(__CUDACC__)
// The operations on V that have no operator; vector.h has them for each instruction set.
template <class V>
struct Machine;
template <class V>
FUSED_CE_HOST_DEVICE V multiply_add(V a, V b, V c) {
  return Machine<V>::multiply_add(a, b, c);
}
#endif

template <class V, class Scalar, int kTerms>
FUSED_CE_HOST_DEVICE V polynomial(V x, const Scalar (&coefficients)[kTerms]) {
  V sum = V{} + coefficients[kTerms - 1];
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 16
#endif
  for (int i = kTerms - 2; i >= 0; --i) sum = multiply_add(sum, x, V{} + coefficients[i]);
  return sum;
}

// What rounding takes from `before` + `term`, given that sum as rounded (Knuth's two-sum).
template <class V>
FUSED_CE_HOST_DEVICE V lost_in(V before, V term, V sum) {
  V added = sum - before;
  return (before - (sum - added)) + (term - added);
}
// A sum with all that it has lost, which beside an infinite sum is NaN, and says nothing.
template <class V>
FUSED_CE_HOST_DEVICE V with_lost(V sum, V lost) {
  return lost == lost ? sum + lost : sum;
}

FUSED_CE_HOST_DEVICE double absolute(double x) { return fabs(x); }
// Both are 1 / x; `inverse` is the more exact one on the CPU.
FUSED_CE_HOST_DEVICE double reciprocal(double x) { return 1.0 / x; }
FUSED_CE_HOST_DEVICE double inverse(double x) { return 1.0 / x; }
FUSED_CE_HOST_DEVICE double log(double x) { return ::log(x); }
template <Precision>
FUSED_CE_HOST_DEVICE double log(double x) {
  return ::log(x);
}
template <Precision>
FUSED_CE_HOST_DEVICE double exp_negative(double y) {
  return ::exp(-y);
}
template <Precision>
FUSED_CE_HOST_DEVICE double log1p_unit(double e) {
  return ::log1p(e);
}

#if defined(__CUDACC__)

// kHalf: to an absolute error of 2e-7, near 0 too.
template <Precision kPrecision>
__device__ __forceinline__ float tanh(float x) {
  if constexpr (kPrecision == Precision::kHalf) {
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * 2.88539008177792681f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
    return fmaf(-2.0f, r, 1.0f);
  } else {
    return tanhf(x);
  }
}
template <Precision>
__device__ __forceinline__ double tanh(double x) {
  return ::tanh(x);
}

// exp(d) for a logit that lies d above a reference near the row's largest one; d = -inf gives 0
// unless it is known to be finite.
template <Precision, bool kFinite = false>
__device__ __forceinline__ double exp_shifted(double d) {
  return ::exp(d);
}
template <Precision kPrecision, bool kFinite = false>
__device__ __forceinline__ float exp_shifted(float d) {
  float p = d * 1.44269502162933349609375f;
  float e;
  if constexpr (kPrecision == Precision::kHalf) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(p));
    return e;
  } else {
    // What the rounding of p took: d - p ln2. At an infinite d it is NaN, and must not get into e.
    float low = fmaf(p, 1.90465430e-9f, fmaf(p, -0.693147182464599609375f, d));
    asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(p));
    return fmaf(e, kFinite ? low : fminf(low, 0.5f), e);
  }
}

__device__ __forceinline__ float absolute(float x) { return fabsf(x); }
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float inverse(float x) { return reciprocal(x); }
__device__ __forceinline__ float log(float x) { return logf(x); }
// One Newton step on the quotient by the approximate reciprocal: the division without its branch
// for numbers that are subnormal or infinite.
__device__ __forceinline__ float quotient(float a, float b) {
  float r = reciprocal(b), q = a * r;
  return fmaf(fmaf(-b, q, a), r, q);
}
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }
// log(1 + f) in half precision, given 1 + f as well: a series where the hardware's logarithm would
// lose digits.
__device__ __forceinline__ float log1p_half(float f, float sum) {
  float series = fmaf(f, fmaf(f, fmaf(f, -0.25f, 0.333333343f), -0.5f), 1.0f) * f;
  float direct = __log2f(sum) * 0.693147182464599609375f;
  return fabsf(f) < 0.0625f ? series : direct;
}
template <Precision kPrecision>
__device__ __forceinline__ float log(float x) {
  return kPrecision == Precision::kHalf ? log1p_half(x - 1.0f, x) : logf(x);
}

// exp(-y). The product with log2(e) is rounded once; kFull adds its error back, since at y = 20
// that rounding alone is 1e-6 of the result.
template <Precision kPrecision>
__device__ __forceinline__ float exp_negative(float y) {
  const float kLog2E = 1.44269502162933349609375f, kLog2ELow = 1.92596299112661746887e-8f;
  float p = y * -kLog2E;
  float e;
  if constexpr (kPrecision == Precision::kHalf) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(p));
    return e;
  } else {
    float low = fmaf(y, -kLog2E, -p) - y * kLog2ELow;
    asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(p));
    // At y = inf, low is NaN while e is rightly 0.
    return e == 0.f ? e : fmaf(e, low * 0.693147182464599609375f, e);
  }
}

// log1p(e) for e in [0, 1].
template <Precision kPrecision>
__device__ __forceinline__ float log1p_unit(float e) {
  if constexpr (kPrecision == Precision::kHalf) {
    const float c[] = FUSED_CE_LOG1P_HALF;
    return e * polynomial<float>(e, c);
  } else {
    const float c[] = FUSED_CE_LOG1P_FULL;
    return fmaf(e * e, polynomial<float>(e, c), e);
  }
}

#else  // CPU: V is float or a vector; the same bit operations serve all.

template <class V>
using Bits = typename Machine<V>::Bits;

template <class V>
constexpr bool kIsDouble = sizeof(ScalarOf<V>) == sizeof(double);
// A function of float64 that has no vector of its own, lane by lane.
template <class V, class F>
FUSED_CE_HOST_DEVICE V each_lane(V x, F f) {
  V y{};
  for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(double)); ++i) y[i] = f(x[i]);
  return y;
}

template <class To, class From>
FUSED_CE_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
FUSED_CE_HOST_DEVICE V absolute(V x) {
  if constexpr (kIsDouble<V>) return bit_cast<V>(bit_cast<Bits<V>>(x) & 0x7fffffffffffffff);
  return bit_cast<V>(bit_cast<Bits<V>>(x) & 0x7fffffff);
}

// What exp(-y) = 2^n * exp(r), r in [-ln2/2, ln2/2], takes: y above kMost gives 0; adding kRound
// rounds to a whole number in the low bits; ln2 is in two parts, the first of which has so many
// zeros that its product with n is exact; kSeries is (exp(r) - 1 - r) / r^2.
template <class Scalar>
struct ExpTerms;
template <>
struct ExpTerms<float> {
  static constexpr float kMost = 104, kRound = 12582912;  // 1.5 * 2^23
  static constexpr float kLog2E = 1.44269502162933349609375f;
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860682030941723212e-6f;
  // A Remez fit, relative error of exp 3.1e-9.
  static constexpr float kSeries[] = {0.499999934514f, 0.166665206896f, 0.0416683874427f,
                                      0.00836870986152f, 0.00138146087989f};
  static constexpr int kExponentBias = 127, kMantissaBits = 23;
};
template <>
struct ExpTerms<double> {
  static constexpr double kMost = 746, kRound = 6755399441055744;  // 1.5 * 2^52
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
  // Taylor's, relative error of exp 4e-18.
  static constexpr double kSeries[] = {
      1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  static constexpr int kExponentBias = 1023, kMantissaBits = 52;
};

// x * 2^n for a whole n in [-190, 63], of float64 [-1086, 63], in two factors, so that results
// below the smallest normal number round once and a NaN stays one.
template <class V>
FUSED_CE_HOST_DEVICE V times_power_by_bits(V x, V n) {
  using Exp = ExpTerms<ScalarOf<V>>;
  V biased = n + (Exp::kRound + Exp::kExponentBias + 64);
  V scale = bit_cast<V>(bit_cast<Bits<V>>(biased) << Exp::kMantissaBits);
  return x * scale * ScalarOf<V>{5.42101086242752217004e-20f};  // 2^-64
}

// In operators alone; what an instruction set does better stands before it. greater(x, y) is y
// where either is NaN, at_most NaN where x is. any() takes what a comparison gives.
template <class V>
struct OperatorMachine {
  using Scalar = ScalarOf<V>;
  FUSED_CE_HOST_DEVICE static V at_most(Scalar limit, V x) { return x > limit ? V{} + limit : x; }
  FUSED_CE_HOST_DEVICE static V greater(V x, V y) { return x > y ? x : y; }
  FUSED_CE_HOST_DEVICE static V multiply_add(V a, V b, V c) { return a * b + c; }
  FUSED_CE_HOST_DEVICE static V reciprocal(V x) { return Scalar{1} / x; }
  FUSED_CE_HOST_DEVICE static V times_power_of_two(V x, V n) { return times_power_by_bits(x, n); }
  template <class Mask>
  FUSED_CE_HOST_DEVICE static bool any(Mask mask) {
    if constexpr (std::is_same_v<Mask, bool>) {
      return mask;
    } else {
      auto bits = mask[0];
      for (int i = 1; i < static_cast<int>(sizeof(V) / sizeof(Scalar)); ++i) bits |= mask[i];
      return bits != 0;
    }
  }
};
template <>
struct Machine<float> : OperatorMachine<float> {
  using Bits = int32_t;
};
template <>
struct Machine<double> : OperatorMachine<double> {
  using Bits = int64_t;
};

template <class V>
FUSED_CE_HOST_DEVICE V reciprocal(V x) {
  return Machine<V>::reciprocal(x);
}
template <class V>
FUSED_CE_HOST_DEVICE V quotient(V a, V b) {
  return a / b;
}
template <class V>
FUSED_CE_HOST_DEVICE V inverse(V x) {
  return 1.0f / x;
}
FUSED_CE_HOST_DEVICE double tanh(double x) { return ::tanh(x); }

// exp(-y). Right for y >= -43.
template <Precision kPrecision, class V>
FUSED_CE_HOST_DEVICE V exp_negative(V y) {
  using Scalar = ScalarOf<V>;
  using Exp = ExpTerms<Scalar>;
  y = Machine<V>::at_most(Exp::kMost, y);
  V n = multiply_add(y, V{} - Exp::kLog2E, V{} + Exp::kRound) - Exp::kRound;
  if constexpr (kPrecision == Precision::kHalf && !kIsDouble<V>) {
    V r = multiply_add(n, V{} - 0.693147182464599609375f, -y);
    // Remez fit of (exp(r) - 1) / r, relative error of exp 5.4e-6.
    const float c[] = {0.999939628308f, 0.49998994882f, 0.168173100862f, 0.0419175298056f};
    V p = multiply_add(polynomial<V>(r, c), r, V{} + 1.0f);
    return Machine<V>::times_power_of_two(p, n);
  } else {
    V r = multiply_add(n, V{} - Exp::kLn2High, -y);
    r = multiply_add(n, V{} - Exp::kLn2Low, r);
    V p = multiply_add(r * r, polynomial<V>(r, Exp::kSeries), r);
    return Machine<V>::times_power_of_two(p + Scalar{1}, n);
  }
}

// log1p(e) for e in [0, 1].
template <Precision kPrecision, class V>
FUSED_CE_HOST_DEVICE V log1p_unit(V e) {
  if constexpr (kIsDouble<V>) {
    return each_lane(e, [](double x) { return ::log1p(x); });
  } else if constexpr (kPrecision == Precision::kHalf) {
    const float c[] = FUSED_CE_LOG1P_HALF;
    return e * polynomial<V>(e, c);
  } else {
    const float c[] = FUSED_CE_LOG1P_FULL;
    return multiply_add(e * e, polynomial<V>(e, c), e);
  }
}

// tanh(x): a polynomial where the difference of two exponentials would lose digits.
template <class V>
FUSED_CE_HOST_DEVICE V tanh(V x) {
  if constexpr (kIsDouble<V>) return each_lane(x, [](double lane) { return ::tanh(lane); });
  V y = absolute(x), z = x * x;
  // Remez fit of (tanh(x) - x) / x^3 up to 1, relative error of tanh 4.6e-9.
  const float c[] = {-0.333332954315f,   0.133323445666f,   -0.053879802368f,   0.0214866566819f,
                     -0.00794610522661f, 0.00230136377384f, -0.000358451779323f};
  V small = multiply_add(x * z, polynomial<V>(z, c), x);
  if (!Machine<V>::any(y >= 1.0f)) return small;
  V e = exp_negative<Precision::kFull>(y + y);
  V large = 1.0f - (e + e) / (1.0f + e);
  large = x < 0.0f ? -large : large;
  return y < 1.0f ? small : large;
}

// log(x) for x >= 0 (0 gives -inf, a negative x NaN): x = 2^n * (1 + f), 1 + f in [sqrt(1/2),
// sqrt(2)].
template <class V>
FUSED_CE_HOST_DEVICE V log(V x) {
  if constexpr (kIsDouble<V>) return each_lane(x, [](double lane) { return ::log(lane); });
  V normal = x < 1.17549435e-38f ? x * 8388608.0f : x;
  V offset = x < 1.17549435e-38f ? V{} - 23.0f : V{};
  Bits<V> bits = bit_cast<Bits<V>>(normal);
  Bits<V> n = (bits - 0x3f3504f3) >> 23;
  V f = bit_cast<V>(bits - (n << 23)) - 1.0f;
  // The exponent as a float without a conversion instruction, which scalars and vectors spell
  // apart.
  V k = bit_cast<V>(n + 0x4b400000) - 12582912.0f + offset;
  // Remez fit of (log1p(f) - f + f^2/2) / f^3, relative error of log 5.9e-9.
  const float c[] = {0.333333167225f, -0.250008103241f, 0.200022867143f, -0.166245572372f,
                     0.141811804401f, -0.13128709817f,  0.128817256184f, -0.078598422185f};
  V f2 = f * f;
  V tail = multiply_add(f2 * f, polynomial<V>(f, c), k * 1.42860682030941723212e-6f);
  V result = multiply_add(k, V{} + 0.693145751953125f, f - multiply_add(f2, V{} + 0.5f, -tail));
  result = x == 0.0f ? V{} - __builtin_inff() : result;
  result = x < 0.0f ? V{} + __builtin_nanf("") : result;
  return x > 3.4028234e38f || x != x ? x : result;
}
template <Precision, class V>
FUSED_CE_HOST_DEVICE V log(V x) {
  return log(x);
}

#endif

// log(1 + f), f > -1, given 1 + f as rounded: (1 - sum) + f is what the rounding took, exactly.
template <Precision kPrecision, class V>
FUSED_CE_HOST_DEVICE V log1p(V f, V sum) {
#if defined(__CUDACC__)
  if constexpr (kPrecision == Precision::kHalf) return log1p_half(f, sum);
#endif
  return math::log(sum) + (sum == 0.0f ? sum : quotient((1.0f - sum) + f, sum));
}

}  // namespace math

template <class V>
struct LossAndGradient {
  V loss;      // of one element
  V gradient;  // d loss / d input
};

// Binary cross entropy on a logit x, as softplus(x) and softplus(-x) weighted by the coefficients
// `negative` = 1 - t and `positive` = pos_weight t, whose sum the caller passes as `total` (the
// constant 1 without pos_weight, which then folds away):
//   loss = positive softplus(-x) + negative softplus(x)
// With y = |x|, e = exp(-y), s = -1 / (1 + e) and m the coefficient of the wrong side, this is
// m y + total log1p(e), and the gradient sign(x) (m + total e s): one exponential, no cancellation.
struct BceLogits {
  // m y. An infinite logit on the right side, where m = 0, costs 0.
  template <class V>
  FUSED_CE_HOST_DEVICE static V wrong_side(V m, V y) {
    return m == 0.0f ? m : m * y;
  }
  // The gradient, times `scale`, which takes over its sign.
  template <class V>
  FUSED_CE_HOST_DEVICE static V gradient(V x, V e, V m, V total, V scale) {
    return math::multiply_add(total, e * math::reciprocal(-1.0f - e), m) *
           (x >= 0.0f ? scale : -scale);
  }
  template <Precision kPrecision, class V>
  FUSED_CE_HOST_DEVICE static LossAndGradient<V> evaluate(V x, V negative, V positive, V total,
                                                          V scale) {
    V y = math::absolute(x);
    V e = math::exp_negative<kPrecision>(y);
    V m = x >= 0.0f ? negative : positive;
    return {math::multiply_add(total, math::log1p_unit<kPrecision>(e), wrong_side(m, y)),
            gradient(x, e, m, total, scale)};
  }
#if !defined(__CUDACC__)
  // m y of a plain logit, as max(x, 0) - x t, rounded once; but NaN where wrong_side selects 0.
  template <class V>
  FUSED_CE_HOST_DEVICE static V finite_wrong_side(V x, V t) {
    return math::multiply_add(-x, t, math::Machine<V>::greater(x, V{}));
  }
#endif
};

// log1p(a) + log1p(b) = log1p(a + b + a b), which this returns, so that one logarithm serves many
// logits. 1 + a is never formed: a keeps its digits where it is small.
template <class V>
FUSED_CE_HOST_DEVICE V log1p_product(V a, V b) {
  return math::multiply_add(-a, -1.0f - b, b);
}

#if defined(__CUDACC__)
// BceLogits, plain, for a group of logits of which only the summed loss is wanted, in half
// precision: fewer instructions an element. One logarithm serves the group, by log1p_product. The
// wrong side is max(x, 0) - x t in one rounding. An infinite logit makes the sum NaN: the caller
// then adds up BceLogits.
template <bool kGradient, int kCount>
__device__ __forceinline__ float bce_logits_group(const float (&x)[kCount],             // [kCount]
                                                  const float (&minus_target)[kCount],  // [kCount]
                                                  float scale,
                                                  float (&gradient)[kCount]) {  // [kCount]
  float wrong_side = 0, z = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float e = math::exp_negative<Precision::kHalf>(fabsf(x[i]));
    float u = 1.0f + e;
    float wrong = fmaf(x[i], minus_target[i], fmaxf(x[i], 0.0f));
    z = i == 0 ? e : fmaf(z, u, e);
    wrong_side = i == 0 ? wrong : wrong_side + wrong;
    if constexpr (kGradient) {
      float q = e * math::reciprocal(u);
      bool positive = x[i] >= 0.0f;
      gradient[i] =
          fmaf(q, positive ? -scale : scale, fmaf(minus_target[i], scale, positive ? scale : 0.0f));
    }
  }
  return wrong_side + math::log1p_half(z, 1.0f + z);
}
#endif

// Binary cross entropy on a probability p, with torch.nn.BCELoss's clamps:
//   loss = -(t max(log p, -100) + (1 - t) max(log(1 - p), -100)), gradient (p - t) / max(p (1 - p),
//   1e-12)
struct BceProbability {
  template <Precision kPrecision, class V>
  FUSED_CE_HOST_DEVICE static LossAndGradient<V> evaluate(V p, V t) {
    V q = 1.0f - p;
    V log_q = math::log1p<kPrecision>(-p, q);
    V log_p = math::log<kPrecision>(p);
    log_p = log_p < -100.0f ? V{} - 100.0f : log_p;
    log_q = log_q < -100.0f ? V{} - 100.0f : log_q;
    log_p = p == 0.0f ? p - 100.0f : log_p;
    log_q = q == 0.0f ? q - 100.0f : log_q;
    const ScalarOf<V> kSmallest = 1e-12f;  // torch's is float32's number in float64, too
    V pq = p * q;
    return {-math::multiply_add(t, log_p, (1.0f - t) * log_q),
            math::quotient(p - t, pq < kSmallest ? V{} + kSmallest : pq)};
  }
};

template <class Scalar>
struct FocalOptions {
  Scalar positive, negative;  // alpha and 1 - alpha, or 1 and 1 without balancing
  Scalar gamma;
  Scalar parity;  // the sign of u^gamma for a negative u: NaN where gamma is no integer
  int32_t power;  // gamma where it is a whole number from 1 to 8, else 0
};

// Focal loss (Lin et al. 2017, arXiv:1708.02002): alpha_t u^gamma ce(x, t) with u = 1 - p_t.
// With e and m as in BceLogits, r = 1 / (1 + e) and n the coefficient of the right side,
// u = r (m + n e). Small whole
// powers are products. Others go by log u, which so needs no subtraction of nearly equal numbers,
// and by d log u / dx = (1 - 2t) e r / (m + n e), which stays finite where u underflows. A target
// outside [0, 1] can make u negative.
struct FocalLogits {
  template <Precision kPrecision, class V>
  FUSED_CE_HOST_DEVICE static LossAndGradient<V> evaluate(
      V x, V t, const FocalOptions<ScalarOf<V>>& options) {
    V negative = 1.0f - t;
    V y = math::absolute(x);
    V e = math::exp_negative<kPrecision>(y);
    V r = math::reciprocal(1.0f + e);
    if constexpr (kPrecision == Precision::kFull) {
      // A Newton step, which takes the rounding of 1 + e into account: powers multiply r's error.
      r = math::multiply_add(r, math::multiply_add(-e, r, 1.0f - r), r);
    }
    V q = e * r;
    V log1p_e = math::log1p_unit<kPrecision>(e);
    V m = x >= 0.0f ? negative : t;
    V n = x >= 0.0f ? t : negative;
    V ce = m == 0.0f ? log1p_e : math::multiply_add(m, y, log1p_e);
    // u^gamma and its derivative, both this and that of ce for x >= 0: for x < 0 they turn signs.
    V modulation, slope;
    if (options.power > 0) {
      V u = r * math::multiply_add(n, e, m);
      V u2 = u * u;
      int32_t exponent = options.power - 1;
      V lower = exponent & 1 ? u : V{} + 1.0f;
      if (exponent & 2) lower *= u2;
      if (exponent & 4) lower *= u2 * u2;
      modulation = lower * u;
      slope = lower * options.gamma * ((m - n) * r * q);
    } else if (options.gamma != 0.0f) {
      // u = r base, or r e base on the right side of a hard label.
      V base = m == 0.0f ? n : math::multiply_add(n, e, m);
      V log_u = math::log<kPrecision>(math::absolute(base)) - (m == 0.0f ? y : V{}) - log1p_e;
      modulation = math::exp_negative<kPrecision>(log_u * -options.gamma);
      modulation = base < 0.0f ? modulation * options.parity : modulation;
      V log_slope = (m - n) * r;
      log_slope = (m == 0.0f ? log_slope : log_slope * e) / base;
      slope = modulation * options.gamma * log_slope;
    } else {
      modulation = V{} + 1.0f;
      slope = V{};
    }
    V factor = math::multiply_add(V{} + options.positive, t, options.negative * negative);
    // At an infinite logit on the wrong side the loss is infinite while u stands still.
    V steeper = slope == 0.0f ? slope : ce * slope;
    V gradient = factor * math::multiply_add(modulation, m - q, steeper);
    return {modulation * (factor * ce), x >= 0.0f ? gradient : -gradient};
  }
};

// One row of softmax cross entropy. One pass over its logits l_c, with a coefficient b_c for each
// (the weighted probability or share of label smoothing), adds up these, all relative to a
// `reference` near the largest logit, so that nothing overflows and nothing cancels.
template <class V>
struct SoftmaxSums {
  V reference;
  V exponentials;  // sum of e_c = exp(l_c - reference)
  V coefficients;  // sum of b_c
  V cost;          // sum of b_c (reference - l_c)
  V entropy;       // sum of e_c (reference - l_c)
};

// A term whose factor is 0 is not there, even if what it multiplies is infinite or NaN.
template <class V>
FUSED_CE_HOST_DEVICE V add_term(V sum, V factor, V term) {
  return factor == 0.0f ? sum : sum + term;
}

// What follows from the sums, with lse = reference + log(sum of e_c), the label's logit l_y and
// weight w_y (0 where there is none):
//   loss = w_y (lse - l_y) + sum of b_c (lse - l_c) + z_loss lse^2
//   entropy = lse - sum of p_c l_c
//   d loss / d l_c = (w_y + sum of b + 2 z_loss lse) p_c - b_c - [c = y] w_y
//   d lse / d l_c = p_c,  d entropy / d l_c = -p_c (l_c - lse + entropy)
template <class V>
struct SoftmaxRow {
  V log_sum, inverse, lse, entropy, loss;

  // All but the loss. Without the logarithm, which only the gradients of z_loss and of the entropy
  // need, these are but `inverse`.
  FUSED_CE_HOST_DEVICE static SoftmaxRow of(const SoftmaxSums<V>& sums, bool with_logarithm) {
    SoftmaxRow row{};
    if (with_logarithm) row.log_sum = math::log(sums.exponentials);
    row.inverse = math::inverse(sums.exponentials);
    row.lse = sums.reference == V{} + INFINITY ? sums.reference : sums.reference + row.log_sum;
    row.entropy = math::multiply_add(sums.entropy, row.inverse, row.log_sum);
    return row;
  }

  FUSED_CE_HOST_DEVICE void set_loss(const SoftmaxSums<V>& sums, bool has_label, V label_weight,
                                     V label_logit, V z_loss) {
    loss = sums.cost;
    if (has_label) loss += label_weight * ((sums.reference - label_logit) + log_sum);
    loss = add_term<V>(loss, sums.coefficients, sums.coefficients * log_sum);
    loss = add_term<V>(loss, z_loss, z_loss * lse * lse);
  }

  FUSED_CE_HOST_DEVICE static SoftmaxRow evaluate(const SoftmaxSums<V>& sums, bool has_label,
                                                  V label_weight, V label_logit, V z_loss) {
    SoftmaxRow row = of(sums, true);
    row.set_loss(sums, has_label, label_weight, label_logit, z_loss);
    return row;
  }
};

// d / d l_c of all upstream gradients together is
//   e_c (exponential + entropy (reference - l_c)) - b_c coefficient - [c = y] label.
template <class V>
struct SoftmaxGradient {
  V exponential, entropy, coefficient, label;

  FUSED_CE_HOST_DEVICE static SoftmaxGradient evaluate(const SoftmaxSums<V>& sums,
                                                       const SoftmaxRow<V>& row, V label_weight,
                                                       V z_loss, V grad_loss, V grad_lse,
                                                       V grad_entropy) {
    V total = add_term<V>(label_weight, sums.coefficients, sums.coefficients);
    total = add_term<V>(total, z_loss, 2.0f * z_loss * row.lse);
    V upstream = add_term<V>(grad_loss * total, grad_lse, grad_lse);
    upstream = add_term<V>(upstream, grad_entropy, grad_entropy * (row.log_sum - row.entropy));
    return {upstream * row.inverse, grad_entropy * row.inverse, grad_loss,
            grad_loss * label_weight};
  }
};

#if !defined(__CUDACC__)
// One row of two classes: binary cross entropy of the distance of the other class's logit from the
// label's, one exponential.
template <class V>
struct SoftmaxPair {
  V loss, lse;
  V x, e, wrong;  // the distance, exp(-|x|), and 1 where x >= 0, else 0

  template <Precision kPrecision, class Mask>
  FUSED_CE_HOST_DEVICE static SoftmaxPair evaluate(V first, V second, Mask label_is_second) {
    V top = math::Machine<V>::greater(first, second);
    V zero = top - top;  // NaN where the larger one is infinite, as is then the loss
    V distance = (second - first) + zero;
    V x = label_is_second ? -distance : distance;
    V y = math::absolute(x), e = math::exp_negative<kPrecision>(y);
    V log_sum = math::log1p_unit<kPrecision>(e), wrong = x >= V{} ? V{} + 1.0f : V{};
    return {log_sum + BceLogits::wrong_side(wrong, y), zero == zero ? top + log_sum : top, x, e,
            wrong};
  }
  // Of the other class's logit, times `scale`; the label's is its negative.
  FUSED_CE_HOST_DEVICE V gradient(V scale) const {
    return BceLogits::gradient(x, e, wrong, V{} + 1.0f, scale);
  }
};
#endif

}  // namespace fused_ce
