// Multiplies a gradient by a scalar that lies on the device, in place.
#include "reduce.cuh"
#include "scale_kernel.h"

namespace fused_ce {
namespace {

template <class Real>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
  Real scale = load<Real>(p.scale, 0);
  if (scale == Real(1)) return;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.space.numel;
       i += step) {
    store(p.values, p.space, i, load<Real>(p.values, p.space, i) * scale);
  }
}

// The same where the values lie dense and aligned.
template <class T>
__global__ void __launch_bounds__(kThreads)
    flat_scale_kernel(const __grid_constant__ ScaleParams p) {
  constexpr int kCount = 16 / sizeof(T);
  float scale = load<float>(p.scale, 0);
  if (scale == 1.0f) return;
  auto* groups = static_cast<Group<T, kCount>*>(p.values.data);
  int64_t count = p.space.numel / kCount;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t at = first; at < count; at += step) {
    Group<T, kCount> group = groups[at];
    float values[kCount];
    unpack(group, values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= scale;
    pack(values, group);
    groups[at] = group;
  }
  int64_t tail = count * kCount + first;
  if (tail < p.space.numel) {
    T* value = static_cast<T*>(p.values.data) + tail;
    *value = from_real<T>(to_real<float>(*value) * scale);
  }
}

}  // namespace

void launch_scale(const ScaleParams& params, int multiprocessors, cudaStream_t stream) {
  int64_t wanted = (params.space.numel + kThreads * 8 - 1) / (kThreads * 8);
  if (wanted == 0) return;
  int blocks = static_cast<int>(wanted < 8 * multiprocessors ? wanted : 8 * multiprocessors);
  bool flat = params.values.access == CudaOperand::kFlat && params.values.aligned;
  if (params.values.dtype == Dtype::kFloat64) {
    scale_kernel<double><<<blocks, kThreads, 0, stream>>>(params);
  } else if (!flat) {
    scale_kernel<float><<<blocks, kThreads, 0, stream>>>(params);
  } else if (params.values.dtype == Dtype::kFloat32) {
    flat_scale_kernel<float><<<blocks, kThreads, 0, stream>>>(params);
  } else if (params.values.dtype == Dtype::kFloat16) {
    flat_scale_kernel<__half><<<blocks, kThreads, 0, stream>>>(params);
  } else {
    flat_scale_kernel<__nv_bfloat16><<<blocks, kThreads, 0, stream>>>(params);
  }
}

}  // namespace fused_ce
