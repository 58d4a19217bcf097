// Softmax cross entropy of rows whose classes lie dense in memory, read once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "softmax_row.cuh"

namespace fused_ce {
namespace {

// Whether there is a gradient, and if so what it is made of: logits kept in shared memory, or read
// again.
enum class Pass { kForward, kKept, kReread };

// Calls f<kBatch> or f<1> for a thread's vectors.
template <int kBatch, int kStep, class F>
__device__ __forceinline__ void for_vectors(int first, int end, const F& f) {
  int v = first;
#pragma unroll 1
  for (; v + (kBatch - 1) * kStep < end; v += kBatch * kStep) f.template operator()<kBatch>(v);
#pragma unroll 1
  for (; v < end; v += kStep) f.template operator()<1>(v);
}

// Logits whose classes lie dense in memory, with labels. The threads of a row read it once, in
// vectors of 16 bytes, add up its sums as the vectors arrive, and keep them in shared memory, each
// thread its own; the gradient is then made of these. A row too large for that is read again. What
// lies before the first aligned address of a row and after the last whole vector, a thread each
// takes.
template <class T, Scope kScope, Pass kPass>
__global__ void __launch_bounds__(kThreads, kScope == Scope::kWarp ? 4 : 3)
    row_kernel(const __grid_constant__ SoftmaxCeParams p, int kept_vectors) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (kScope == Scope::kCluster) return;
#endif
  constexpr bool kGradient = kPass != Pass::kForward;
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  constexpr int kCount = 16 / sizeof(T);
  constexpr int kBatch = kScope == Scope::kWarp ? 2 : 4;  // vectors in flight
  using Vector = Group<T, kCount>;
  using Sums = RowSums<float, false>;
  extern __shared__ uint4 memory[];  // [groups of a block, kept_vectors]
  __shared__ Exchange<Sums> exchange;

  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  const float logit_scale = p.in_float.logit_scale;
  const float share = p.in_float.share;
  const int classes = static_cast<int>(p.classes);
  constexpr int kGroup = kScope == Scope::kWarp ? 32 : kThreads;
  constexpr int kGroups = kThreads / kGroup;
  int rank = 0, ranks = 1;
  int64_t first = blockIdx.x, step = gridDim.x;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kScope == Scope::kCluster) {
    auto cluster = cooperative_groups::this_cluster();
    rank = cluster.block_rank();
    ranks = cluster.num_blocks();
    first /= ranks;
    step /= ranks;
  }
#endif
  first = first * kGroups + threadIdx.x / kGroup;
  step *= kGroups;
  const int lane = threadIdx.x % kGroup;
  Vector* kept = reinterpret_cast<Vector*>(memory) + threadIdx.x / kGroup * kept_vectors;
  bool is_leader = lane == 0 && rank == 0;
  int parity = 0;
  float loss = 0;

  for (int64_t row = first; row < p.rows.numel; row += step) {
    RowTarget<float> target = load_target<float>(p, row);
    const int label = static_cast<int>(target.label);
    bool reads = target.is_kept || p.reads_all;
    const T* x = static_cast<const T*>(p.input.data);
    T* dx = static_cast<T*>(p.gradient.data);
    x += row_offset(p.input, p.rows, row);
    if constexpr (kGradient) dx += row_offset(p.gradient, p.rows, row);
    int head = static_cast<int>(-reinterpret_cast<intptr_t>(x) & 15) / static_cast<int>(sizeof(T));
    if (head > classes) head = classes;
    int vectors = (classes - head) / kCount;
    int extras = classes - vectors * kCount;
    // The vectors of this block, and the single class of this thread.
    int start = 0;
    if constexpr (kScope == Scope::kCluster) {
      int part = (vectors + ranks - 1) / ranks;
      start = part * rank < vectors ? part * rank : vectors;
      vectors = vectors - start < part ? vectors - start : part;
    }
    int single = -1;
    if (rank == 0 && lane < extras) single = lane < head ? lane : classes - extras + lane;
    const Vector* from = reinterpret_cast<const Vector*>(x + head) + start;
    int first_class = head + start * kCount;

    Sums sums = Sums::none();
    float label_logit = 0, single_logit = 0;
    auto read = [&]<int kN>(int v) {
      Vector raw[kN];
      float logits[kN * kCount];
#pragma unroll
      for (int i = 0; i < kN; ++i) raw[i] = from[v + i * kGroup];
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        if constexpr (kPass == Pass::kKept) kept[v + i * kGroup] = raw[i];
        unpack(raw[i], reinterpret_cast<float (&)[kCount]>(logits[i * kCount]));
      }
      sums.add(logits, logit_scale, p.has_coefficients);
    };
    if (reads) {
      if (target.is_kept && label >= 0) label_logit = to_real<float>(x[label]);
      if (single >= 0) {
        single_logit = to_real<float>(x[single]);
        sums.add(reinterpret_cast<float (&)[1]>(single_logit), logit_scale, p.has_coefficients);
      }
      for_vectors<kBatch, kGroup>(lane, vectors, read);
      combine<kScope>(sums, exchange, parity, p.has_coefficients);
      parity ^= 1;
    }
    if (reads) {
      sums.coefficients *= share;
      sums.weighted *= share;
    }
    if (is_leader) {
      RowResult<float> result{};
      if (reads) result = row_result(p, target, sums, label_logit * logit_scale);
      loss += result.loss;
      store_result(p, row, result);
    }

    if constexpr (kGradient) {
      Vector* to = reinterpret_cast<Vector*>(dx + head) + start;
      const bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0;
      auto store_vector = [&]<bool kAligned>(int v, const Vector& vector) {
        if constexpr (kAligned) {
          to[v] = vector;
        } else {
#pragma unroll
          for (int i = 0; i < kCount; ++i) reinterpret_cast<T*>(to + v)[i] = vector.values[i];
        }
      };
      if (!reads || !has_gradient(p, target)) {
        if (single >= 0) dx[single] = from_real<T>(0.0f);
        for (int v = lane; v < vectors; v += kGroup) {
          if (aligned) {
            store_vector.template operator()<true>(v, Vector{});
          } else {
            store_vector.template operator()<false>(v, Vector{});
          }
        }
        continue;
      }
      RowGradient<float> g = row_gradient(p, row, target, sums, scale);
      const float factor = g.exponential * logit_scale;
      const float shift = share == 0 ? 0.0f : -g.coefficient * share * logit_scale;
      auto gradient_of = [&](float logit) {
        float e = math::exp_shifted<kPrecision>(fmaf(logit, logit_scale, -sums.reference));
        return fmaf(e, factor, shift);
      };
      auto write = [&]<bool kAligned, int kN>(int v) {
        Vector raw[kN];
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          raw[i] = kPass == Pass::kKept ? kept[v + i * kGroup] : from[v + i * kGroup];
        }
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          float values[kCount];
          unpack(raw[i], values);
#pragma unroll
          for (int j = 0; j < kCount; ++j) values[j] = gradient_of(values[j]);
          pack(values, raw[i]);
          store_vector.template operator()<kAligned>(v + i * kGroup, raw[i]);
        }
      };
      if (single >= 0) dx[single] = from_real<T>(gradient_of(single_logit));
      if (aligned) {
        for_vectors<kBatch, kGroup>(lane, vectors,
                                    [&]<int kN>(int v) { write.template operator()<true, kN>(v); });
      } else {
        for_vectors<kBatch, kGroup>(
            lane, vectors, [&]<int kN>(int v) { write.template operator()<false, kN>(v); });
      }
      // The label's class once more, by the thread that has written it.
      int label_vector = label < first_class ? -1 : (label - first_class) / kCount;
      bool is_mine = label_vector < 0 || label_vector >= vectors
                         ? single == label
                         : (label_vector & (kGroup - 1)) == lane;
      if (label >= 0 && is_mine) {
        dx[label] = from_real<T>(gradient_of(label_logit) - g.label * logit_scale);
      }
    }
  }

  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kScope == Scope::kCluster) cooperative_groups::this_cluster().sync();
#endif
}

template <class Kernel>
void launch_row(Kernel kernel, const SoftmaxCeParams& p, const SoftmaxCePlan& plan,
                cudaStream_t stream) {
  if (plan.shared_bytes > 40 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = plan.cluster > 1;
  cudaLaunchKernelEx(&config, kernel, p, plan.kept_vectors);
}

template <class T, Scope kScope>
void launch_rows(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  if (p.gradient.data == nullptr) {
    if constexpr (kScope != Scope::kCluster) {
      launch_row(row_kernel<T, kScope, Pass::kForward>, p, plan, stream);
    }
  } else if (plan.kept_vectors > 0) {
    launch_row(row_kernel<T, kScope, Pass::kKept>, p, plan, stream);
  } else {
    if constexpr (kScope == Scope::kBlock) {
      launch_row(row_kernel<T, kScope, Pass::kReread>, p, plan, stream);
    }
  }
}

template <class T>
void launch_rows(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  switch (plan.kernel) {
    case SoftmaxCePlan::kWarp:
      return launch_rows<T, Scope::kWarp>(p, plan, stream);
    case SoftmaxCePlan::kBlock:
      return launch_rows<T, Scope::kBlock>(p, plan, stream);
    default:
      return launch_rows<T, Scope::kCluster>(p, plan, stream);
  }
}

}  // namespace

void launch_softmax_ce_rows(const SoftmaxCeParams& p, const SoftmaxCePlan& plan,
                            cudaStream_t stream) {
  switch (p.input.dtype) {
    case Dtype::kBFloat16:
      return launch_rows<__nv_bfloat16>(p, plan, stream);
    case Dtype::kFloat16:
      return launch_rows<__half>(p, plan, stream);
    default:
      return launch_rows<float>(p, plan, stream);
  }
}

}  // namespace fused_ce
