// Operands inside a kernel: loads and stores of any dtype and stride.
#pragma once

#include <stdint.h>

#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../elementwise.h"

namespace fused_ce {

constexpr int kCudaRank = 16;  // merged dimensions

struct TypedPointer {
  void* data;
  Dtype dtype;
};

struct CudaSpace {
  int64_t numel;
  int rank;
  int64_t sizes[kCudaRank];  // [rank]
  uint64_t
      reciprocals[kCudaRank];  // [rank] (2^64 - 1) / size: a kernel multiplies instead of dividing
};

struct CudaOperand {
  // kPeriodic: dense along dimension 0 and broadcast along the others, as a weight for each class
  // is.
  enum Access : int32_t { kAbsent, kFlat, kScalar, kPeriodic, kStrided };
  void* data;
  Dtype dtype;
  Access access;
  bool aligned;                // to 16 bytes
  int64_t strides[kCudaRank];  // [rank]
};

inline CudaSpace cuda_space(const IndexSpace& space) {
  CudaSpace result{space.numel, space.rank, {}, {}};
  for (int d = 0; d < space.rank; ++d) {
    result.sizes[d] = space.sizes[d];
    result.reciprocals[d] = space.sizes[d] > 0 ? ~uint64_t{0} / space.sizes[d] : 0;
  }
  return result;
}

inline CudaOperand cuda_operand(const Operand& operand, const IndexSpace& space) {
  CudaOperand result{operand.data, operand.dtype, CudaOperand::kAbsent, false, {}};
  if (!operand) return result;
  bool flat = true, scalar = true, periodic = operand.strides[0] == 1;
  int64_t expected = 1;
  for (int d = 0; d < space.rank; ++d) {
    result.strides[d] = operand.strides[d];
    flat &= operand.strides[d] == expected;
    scalar &= operand.strides[d] == 0;
    periodic &= d == 0 || operand.strides[d] == 0;
    expected *= space.sizes[d];
  }
  result.access = flat       ? CudaOperand::kFlat
                  : scalar   ? CudaOperand::kScalar
                  : periodic ? CudaOperand::kPeriodic
                             : CudaOperand::kStrided;
  result.aligned = reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
  return result;
}

#if defined(__CUDACC__)

template <class Real, class T>
__device__ __forceinline__ Real to_real(T x) {
  return static_cast<Real>(x);
}
template <class Real>
__device__ __forceinline__ Real to_real(__half x) {
  return static_cast<Real>(__half2float(x));
}
template <class Real>
__device__ __forceinline__ Real to_real(__nv_bfloat16 x) {
  return static_cast<Real>(__bfloat162float(x));
}
template <class T, class Real>
__device__ __forceinline__ T from_real(Real x) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (std::is_same_v<T, __half>) return __float2half_rn(static_cast<float>(x));
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return __float2bfloat16_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// kCount elements of T, moved by accesses of up to 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Group {
  T values[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ void unpack(const Group<T, kCount>& group, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = to_real<float>(group.values[i]);
}
// Two bfloat16 share a 32-bit word; each is the upper half of a float. In PTX, since C++ would move
// every word between integer and float registers.
template <int kCount>
__device__ __forceinline__ void unpack(const Group<__nv_bfloat16, kCount>& group,
                                       float (&out)[kCount]) {
  uint32_t words[kCount / 2];
  memcpy(words, &group, sizeof(words));
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    asm("shl.b32 %0, %1, 16;" : "=f"(out[2 * i]) : "r"(words[i]));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(out[2 * i + 1]) : "r"(words[i]));
  }
}

// The elements with their signs turned.
template <class T, int kCount>
__device__ __forceinline__ void unpack_negated(const Group<T, kCount>& group,
                                               float (&out)[kCount]) {
  if constexpr (sizeof(T) == 2) {
    Group<T, kCount> negated;
    uint32_t words[kCount / 2];
    memcpy(words, &group, sizeof(words));
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) words[i] ^= 0x80008000u;
    memcpy(&negated, words, sizeof(words));
    unpack(negated, out);
  } else {
    unpack(group, out);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = -out[i];
  }
}

template <int kCount>
__device__ __forceinline__ void pack(const float (&from)[kCount],
                                     Group<__nv_bfloat16, kCount>& group) {
  __nv_bfloat162 pairs[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    pairs[i] = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
  }
  memcpy(&group, pairs, sizeof(pairs));
}
template <int kCount>
__device__ __forceinline__ void pack(const float (&from)[kCount], Group<__half, kCount>& group) {
  __half2 pairs[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) pairs[i] = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
  memcpy(&group, pairs, sizeof(pairs));
}
template <int kCount>
__device__ __forceinline__ void pack(const float (&from)[kCount], Group<float, kCount>& group) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) group.values[i] = from[i];
}

template <class F>
__device__ __forceinline__ void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(static_cast<double*>(nullptr));
    case Dtype::kFloat32:
      return f(static_cast<float*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<__half*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::kBool:
    case Dtype::kUInt8:
      return f(static_cast<uint8_t*>(nullptr));
    case Dtype::kInt8:
      return f(static_cast<int8_t*>(nullptr));
    case Dtype::kInt16:
      return f(static_cast<int16_t*>(nullptr));
    case Dtype::kInt32:
      return f(static_cast<int32_t*>(nullptr));
    case Dtype::kInt64:
      return f(static_cast<int64_t*>(nullptr));
  }
}
template <class F>
__device__ __forceinline__ void with_float_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(static_cast<double*>(nullptr));
    case Dtype::kFloat16:
      return f(static_cast<__half*>(nullptr));
    case Dtype::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

__device__ __forceinline__ int64_t offset_of(const CudaOperand& operand, const CudaSpace& space,
                                             int64_t index) {
  if (operand.access == CudaOperand::kFlat) return index;
  if (operand.access == CudaOperand::kScalar) return 0;
  int64_t offset = 0;
  int last = space.rank - 1;
#pragma unroll 1
  for (int d = 0; d < last; ++d) {
    // The estimate is the quotient or one less.
    int64_t quotient = static_cast<int64_t>(__umul64hi(index, space.reciprocals[d]));
    int64_t remainder = index - quotient * space.sizes[d];
    bool is_less = remainder >= space.sizes[d];
    offset += (is_less ? remainder - space.sizes[d] : remainder) * operand.strides[d];
    index = is_less ? quotient + 1 : quotient;
  }
  return offset + index * operand.strides[last];
}

template <class Real>
__device__ __forceinline__ Real load(TypedPointer from, int64_t offset) {
  Real value = 0;
  with_type(from.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    value = to_real<Real>(static_cast<const T*>(from.data)[offset]);
  });
  return value;
}

template <class Real>
__device__ __forceinline__ Real load(const CudaOperand& operand, const CudaSpace& space,
                                     int64_t index) {
  return load<Real>(TypedPointer{operand.data, operand.dtype}, offset_of(operand, space, index));
}

template <class Real>
__device__ __forceinline__ void store(TypedPointer to, int64_t offset, Real value) {
  with_float_type(to.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    static_cast<T*>(to.data)[offset] = from_real<T>(value);
  });
}

template <class Real>
__device__ __forceinline__ void store(const CudaOperand& operand, const CudaSpace& space,
                                      int64_t index, Real value) {
  store(TypedPointer{operand.data, operand.dtype}, offset_of(operand, space, index), value);
}

#endif

}  // namespace fused_ce
