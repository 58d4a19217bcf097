// Sums over a block and over all blocks, in an order that depends on nothing but their number.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "limits.h"

namespace fused_ce {

constexpr int kWarps = kThreads / 32;

// The value of the lane whose number differs by `kDistance` alone, a power of two.
template <int kDistance, class T>
__device__ __forceinline__ T from_lane(T value) {
  if constexpr (std::is_same_v<T, float>) {
    // Without moving the value between float and integer registers, which is a noticeable part of
    // what a thread does besides its elements.
    float other;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;"
                 : "=f"(other)
                 : "f"(value), "n"(kDistance));
    return other;
  } else {
    return __shfl_xor_sync(0xffffffffu, value, kDistance);
  }
}

// A sum of sums of pairs: its rounding grows with the logarithm of the number of terms alone.
template <int kCount, class T>
__device__ __forceinline__ T pairwise_sum(T (&terms)[kCount]) {  // [kCount] overwritten
#pragma unroll
  for (int width = 1; width < kCount; width *= 2) {
#pragma unroll
    for (int i = 0; i + width < kCount; i += 2 * width) terms[i] += terms[i + width];
  }
  return terms[0];
}

// The sum and the largest over `kWidth` neighbouring lanes, in all of them.
template <int kWidth = 32, class T>
__device__ __forceinline__ T warp_sum(T value) {
  if constexpr (kWidth > 1) {
    return warp_sum<kWidth / 2>(value + from_lane<kWidth / 2>(value));
  } else {
    return value;
  }
}
template <int kWidth = 32, class T>
__device__ __forceinline__ T warp_max(T value) {
  if constexpr (kWidth > 1) {
    T other = from_lane<kWidth / 2>(value);
    return warp_max<kWidth / 2>(other > value ? other : value);
  } else {
    return value;
  }
}

// The sum over the block of each thread's value, in every thread. Sum is the type of the warps'
// sums.
template <class Sum, class T>
__device__ __forceinline__ Sum block_sum(T value) {
  __shared__ Sum warps[kWarps];
  T warp = warp_sum(value);
  __syncthreads();  // an earlier call's reads are over
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = static_cast<Sum>(warp);
  __syncthreads();
  Sum sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += warps[i];
  return sum;
}

// Adds up one value of each thread of the grid. Returns true, with the sum, to every thread of the
// block that ends last. `ticket` must be 0 before the launch.
template <class T>
__device__ __forceinline__ bool grid_sum(T value, double* sums,  // [gridDim.x]
                                         unsigned* ticket,       // [1]
                                         double& sum) {
  __shared__ double warps[kWarps];
  __shared__ bool is_last;
  T warp = warp_sum(value);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = static_cast<double>(warp);
  __syncthreads();
  if (threadIdx.x == 0) {
    double block = 0;
    for (int i = 0; i < kWarps; ++i) block += warps[i];
    sums[blockIdx.x] = block;
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return false;
  __threadfence();
  double mine = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) mine += __ldcg(sums + i);
  sum = block_sum<double>(mine);
  return true;
}

}  // namespace fused_ce
