// Operands inside a kernel: loads and stores of any dtype and stride.
#pragma once

#include <stdint.h>

#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../elementwise.h"
#include "limits.h"

namespace fused_ce {

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
  enum Access : int32_t { kAbsent, kFlat, kScalar, kStrided };
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
  bool flat = true, scalar = true;
  int64_t expected = 1;
  for (int d = 0; d < space.rank; ++d) {
    result.strides[d] = operand.strides[d];
    flat &= operand.strides[d] == expected;
    scalar &= operand.strides[d] == 0;
    expected *= space.sizes[d];
  }
  result.access = flat ? CudaOperand::kFlat : scalar ? CudaOperand::kScalar : CudaOperand::kStrided;
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
  __device__ __forceinline__ T operator[](int i) const { return values[i]; }
};
// Bytes come in pairs: CUDA 12.8 moves arrays of them through local memory.
template <class T, int kCount>
  requires(sizeof(T) == 1 && kCount % 2 == 0)
struct alignas(kCount < 16 ? kCount : 16) Group<T, kCount> {
  uint16_t pairs[kCount / 2];
  __device__ __forceinline__ T operator[](int i) const {
    return static_cast<T>(pairs[i / 2] >> (8 * (i % 2)));
  }
};

template <class T, class Real, int kCount>
__device__ __forceinline__ void unpack(const Group<T, kCount>& group, Real (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = to_real<Real>(group[i]);
}
// Two bfloat16 share a 32-bit word; each is the upper half of a float. In PTX, since C++ would move
// every word between integer and float registers.
template <int kCount>
  requires(kCount % 2 == 0)
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

template <class T, class Real, int kCount>
__device__ __forceinline__ void pack(const Real (&from)[kCount], Group<T, kCount>& group) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) group.values[i] = from_real<T>(from[i]);
}
template <int kCount>
  requires(kCount % 2 == 0)
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
  requires(kCount % 2 == 0)
__device__ __forceinline__ void pack(const float (&from)[kCount], Group<__half, kCount>& group) {
  __half2 pairs[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) pairs[i] = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
  memcpy(&group, pairs, sizeof(pairs));
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

struct Division {
  int64_t quotient, remainder;
};

// The index over the size of dimension d.
__device__ __forceinline__ Division divide(int64_t index, const CudaSpace& space, int d) {
  // The estimate is the quotient or one less.
  int64_t quotient = static_cast<int64_t>(__umul64hi(index, space.reciprocals[d]));
  int64_t remainder = index - quotient * space.sizes[d];
  bool is_less = remainder >= space.sizes[d];
  return {is_less ? quotient + 1 : quotient, is_less ? remainder - space.sizes[d] : remainder};
}

// Where an element lies, and how many from it on lie strides[0] apart.
struct Run {
  int64_t offset, length;
};

__device__ __forceinline__ Run run_of(const CudaOperand& operand, const CudaSpace& space,
                                      int64_t index) {
  if (operand.access == CudaOperand::kFlat) return {index, space.numel - index};
  if (operand.access == CudaOperand::kScalar) return {0, space.numel - index};
  Run run{0, space.sizes[0] - index};
  int last = space.rank - 1;
#pragma unroll 1
  for (int d = 0; d < last; ++d) {
    auto [quotient, remainder] = divide(index, space, d);
    if (d == 0) run.length = space.sizes[0] - remainder;
    run.offset += remainder * operand.strides[d];
    index = quotient;
  }
  run.offset += index * operand.strides[last];
  return run;
}

__device__ __forceinline__ int64_t offset_of(const CudaOperand& operand, const CudaSpace& space,
                                             int64_t index) {
  return run_of(operand, space, index).offset;
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

// Whether there is nothing to do, since the gradient is that of this upstream gradient.
__device__ __forceinline__ bool is_done(TypedPointer unless_one) {
  return unless_one.data != nullptr && load<double>(unless_one, 0) == 1.0;
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

// Groups of kCount neighbouring elements. Whatever has to be decided of an operand is decided once
// a group, or once for each run in it.

// In the place of a type: a dtype known at run time only.
struct Any {};

// Calls f with a pointer of the dtype's type, which is T or float unless T is Any.
template <class T, class F>
__device__ __forceinline__ void with_type_like(Dtype dtype, F f) {
  if constexpr (std::is_same_v<T, Any>) {
    with_type(dtype, f);
  } else if (dtype == Dtype::kFloat32) {
    f(static_cast<float*>(nullptr));
  } else {
    f(static_cast<T*>(nullptr));
  }
}

// A whole group to and from memory that is aligned as it is.
template <class T, class Real, int kCount>
__device__ __forceinline__ void load_whole(const Group<T, kCount>* group,  // [1]
                                           Real (&out)[kCount]) {
  Group<T, kCount> packed = *group;
  unpack(packed, out);
}
template <class T, class Real, int kCount>
__device__ __forceinline__ void store_whole(Group<T, kCount>* group,  // [1]
                                            const Real (&values)[kCount]) {
  Group<T, kCount> packed;
  pack(values, packed);
  *group = packed;
}

// Calls f(offset, begin, end) for each run among the elements first .. first + kCount.
template <int kCount, class F>
__device__ __forceinline__ void for_each_run(const CudaOperand& operand, const CudaSpace& space,
                                             int64_t first, F f) {
  int begin = 0;
#pragma unroll 1
  do {
    Run run = run_of(operand, space, first + begin);
    int end = run.length < kCount - begin ? begin + static_cast<int>(run.length) : kCount;
    f(run.offset, begin, end);
    begin = end;
  } while (begin < kCount);
}

// The same element by element: f(i, memory of element i). Where the elements lie as a Group does,
// calls whole(memory of the group) instead.
template <class T, int kCount, class Whole, class F>
__device__ __forceinline__ void for_each_element(const CudaOperand& operand, int64_t offset,
                                                 int begin, int end, Whole whole, F f) {
  T* data = static_cast<T*>(operand.data) + offset;
  int64_t stride = operand.strides[0];
  if (end - begin == kCount && stride == 1 &&
      reinterpret_cast<uintptr_t>(data) % alignof(Group<T, kCount>) == 0) {
    return whole(reinterpret_cast<Group<T, kCount>*>(data));
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= begin && i < end) {
      f(i, data);
      data += stride;
    }
  }
}

// Elements of any strides, of a dtype as with_type_like takes it.
template <class T, class Real, int kCount>
__device__ __forceinline__ void load_group(const CudaOperand& operand, const CudaSpace& space,
                                           int64_t first, Real (&out)[kCount]) {
  for_each_run<kCount>(operand, space, first, [&](int64_t offset, int begin, int end) {
    with_type_like<T>(operand.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      for_each_element<S, kCount>(
          operand, offset, begin, end,
          [&](const Group<S, kCount>* group) { load_whole(group, out); },
          [&](int i, const S* element) { out[i] = to_real<Real>(*element); });
    });
  });
}

template <class T, class Real, int kCount>
__device__ __forceinline__ void store_group(const CudaOperand& operand, const CudaSpace& space,
                                            int64_t first, const Real (&values)[kCount]) {
  for_each_run<kCount>(operand, space, first, [&](int64_t offset, int begin, int end) {
    with_type_like<T>(operand.dtype, [&](auto* type) {
      using S = std::remove_pointer_t<decltype(type)>;
      if constexpr (!std::is_integral_v<S>) {
        for_each_element<S, kCount>(
            operand, offset, begin, end,
            [&](Group<S, kCount>* group) { store_whole(group, values); },
            [&](int i, S* element) { *element = from_real<S>(values[i]); });
      }
    });
  });
}

#endif

}  // namespace fused_ce
