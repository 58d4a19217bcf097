// Softmax cross entropy of rows whose classes lie dense in memory, read once where they fit on
// chip.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "softmax_options.cuh"

namespace fused_ce {
namespace {

// Calls f<kBatch> or f<1> for a thread's vectors.
template <int kBatch, int kStep, class F>
__device__ __forceinline__ void for_vectors(int first, int end, const F& f) {
  int v = first;
#pragma unroll 1
  for (; v + (kBatch - 1) * kStep < end; v += kBatch * kStep) f.template operator()<kBatch>(v);
#pragma unroll 1
  for (; v < end; v += kStep) f.template operator()<1>(v);
}

// Copies to shared memory, and does not wait for it where the device can do that.
__device__ __forceinline__ void copy_async(uint4* to,            // [1] shared
                                           const uint4* from) {  // [1] global
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
#else
  *to = *from;
#endif
}
// Waits for this thread's copies.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The sums of a row, with the largest logit and probability where its kernel finds them.
template <Terms kTerms>
struct SumsAndPeaks : RowSums<float, kTerms> {
  float top, top_target;

  static __device__ __forceinline__ SumsAndPeaks none() {
    return {RowSums<float, kTerms>::none(), -INFINITY, -INFINITY};
  }
  template <int kWidth>
  __device__ __forceinline__ void combine(bool with_coefficients) {
    RowSums<float, kTerms>::template combine<kWidth>(with_coefficients);
    top = largest_of_lanes<kWidth>(top);
    if constexpr (kTerms == Terms::kWeighted) top_target = largest_of_lanes<kWidth>(top_target);
  }
};

// The least of what the threads of a row have found, which the row's first thread gets to know.
template <Scope kScope, int kGroup>
__device__ __forceinline__ int least(int found, int* shared) {  // [1] INT_MAX before
  if constexpr (kScope == Scope::kWarp) {
    return -warp_max<kGroup>(-found);
  } else {
    if (found < INT_MAX) atomicMin(shared, found);
    __syncthreads();
    found = *shared;
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kScope == Scope::kCluster) {
    auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    for (unsigned rank = 0; threadIdx.x == 0 && rank < cluster.num_blocks(); ++rank) {
      int other = *cluster.map_shared_rank(shared, rank);
      found = other < found ? other : found;
    }
  }
#endif
  return found;
}

// Logits whose classes lie dense in memory. `kGroup` threads, of a warp or the block, take a row.
// A row that fits is copied to shared memory as a whole, which keeps many bytes under way without a
// register for any; each thread copies its own vectors of 16 bytes, adds up their sums, and makes
// the gradient of them. A row too large for that is read from memory, and again for the gradient.
// What lies before the first aligned address of a row and after the last whole vector, its threads
// take in turn. Probabilities, of type S, are copied in step with the logits.
template <class T, class S, Scope kScope, int kGroup, bool kGradient, bool kKept, Terms kTerms>
__global__ void __launch_bounds__(kThreads, kTerms == Terms::kWeighted                          ? 2
                                            : kScope == Scope::kWarp && kTerms == Terms::kPlain ? 4
                                                                                                : 3)
    row_kernel(const __grid_constant__ SoftmaxCeParams p, int kept_vectors) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (kScope == Scope::kCluster) return;
#endif
  constexpr bool kPlain = kTerms == Terms::kPlain, kWeighted = kTerms == Terms::kWeighted;
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  constexpr int kCount = 16 / sizeof(T);
  // Vectors that are read, and in plain rows added up, at a time.
  constexpr int kBatch = kWeighted                ? (sizeof(S) > sizeof(T) ? 1 : 2)
                         : kScope == Scope::kWarp ? 16 / kCount
                                                  : 4;
  using Vector = Group<T, kCount>;
  using TargetVector = Group<S, kCount>;
  constexpr int kTargetParts = sizeof(TargetVector) / 16;  // of 16 bytes
  using Sums = std::conditional_t<kPlain, RowSums<float, kTerms>, SumsAndPeaks<kTerms>>;
  extern __shared__ uint4 memory[];  // [groups of a block, logits and probabilities, kept_vectors]
  __shared__ Exchange<Sums> exchange;
  __shared__ int found[2][2];  // of this row or the last one: the largest logit, the probability
  if (kGradient && is_done(p.unless_one)) return;

  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  const float logit_scale = p.in_float.logit_scale;
  const float share = p.in_float.share;
  const int classes = static_cast<int>(p.classes);
  const bool has_probabilities = kWeighted && p.has_probabilities;
  const bool wants_top = !kPlain && (p.prediction.data != nullptr || p.correct.data != nullptr);
  const bool wants_target = has_probabilities && p.correct.data != nullptr;
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
  Vector* kept = reinterpret_cast<Vector*>(memory);
  kept += threadIdx.x / kGroup * (has_probabilities ? 1 + kTargetParts : 1) * kept_vectors;
  TargetVector* kept_targets = reinterpret_cast<TargetVector*>(kept + kept_vectors);
  const bool is_leader = lane == 0 && rank == 0;
  int parity = 0;
  float loss = 0;

  // The rows of a warp go together.
  const int64_t ahead = kGroup < 32 ? threadIdx.x % 32 / kGroup : 0;
  for (int64_t row = first; row - ahead < p.rows.numel; row += step) {
    const bool exists = kGroup >= 32 || row < p.rows.numel;
    RowTarget<float> target{-1, 0, 0, false};
    if (exists) target = load_target<float>(p, row, is_leader);
    const int label = static_cast<int>(target.label);
    bool reads = exists && (target.is_kept || p.reads_all);
    const T* x = static_cast<const T*>(p.input.data);
    T* dx = static_cast<T*>(p.gradient.data);
    if (exists) {
      x += row_offset(p.input, p.rows, row);
      if constexpr (kGradient) dx += row_offset(p.gradient, p.rows, row);
    }
    int head = static_cast<int>(-reinterpret_cast<intptr_t>(x) & 15) / static_cast<int>(sizeof(T));
    if (head > classes) head = classes;
    int vectors = (classes - head) / kCount;
    int extras = classes - vectors * kCount;
    // The vectors of this block.
    int start = 0;
    if constexpr (kScope == Scope::kCluster) {
      int part = (vectors + ranks - 1) / ranks;
      start = part * rank < vectors ? part * rank : vectors;
      vectors = vectors - start < part ? vectors - start : part;
    }
    // The classes that no vector holds: threads of the first block take them in turn.
    if (rank > 0) extras = 0;
    const int gap = classes - extras;  // from those before the vectors to those after
    auto for_extras = [&](const auto& f) {
#pragma unroll 1
      for (int i = lane; i < extras; i += kGroup) f(i < head ? i : gap + i);
    };
    const Vector* from = reinterpret_cast<const Vector*>(x + head) + start;
    int first_class = head + start * kCount;
    const Options<T, S, kTerms> options(p, row);

    // The vectors, from shared memory where they are kept.
    auto logits_at = [&](int v) { return kKept ? kept[v] : from[v]; };
    auto targets_at = [&](int v) {
      return kKept ? kept_targets[v]
                   : load_vector<kCount>(options.probabilities + first_class + v * kCount);
    };
    auto probability_at = [&](int c) {
      return has_probabilities ? to_real<float>(options.probabilities[c]) : 0.0f;
    };
    Sums sums = Sums::none();
    float label_logit = 0;
    Peak peak{-INFINITY, lane}, target_peak = peak;
    // Vectors that have arrived: the one at v and those that follow it.
    auto add = [&]<int kN>(int v, const Vector* raw /* [kN] */,
                           const TargetVector* raw_target /* [kN] */) {
      float logits[kN * kCount];
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        unpack(raw[i], reinterpret_cast<float (&)[kCount]>(logits[i * kCount]));
      }
      if constexpr (kPlain) {
        add_logits(sums, logits, logit_scale, p.has_coefficients);
      } else {
        float top = largest(logits);
        if (wants_top) peak.offer(top, v);
        float b[kN * kCount] = {};
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          auto& of_vector = reinterpret_cast<float (&)[kCount]>(b[i * kCount]);
          if (has_probabilities) unpack(raw_target[i], of_vector);
          if (wants_target) target_peak.offer(largest(of_vector), v + i * kGroup);
          if (kWeighted) {
            options.weigh(of_vector, first_class + (v + i * kGroup) * kCount);
          }
        }
        options.add(logits, b, top, sums);
      }
    };
    auto read = [&]<int kN>(int v) {
      Vector raw[kN];
      TargetVector raw_target[kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        raw[i] = logits_at(v + i * kGroup);
        if (has_probabilities) raw_target[i] = targets_at(v + i * kGroup);
      }
      constexpr int kMost = (kWeighted || kScope == Scope::kCluster ? 8 : 16) / kCount;
      constexpr int kAtOnce = kPlain || kN < kMost ? kN : kMost;
#pragma unroll
      for (int i = 0; i < kN; i += kAtOnce) {
        add.template operator()<kAtOnce>(v + i * kGroup, raw + i, raw_target + i);
      }
    };
    if (reads) {
      if constexpr (kKept) {
        auto* slots = reinterpret_cast<uint4*>(kept);
#pragma unroll 4
        for (int v = lane; v < vectors; v += kGroup) {
          copy_async(slots + v, reinterpret_cast<const uint4*>(from) + v);
        }
        for (int v = lane; has_probabilities && v < vectors; v += kGroup) {
          const S* of_vector = options.probabilities + first_class + v * kCount;
          if (holds_vector<TargetVector>(of_vector)) {
            auto* to = reinterpret_cast<uint4*>(kept_targets + v);
#pragma unroll
            for (int i = 0; i < kTargetParts; ++i) {
              copy_async(to + i, reinterpret_cast<const uint4*>(of_vector) + i);
            }
          } else {
            kept_targets[v] = load_vector<kCount>(of_vector);
          }
        }
      }
      if (target.is_kept && label >= 0) label_logit = to_real<float>(x[label]);
      for_extras([&](int c) {
        float logit[1] = {to_real<float>(x[c])};
        if constexpr (kPlain) {
          add_logits(sums, logit, logit_scale, p.has_coefficients);
        } else {
          float b[1] = {probability_at(c)};
          const float top = logit[0];
          sums.top = larger(sums.top, top);
          sums.top_target = larger(sums.top_target, b[0]);
          if (kWeighted) options.weigh(b, c);
          options.add(logit, b, top, sums);
        }
      });
      if constexpr (kKept) wait_for_copies();
      for_vectors<kBatch, kGroup>(lane, vectors, read);
      if constexpr (!kPlain) {
        sums.top = larger(sums.top, peak.value);
        sums.top_target = larger(sums.top_target, target_peak.value);
        if (kScope != Scope::kWarp && threadIdx.x == 0) {
          found[parity][0] = found[parity][1] = INT_MAX;
        }
      }
    }
    if (reads || kGroup < 32) {
      combine<kScope, kGroup>(sums, exchange, parity, p.has_coefficients);
    }
    int predicted = 0, right = label;
    if constexpr (!kPlain) {
      // The row's first class of those whose values are the largest.
      auto find = [&](const auto& vector_at, const auto& value_at, const Peak& peak, float top,
                      int* shared) {
        int c = INT_MAX;
        for_extras([&](int extra) {
          if (reads && extra < c && Peak::is(value_at(extra), top)) c = extra;
        });
        bool is_searching = Peak::is(peak.value, top);
#pragma unroll 1
        for (int v = peak.place; is_searching && v < vectors; v += kGroup) {
          float values[kCount];
          unpack(vector_at(v), values);
          int at = first_class + v * kCount;
#pragma unroll
          for (int i = kCount - 1; i >= 0; --i) {
            if (!Peak::is(values[i], top)) continue;
            c = at + i < c ? at + i : c;
            is_searching = false;
          }
        }
        return least<kScope, kGroup>(c, shared);
      };
      if (wants_top) {
        auto logit_at = [&](int c) { return to_real<float>(x[c]); };
        predicted = find(logits_at, logit_at, peak, sums.top, found[parity]);
      }
      if (wants_target) {
        right = find(targets_at, probability_at, target_peak, sums.top_target, found[parity] + 1);
      }
    }
    if (reads) parity ^= 1;  // with the barriers, which rows that are not read pass by
    if constexpr (!kWeighted) {
      sums.coefficients *= share;
      sums.cost *= share;
    }
    SoftmaxRow<float> result{};
    if (reads && (kGradient || is_leader)) {
      float logit = kPlain ? label_logit * logit_scale : options.value_of(label_logit);
      result = row_result(p, target, sums, logit, is_leader);
    }
    if (!exists) continue;
    if (is_leader) {
      loss += result.loss;
      store_result(p, row, result);
      if constexpr (!kPlain) store_prediction(p, row, predicted, right, target.is_kept);
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
        for_extras([&](int c) { dx[c] = from_real<T>(0.0f); });
        for (int v = lane; v < vectors; v += kGroup) {
          if (aligned) {
            store_vector.template operator()<true>(v, Vector{});
          } else {
            store_vector.template operator()<false>(v, Vector{});
          }
        }
        continue;
      }
      auto g = row_gradient(p, row, target, sums, result, scale);
      g = {g.exponential * logit_scale, g.entropy * logit_scale, g.coefficient * logit_scale,
           g.label * logit_scale};
      const float shift = share == 0 ? 0.0f : -g.coefficient * share;
      // Of classes from c on, in the place of logits; b holds their probabilities.
      auto differentiate = [&]<int kN>(float (&logits)[kN], float (&b)[kN], int c, float of_label) {
        if constexpr (kPlain) {
#pragma unroll
          for (int i = 0; i < kN; ++i) {
            float shifted = fmaf(logits[i], logit_scale, -sums.reference);
            logits[i] = fmaf(math::exp_shifted<kPrecision>(shifted), g.exponential, shift);
            if constexpr (kN == 1) logits[i] -= of_label;
          }
        } else {
          if (kWeighted) options.weigh(b, c);
          options.differentiate(logits, b, sums.reference, g, of_label);
        }
      };
      auto write_one = [&](int c, float logit, float probability, float of_label) {
        float value[1] = {logit}, b[1] = {probability};
        differentiate(value, b, c, of_label);
        dx[c] = from_real<T>(value[0]);
      };
      auto write = [&]<bool kAligned, int kN>(int v) {
        Vector raw[kN];
        TargetVector raw_target[kN];
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          raw[i] = logits_at(v + i * kGroup);
          if (has_probabilities) raw_target[i] = targets_at(v + i * kGroup);
        }
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          float values[kCount], b[kCount] = {};
          unpack(raw[i], values);
          if (has_probabilities) unpack(raw_target[i], b);
          differentiate(values, b, first_class + (v + i * kGroup) * kCount, 0.0f);
          pack(values, raw[i]);
          store_vector.template operator()<kAligned>(v + i * kGroup, raw[i]);
        }
      };
      for_extras([&](int c) { write_one(c, to_real<float>(x[c]), probability_at(c), 0.0f); });
      if (aligned) {
        for_vectors<kBatch, kGroup>(lane, vectors,
                                    [&]<int kN>(int v) { write.template operator()<true, kN>(v); });
      } else {
        for_vectors<kBatch, kGroup>(
            lane, vectors, [&]<int kN>(int v) { write.template operator()<false, kN>(v); });
      }
      // The label's class once more, by the thread that has written it.
      int label_vector = label < first_class ? -1 : (label - first_class) / kCount;
      bool is_extra = extras > 0 && (label < head || label >= gap + head);
      int place = !is_extra ? label_vector : label < head ? label : label - gap;
      bool is_mine =
          (is_extra || (place >= 0 && place < vectors)) && (place & (kGroup - 1)) == lane;
      if (label >= 0 && is_mine) write_one(label, label_logit, 0.0f, g.label);
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
  config.gridDim = dim3(resident_blocks(kernel, plan));
  cudaLaunchKernelEx(&config, kernel, p, plan.kept_vectors);
}

template <class T, class S, Scope kScope, int kGroup, Terms kTerms>
void launch_rows(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  auto launch = [&]<bool kGradient, bool kKept>() {
    launch_row(row_kernel<T, S, kScope, kGroup, kGradient, kKept, kTerms>, p, plan, stream);
  };
  const bool has_gradient = p.gradient.data != nullptr;
  if constexpr (kScope == Scope::kCluster) {
    launch.template operator()<true, true>();
  } else if (kScope == Scope::kWarp || plan.kept_vectors > 0) {
    if (has_gradient) {
      launch.template operator()<true, true>();
    } else {
      launch.template operator()<false, true>();
    }
  } else if constexpr (kScope == Scope::kBlock) {
    if (has_gradient) {
      launch.template operator()<true, false>();
    } else {
      launch.template operator()<false, false>();
    }
  }
}

template <class T, class S, Terms kTerms>
void launch_rows(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  switch (plan.kernel) {
    case SoftmaxCePlan::kWarp:
      if constexpr (kTerms == Terms::kPlain) {
        if (plan.group == 8) return launch_rows<T, S, Scope::kWarp, 8, kTerms>(p, plan, stream);
      }
      return launch_rows<T, S, Scope::kWarp, 32, kTerms>(p, plan, stream);
    case SoftmaxCePlan::kBlock:
      return launch_rows<T, S, Scope::kBlock, kThreads, kTerms>(p, plan, stream);
    default:
      return launch_rows<T, S, Scope::kCluster, kThreads, kTerms>(p, plan, stream);
  }
}

template <class T>
void launch_rows(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  if (plan.terms == Terms::kPlain) {
    launch_rows<T, T, Terms::kPlain>(p, plan, stream);
  } else if (plan.terms == Terms::kStatistics) {
    launch_rows<T, T, Terms::kStatistics>(p, plan, stream);
  } else if (p.has_probabilities && p.target.dtype == Dtype::kFloat32) {
    launch_rows<T, float, Terms::kWeighted>(p, plan, stream);
  } else {
    launch_rows<T, T, Terms::kWeighted>(p, plan, stream);
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
