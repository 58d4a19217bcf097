// Softmax cross entropy on CUDA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../math.h"
#include "operand.cuh"
#include "reduce.cuh"
#include "softmax_ce_kernel.h"
#include "softmax_row.cuh"

namespace fused_ce {
namespace {

// Resets the ticket, and sums the weights of the labels that are not ignored where a mean needs
// that.
template <bool kPlain>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ SoftmaxCeParams p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.workspace.ticket = 0;
  if (!p.sums_weights) return;
  double weights = 0;
  int kept = 0;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if constexpr (kPlain) {
    constexpr int kBatch = 8;
    const int64_t* labels = static_cast<const int64_t*>(p.target.data);
    auto count = [&](int64_t label) { kept += label != p.ignore_index; };
    int64_t at = static_cast<int64_t>(blockIdx.x) * kBatch * kThreads + threadIdx.x;
    int64_t batches = p.rows.numel / (kBatch * kThreads);
    for (int64_t batch = blockIdx.x; batch < batches; batch += gridDim.x) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) count(labels[at + i * kThreads]);
      at += kBatch * step;
    }
    for (row += batches * kBatch * kThreads; row < p.rows.numel; row += step) count(labels[row]);
  } else {
    for (; row < p.rows.numel; row += step) {
      int64_t label = load_label(p.target.data, p.target.dtype, offset_of(p.target, p.rows, row));
      if (label == p.ignore_index) continue;
      if (p.weight.data == nullptr) {
        ++kept;
      } else if (static_cast<uint64_t>(label) < static_cast<uint64_t>(p.classes)) {
        weights += load<double>(p.weight, label * p.weight_stride);
      }
    }
  }
  double sum = block_sum<double>(weights + kept);
  if (threadIdx.x == 0) p.workspace.weights[blockIdx.x] = sum;
}

template <class Real>
__device__ __forceinline__ void reduce_loss(const SoftmaxCeParams& p, Real loss,
                                            const Scale& scale) {
  double total;
  if (grid_sum(loss, p.workspace.sums, p.workspace.ticket, total) && threadIdx.x == 0) {
    store(p.loss_scalar, 0,
          scale.denominator == 0 ? total * scale.inverse : total / scale.denominator);
  }
}

// Any dtypes, strides and options. A row has `group` threads, 1, 32 or all of the block: it is read
// once for its sums, and again, from cache, for its gradient.
template <class Real>
struct GeneralRow {
  const SoftmaxCeParams& p;
  int64_t input, target, gradient;  // offsets

  struct Logit {
    Real raw;  // before the cap
    Real value;
    Real slope;  // d value / d input
  };
  __device__ __forceinline__ Logit logit(int64_t c) const {
    Real x = load<Real>(TypedPointer{p.input.data, p.input.dtype}, input + c * p.input_stride);
    const auto& k = constants<Real>(p);
    Logit l{x * k.logit_scale, x * k.logit_scale, k.logit_scale};
    if (k.softcap != 0) {
      Real t = math::tanh(l.raw * k.inverse_softcap);
      l.value = k.softcap * t;
      l.slope = k.logit_scale * (1 - t * t);
    }
    return l;
  }
  __device__ __forceinline__ Real probability(int64_t c) const {
    return load<Real>(TypedPointer{p.target.data, p.target.dtype}, target + c * p.target_stride);
  }
  __device__ __forceinline__ Real coefficient(int64_t c) const {
    const auto& k = constants<Real>(p);
    Real b = p.has_probabilities ? probability(c) * k.keep + k.share : k.share;
    return p.weight.data == nullptr ? b : b * load<Real>(p.weight, c * p.weight_stride);
  }
};

template <class Real>
__global__ void __launch_bounds__(kThreads, 2)
    general_kernel(const __grid_constant__ SoftmaxCeParams p, int group) {
  using Row = GeneralRow<Real>;
  using Sums = RowSums<Real, true>;
  struct Shared {
    Sums sums;
    Largest<Real> top, top_target;
  };
  __shared__ Shared shared[2][kWarps];
  const Scale factors = load_scale(p);
  const Real scale = static_cast<Real>(factors.inverse);
  Real loss = 0;
  int lane = threadIdx.x & (group - 1);
  int groups = kThreads / group;
  bool wants_top = p.prediction.data != nullptr || p.correct.data != nullptr;
  bool wants_target = p.correct.data != nullptr && p.has_probabilities;
  bool wants_entropy = p.entropy.data != nullptr || p.grad_entropy.data != nullptr;
  int parity = 0;

  int64_t step = static_cast<int64_t>(gridDim.x) * groups;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * groups; first < p.rows.numel;
       first += step) {
    int64_t row = first + threadIdx.x / group;
    bool exists = row < p.rows.numel;
    Row r{p, 0, 0, 0};
    RowTarget<Real> target{-1, 0, 0, false};
    Real label_logit = 0;
    if (exists) {
      target = load_target<Real>(p, row);
      r.input = offset_of(p.input, p.rows, row);
      if (p.has_probabilities) r.target = offset_of(p.target, p.rows, row);
      if (p.gradient.data != nullptr) r.gradient = offset_of(p.gradient, p.rows, row);
      if (target.is_kept && target.label >= 0) label_logit = r.logit(target.label).value;
    }
    bool reads = exists && (target.is_kept || p.reads_all);

    Sums sums = Sums::none();
    auto top = Largest<Real>::none(), top_target = top;
#pragma unroll 1
    for (int64_t c = lane; reads && c < p.classes; c += group) {
      auto l = r.logit(c);
      sums.admit(l.value);
      Real shifted = l.value - sums.reference;
      Real e = Sums::exponential(shifted);
      sums.exponentials += e;
      if (wants_entropy) sums.entropy += e == 0 ? e : e * shifted;
      if (p.has_coefficients) {
        Real b = r.coefficient(c);
        sums.coefficients += b;
        sums.weighted += b * shifted;
      }
      if (wants_top) top.offer(l.raw, c);
      if (wants_target) top_target.offer(r.probability(c), c);
    }

    auto combine = [&]<int kWidth>() {
      sums.template combine<kWidth>(p.has_coefficients);
      if (wants_top) top.template combine<kWidth>();
      if (wants_target) top_target.template combine<kWidth>();
    };
    if (group > 1) combine.template operator()<32>();
    __syncwarp();  // a lane may have read the label's logit, which another overwrites
    if (group > 32) {
      Shared* mine = shared[parity];
      parity ^= 1;
      if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = {sums, top, top_target};
      __syncthreads();
      Shared other = mine[threadIdx.x % kWarps];
      sums = other.sums;
      top = other.top;
      top_target = other.top_target;
      combine.template operator()<kWarps>();
    }

    if (!exists) continue;
    RowResult<Real> result{};
    if (reads) result = row_result(p, target, sums, label_logit);
    if (lane == 0) {
      loss += result.loss;
      store_result(p, row, result);
      if (p.prediction.data != nullptr) {
        static_cast<int64_t*>(p.prediction.data)[offset_of(p.prediction, p.rows, row)] = top.index;
      }
      if (p.correct.data != nullptr) {
        int64_t wanted = p.has_probabilities ? top_target.index : target.label;
        static_cast<bool*>(p.correct.data)[offset_of(p.correct, p.rows, row)] =
            target.is_kept && wanted == top.index;
      }
    }
    if (p.gradient.data == nullptr) continue;
    RowGradient<Real> g{};
    reads = reads && has_gradient(p, target);
    if (reads) g = row_gradient(p, row, target, sums, scale);
    TypedPointer to{p.gradient.data, p.gradient.dtype};
#pragma unroll 1
    for (int64_t c = lane; c < p.classes; c += group) {
      Real value = 0;
      if (reads) {
        auto l = r.logit(c);
        Real shifted = l.value - sums.reference;
        Real e = math::exp_shifted<Precision::kFull>(shifted);
        value = e * g.exponential;
        if (g.entropy != 0 && e != 0) value += e * g.entropy * (shifted + g.shift);
        if (target.is_kept && p.has_coefficients) value -= g.coefficient * r.coefficient(c);
        if (target.is_kept && c == target.label) value -= g.label;
        value *= l.slope;
      }
      store(to, r.gradient + c * p.gradient_stride, value);
    }
  }

  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
}

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
    x += offset_of(p.input, p.rows, row);
    if constexpr (kGradient) dx += offset_of(p.gradient, p.rows, row);
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

// Classes that lie apart: a thread takes a row, and its neighbours' rows lie beside it. The second
// read, for the gradient, comes from cache.
template <class T, bool kGradient>
__global__ void __launch_bounds__(kThreads, 4)
    spread_kernel(const __grid_constant__ SoftmaxCeParams p) {
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  const float logit_scale = p.in_float.logit_scale;
  const float share = p.in_float.share;
  float loss = 0;

  // Calls f<8>, f<4> or f<1> for successive classes.
  auto for_classes = [&](const auto& f) {
    int64_t c = 0;
#pragma unroll 1
    for (; c + 8 <= p.classes; c += 8) f.template operator()<8>(c);
    if (c + 4 <= p.classes) f.template operator()<4>(c), c += 4;
#pragma unroll 1
    for (; c < p.classes; ++c) f.template operator()<1>(c);
  };

  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < p.rows.numel;
       row += step) {
    RowTarget<float> target = load_target<float>(p, row);
    bool reads = target.is_kept || p.reads_all;
    const T* x = static_cast<const T*>(p.input.data) + offset_of(p.input, p.rows, row);
    RowSums<float, false> sums = RowSums<float, false>::none();
    RowResult<float> result{};
    float label_logit = 0;
    if (reads) {
      for_classes([&]<int kN>(int64_t c) {
        float logits[kN];
#pragma unroll
        for (int i = 0; i < kN; ++i) logits[i] = to_real<float>(x[(c + i) * p.input_stride]);
        sums.add(logits, logit_scale, p.has_coefficients);
      });
      sums.coefficients *= share;
      sums.weighted *= share;
      if (target.label >= 0) {
        label_logit = to_real<float>(x[target.label * p.input_stride]) * logit_scale;
      }
      result = row_result(p, target, sums, label_logit);
    }
    loss += result.loss;
    store_result(p, row, result);

    if constexpr (kGradient) {
      T* dx = static_cast<T*>(p.gradient.data) + offset_of(p.gradient, p.rows, row);
      if (!reads || !has_gradient(p, target)) {
        for (int64_t c = 0; c < p.classes; ++c) dx[c * p.gradient_stride] = from_real<T>(0.0f);
        continue;
      }
      RowGradient<float> g = row_gradient(p, row, target, sums, scale);
      const float factor = g.exponential * logit_scale;
      const float shift = share == 0 ? 0.0f : -g.coefficient * share * logit_scale;
      for_classes([&]<int kN>(int64_t c) {
        float values[kN];
#pragma unroll
        for (int i = 0; i < kN; ++i) values[i] = to_real<float>(x[(c + i) * p.input_stride]);
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          float shifted = fmaf(values[i], logit_scale, -sums.reference);
          dx[(c + i) * p.gradient_stride] =
              from_real<T>(fmaf(math::exp_shifted<kPrecision>(shifted), factor, shift));
        }
      });
      if (target.label >= 0) {
        float e = math::exp_shifted<kPrecision>(label_logit - sums.reference);
        dx[target.label * p.gradient_stride] =
            from_real<T>(fmaf(e, factor, shift) - g.label * logit_scale);
      }
    }
  }
  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
}

// A few classes, dense in memory from row to row: blocks copy rows to shared memory and gradients
// back in vectors of 16 bytes, and kGroup lanes take a row in between, each up to kPerLane of its
// classes, which stay in registers. kFewest of these there are for certain.
template <class T, bool kGradient, bool kPlain, int kGroup, int kPerLane, int kFewest>
__global__ void __launch_bounds__(kThreads, kPerLane <= 16 ? 3 : 2)
    few_kernel(const __grid_constant__ SoftmaxCeParams p, bool aligned) {
  constexpr int kCount = 16 / sizeof(T);
  constexpr int kVectors = (kPerLane + kCount - 1) / kCount;  // that a thread copies
  using Vector = Group<T, kCount>;
  __shared__ alignas(16) T tile[kThreads * kPerLane];
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  const float logit_scale = kPlain ? 1.0f : p.in_float.logit_scale;
  const float share = kPlain ? 0.0f : p.in_float.share;
  const int classes = static_cast<int>(p.classes);
  constexpr int kRows = kThreads / kGroup;
  const int lane = threadIdx.x % kGroup;
  float loss = 0;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.rows.numel;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    int64_t left = p.rows.numel - first;
    const int rows = left < kRows ? static_cast<int>(left) : kRows;
    const int count = rows * classes;
    const int vectors = aligned ? count / kCount : 0;
    {
      const T* x = static_cast<const T*>(p.input.data) + first * classes;
      Vector raw[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        int v = threadIdx.x + i * kThreads;
        if (v < vectors) raw[i] = reinterpret_cast<const Vector*>(x)[v];
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        int v = threadIdx.x + i * kThreads;
        if (v < vectors) reinterpret_cast<Vector*>(tile)[v] = raw[i];
      }
      if (vectors * kCount != count) {
#pragma unroll 1
        for (int i = vectors * kCount + threadIdx.x; i < count; i += kThreads) tile[i] = x[i];
      }
    }
    __syncthreads();

    // Threads without a row do the last one's work, and drop it.
    const bool exists = threadIdx.x / kGroup < rows;
    const int place = exists ? threadIdx.x / kGroup : rows - 1;
    int64_t row = first + place;
    T* const mine = tile + place * classes + lane;  // every kGroup-th is this lane's
    RowTarget<float> target = load_target<float, kPlain>(p, row);
    const int label = static_cast<int>(target.label);
    bool reads = target.is_kept || (!kPlain && p.reads_all);
    const int end = classes - lane;
    float e[kPerLane];  // first the logits
    float top = -kGreatest<float>;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i >= kFewest && i * kGroup >= end) break;
      e[i] = to_real<float>(mine[i * kGroup]) * logit_scale;
      top = fmaxf(top, e[i]);
    }
    RowSums<float, false> sums = RowSums<float, false>::none();
    sums.reference = fminf(warp_max<kGroup>(top), kGreatest<float>);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i >= kFewest && i * kGroup >= end) break;
      e[i] -= sums.reference;
      if (!kPlain && p.has_coefficients) sums.weighted += e[i];
      e[i] = math::exp_shifted<Precision::kFull>(e[i]);
      sums.exponentials += e[i];
    }
    sums.exponentials = warp_sum<kGroup>(sums.exponentials);
    if (!kPlain && p.has_coefficients) {
      sums.weighted = share * warp_sum<kGroup>(sums.weighted);
      sums.coefficients = share * static_cast<float>(classes);
    }
    float label_logit = 0;
    if (reads && label >= 0) label_logit = to_real<float>(mine[label - lane]) * logit_scale;
    if (lane == 0 && exists) {
      RowResult<float> result{};
      if (reads) result = row_result<kPlain>(p, target, sums, label_logit);
      loss += result.loss;
      if constexpr (!kPlain) store_result(p, row, result);
    }

    if constexpr (kGradient) {
      __syncthreads();  // all have read their row, and the label's logit
      if (reads && has_gradient<kPlain>(p, target)) {
        RowGradient<float> g = row_gradient<kPlain>(p, row, target, sums, scale);
        const float factor = g.exponential * logit_scale;
        const float shift = share == 0 ? 0.0f : -g.coefficient * share * logit_scale;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (i >= kFewest && i * kGroup >= end) break;
          if (exists) mine[i * kGroup] = from_real<T>(fmaf(e[i], factor, shift));
        }
        if (exists && label >= 0 && label % kGroup == lane) {
          float label_e = math::exp_shifted<Precision::kFull>(label_logit - sums.reference);
          mine[label - lane] = from_real<T>(fmaf(label_e, factor, shift) - g.label * logit_scale);
        }
      } else if (exists) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (i >= kFewest && i * kGroup >= end) break;
          mine[i * kGroup] = from_real<T>(0.0f);
        }
      }
      __syncthreads();
      T* dx = static_cast<T*>(p.gradient.data) + first * classes;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        int v = threadIdx.x + i * kThreads;
        if (v < vectors) {
          reinterpret_cast<Vector*>(dx)[v] = reinterpret_cast<const Vector*>(tile)[v];
        }
      }
      if (vectors * kCount != count) {
#pragma unroll 1
        for (int i = vectors * kCount + threadIdx.x; i < count; i += kThreads) dx[i] = tile[i];
      }
    }
    __syncthreads();  // the tile may be overwritten
  }
  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
}

// Two classes, dense in memory: binary cross entropy of the distance of the logits, one exponential
// a row. The two gradients are equal but for the sign, without a cancellation. A thread takes the
// rows of one vector.
template <class T, bool kGradient, bool kPlain>
__global__ void __launch_bounds__(kThreads, 4)
    pair_kernel(const __grid_constant__ SoftmaxCeParams p) {
  constexpr int kRows = 8 / sizeof(T);
  using Vector = Group<T, 2 * kRows>;
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  float loss = 0;

  struct Pair {
    float e, upper;  // of the two probabilities, upper and e * upper, the larger
    float log_sum;   // log(1 + e)
    float loss;      // of the label
    float other;     // the probability of the other class
  };
  // `margin` is that of the other class over the label's.
  auto pair_of = [](float margin) {
    Pair r;
    r.e = math::exp_shifted<Precision::kFull>(-fabsf(margin));
    r.upper = math::reciprocal(1 + r.e);
    r.log_sum = math::log1p_unit<Precision::kFull>(r.e);
    r.loss = fmaxf(margin, 0.0f) + r.log_sum;
    r.other = (margin >= 0 ? 1.0f : r.e) * r.upper;
    return r;
  };
  // The gradients take the place of the logits.
  auto evaluate = [&](int64_t row, float& x0, float& x1) {
    RowTarget<float> target = load_target<float>(p, row);
    RowResult<float> result{};
    float g0 = 0, g1 = 0;
    if (target.is_kept || p.reads_all) {
      const float logit_scale = p.in_float.logit_scale, share = p.in_float.share;
      const float z_loss = p.in_float.z_loss;
      float l0 = x0 * logit_scale, l1 = x1 * logit_scale;
      float margin = target.label == 1 ? l0 - l1 : l1 - l0;
      // An infinite logit makes the row NaN, as in torch, unless it is the smaller one.
      float top = fmaxf(l0, l1);
      Pair r = pair_of(top > kGreatest<float> ? quiet_nan<float>() : margin);
      result.loss = target.weight * r.loss;
      float g = target.weight * r.other;
      if (p.has_coefficients) {
        float difference = (1 - r.e) * r.upper;
        result.loss += share * (fabsf(margin) + 2 * r.log_sum);
        g += share * (margin >= 0 ? difference : -difference);
      }
      // Where the larger logit is infinite so is the sum of exponentials.
      result.lse = fabsf(top) > kGreatest<float> && l0 == l0 && l1 == l1 ? top : top + r.log_sum;
      if (z_loss != 0) result.loss += z_loss * result.lse * result.lse;
      result.loss = target.is_kept ? target.factor * result.loss : 0.0f;
      if (kGradient && has_gradient(p, target)) {
        float factor = target.is_kept ? target.factor * scale * logit_scale : 0.0f;
        if (p.is_backward) {
          factor *= p.grad_loss.data != nullptr ? load<float>(p.grad_loss, p.rows, row) : 0.0f;
        }
        float common = 2 * z_loss * result.lse * factor;
        if (z_loss == 0 || !target.is_kept) common = 0;
        if (p.grad_lse.data != nullptr) {
          common += load<float>(p.grad_lse, p.rows, row) * logit_scale;
        }
        g = target.is_kept ? g * factor : 0.0f;
        g1 = target.label == 1 ? -g : g;
        g0 = -g1;
        if (common != 0) {
          g0 = fmaf(common, l0 >= l1 ? r.upper : r.e * r.upper, g0);
          g1 = fmaf(common, l0 >= l1 ? r.e * r.upper : r.upper, g1);
        }
      }
    }
    loss += result.loss;
    store_result(p, row, result);
    x0 = g0;
    x1 = g1;
  };

  // The plain loss of a vector in a straight line. False, having done nothing, where a label is out
  // of bounds or a logit infinite.
  auto evaluate_plain = [&](const int64_t* labels, float (&values)[2 * kRows]) {
    float sum = 0;
    bool is_rare = false;
    float gradients[2 * kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int64_t label = labels[i];
      bool is_kept = label != p.ignore_index, is_second = label == 1;
      float difference = values[2 * i + 1] - values[2 * i];
      float margin = is_second ? -difference : difference;
      is_rare |= static_cast<uint64_t>(label) > 1 && is_kept;
      is_rare |= fabsf(margin) > kGreatest<float>;
      Pair r = pair_of(margin);
      sum += is_kept ? r.loss : 0.0f;
      gradients[2 * i + 1] = is_kept ? r.other * (is_second ? -scale : scale) : 0.0f;
      gradients[2 * i] = -gradients[2 * i + 1];
    }
    if (is_rare) return false;
    loss += sum;
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) values[i] = gradients[i];
    return true;
  };

  int64_t vectors = p.rows.numel / kRows;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t v = at; v < vectors; v += step) {
    Vector raw = static_cast<const Vector*>(p.input.data)[v];
    float values[2 * kRows];
    unpack(raw, values);
    bool done = false;
    if constexpr (kPlain) {
      done = evaluate_plain(static_cast<const int64_t*>(p.target.data) + v * kRows, values);
    }
    if (!done) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) evaluate(v * kRows + i, values[2 * i], values[2 * i + 1]);
    }
    if constexpr (kGradient) {
      pack(values, raw);
      static_cast<Vector*>(p.gradient.data)[v] = raw;
    }
  }
  int64_t row = vectors * kRows + at;
  if (row < p.rows.numel) {
    const T* x = static_cast<const T*>(p.input.data) + 2 * row;
    float x0 = to_real<float>(x[0]), x1 = to_real<float>(x[1]);
    evaluate(row, x0, x1);
    if constexpr (kGradient) {
      T* dx = static_cast<T*>(p.gradient.data) + 2 * row;
      dx[0] = from_real<T>(x0);
      dx[1] = from_real<T>(x1);
    }
  }
  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
}

SoftmaxCeWorkspace carve(void* memory, const SoftmaxCePlan& plan) {
  auto* sums = static_cast<double*>(memory);
  auto* weights = sums + plan.blocks;
  return {reinterpret_cast<unsigned*>(weights + plan.weight_blocks), sums, weights};
}

bool reduces(const SoftmaxCeArguments& a) { return a.loss && a.reduction != Reduction::kNone; }

int at_most(int64_t wanted, int limit) {
  return wanted < 1 ? 1 : wanted < limit ? static_cast<int>(wanted) : limit;
}

constexpr int64_t kMostClasses = 1 << 30;  // that an int may count, and add a step to
constexpr int kWarpRowBytes = 6 * 1024;   // of a row that lies in shared memory beside seven others
constexpr int kReservedBytes = 2 * 1024;  // of a block's shared memory: static, and the driver's

int size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Whether a row begins where the one before it ends.
bool is_packed(const SoftmaxCeArguments& a) {
  if (a.rows.numel == 1) return true;
  return a.rows.rank == 1 && a.input.strides[0] == a.classes &&
         (!a.gradient || a.gradient.strides[0] == a.classes);
}

bool is_aligned(const Operand& operand) {
  return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
}

// Whether the logits are such as all but `general_kernel` take.
bool is_simple(const SoftmaxCeArguments& a) {
  bool same_gradient = !a.gradient || a.gradient.dtype == a.input.dtype;
  bool wants_more = a.entropy || a.grad_entropy || a.prediction || a.correct || a.softcap > 0;
  bool weights_classes = a.weight && a.label_smoothing > 0;
  return !a.in_double && !a.has_probabilities && a.classes > 1 && a.classes < kMostClasses &&
         same_gradient && !wants_more && !weights_classes && a.logit_scale > 0;
}

bool is_dense(const SoftmaxCeArguments& a) {
  return a.input.class_stride == 1 && (!a.gradient || a.gradient.class_stride == 1);
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

template <class T, bool kGradient, bool kPlain, int kGroup, int kPerLane, int kFewest>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  few_kernel<T, kGradient, kPlain, kGroup, kPerLane, kFewest>
      <<<plan.blocks, kThreads, 0, stream>>>(p, plan.aligned);
}

template <class T, bool kGradient, bool kPlain>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  if (plan.kernel == SoftmaxCePlan::kSpread) {
    spread_kernel<T, kGradient><<<plan.blocks, kThreads, 0, stream>>>(p);
  } else if (plan.kernel == SoftmaxCePlan::kPair) {
    pair_kernel<T, kGradient, kPlain><<<plan.blocks, kThreads, 0, stream>>>(p);
  } else if (plan.group > 1) {
    launch_few<T, kGradient, kPlain, 4, 32, 4>(p, plan, stream);
  } else if (!kPlain) {
    launch_few<T, kGradient, kPlain, 1, 16, 2>(p, plan, stream);
  } else if (p.classes <= 8) {
    launch_few<T, kGradient, kPlain, 1, 8, 2>(p, plan, stream);
  } else {
    launch_few<T, kGradient, kPlain, 1, 16, 9>(p, plan, stream);
  }
}

template <class T, bool kGradient>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  bool plain = !p.has_coefficients && !p.is_backward && !p.reads_all && !p.weight.data &&
               !p.sample_weight.data && !p.loss.data && p.in_float.z_loss == 0 &&
               p.in_float.logit_scale == 1 && p.in_float.keep == 1 &&
               p.target.dtype == Dtype::kInt64 && p.target.access == CudaOperand::kFlat;
  if (plain) {
    launch_few<T, kGradient, true>(p, plan, stream);
  } else {
    launch_few<T, kGradient, false>(p, plan, stream);
  }
}

template <class T>
void launch_rows(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  switch (plan.kernel) {
    case SoftmaxCePlan::kSpread:
    case SoftmaxCePlan::kPair:
    case SoftmaxCePlan::kFew:
      return p.gradient.data != nullptr ? launch_few<T, true>(p, plan, stream)
                                        : launch_few<T, false>(p, plan, stream);
    case SoftmaxCePlan::kWarp:
      return launch_rows<T, Scope::kWarp>(p, plan, stream);
    case SoftmaxCePlan::kBlock:
      return launch_rows<T, Scope::kBlock>(p, plan, stream);
    default:
      return launch_rows<T, Scope::kCluster>(p, plan, stream);
  }
}

}  // namespace

SoftmaxCePlan plan_softmax_ce(const SoftmaxCeArguments& a, const DeviceLimits& device) {
  SoftmaxCePlan plan{};
  int64_t rows = a.rows.numel;
  plan.cluster = 1;
  if (is_simple(a) && is_dense(a)) {
    // A row takes so many vectors at most, whatever its alignment.
    int64_t vectors = a.classes * size_of(a.input.dtype) / 16;
    int64_t bytes = vectors * 16;
    bool packed = is_packed(a);
    plan.aligned = is_aligned(a.input) && (!a.gradient || is_aligned(a.gradient));
    if (packed && plan.aligned && a.classes == 2) {
      plan.kernel = SoftmaxCePlan::kPair;
      plan.group = 1;
    } else if (packed && a.classes <= 128) {
      plan.kernel = SoftmaxCePlan::kFew;
      plan.group = a.classes <= 16 ? 1 : 4;
    } else if (bytes <= kWarpRowBytes) {
      plan.kernel = SoftmaxCePlan::kWarp;
      plan.group = 32;
    } else {
      plan.kernel = SoftmaxCePlan::kBlock;
      plan.group = kThreads;
      // As many blocks as it takes for three of them to fit into a multiprocessor.
      int64_t wanted = device.multiprocessor_shared_memory / 3 - kReservedBytes;
      if (a.gradient && bytes > wanted && device.has_clusters) {
        while (plan.cluster < kMostBlocks && (bytes / plan.cluster) + 16 > wanted)
          plan.cluster *= 2;
        if (bytes / plan.cluster + 16 > device.shared_memory - kReservedBytes) plan.cluster = 1;
        if (plan.cluster > 1) plan.kernel = SoftmaxCePlan::kCluster;
      }
    }
    int groups = kThreads / plan.group;
    bool keeps = plan.kernel >= SoftmaxCePlan::kWarp;
    int64_t kept = (vectors + plan.cluster - 1) / plan.cluster + (vectors == 0);
    if (a.gradient && keeps && kept * groups * 16 <= device.shared_memory - kReservedBytes) {
      plan.kept_vectors = static_cast<int>(kept);
      plan.shared_bytes = plan.kept_vectors * groups * 16;
    }
    int resident = device.multiprocessor_shared_memory / (plan.shared_bytes + kReservedBytes);
    if (resident > 4) resident = 4;
    if (plan.kernel == SoftmaxCePlan::kPair) groups *= 4;
    if (resident < 1) resident = 1;
    plan.blocks =
        at_most((rows + groups - 1) / groups, device.multiprocessors * resident / plan.cluster) *
        plan.cluster;
  } else if (is_simple(a) && rows >= 64 * device.multiprocessors) {
    plan.kernel = SoftmaxCePlan::kSpread;
    plan.group = 1;
    plan.blocks = at_most((rows + kThreads - 1) / kThreads, 8 * device.multiprocessors);
  } else {
    plan.kernel = SoftmaxCePlan::kGeneral;
    // Neighbouring threads take neighbouring classes or, where classes lie apart, rows; unless rows
    // are too few to fill the device.
    bool few_rows = rows < 256 * device.multiprocessors;
    plan.group = a.classes > 4096 && rows < 64 * device.multiprocessors      ? kThreads
                 : a.classes > 32 && (a.input.class_stride == 1 || few_rows) ? 32
                                                                             : 1;
    plan.blocks =
        at_most((rows * plan.group + kThreads - 1) / kThreads, 8 * device.multiprocessors);
  }
  // Every block of the second kernel adds up what each of the first has found.
  plan.weight_blocks = a.sums_weights() ? at_most(rows / (4 * kThreads), 128) : 1;
  bool needs = reduces(a) || a.sums_weights();
  plan.workspace_bytes = needs ? (plan.blocks + plan.weight_blocks + 1) * sizeof(double) : 0;
  return plan;
}

void launch_softmax_ce(const SoftmaxCeArguments& a, const SoftmaxCePlan& plan, void* workspace,
                       Report* report, cudaStream_t stream) {
  SoftmaxCeParams p;
  p.rows = cuda_space(a.rows);
  p.classes = a.classes;
  p.input = cuda_operand(a.input, a.rows);
  p.target = cuda_operand(a.target, a.rows);
  p.sample_weight = cuda_operand(a.sample_weight, a.rows);
  p.grad_loss = cuda_operand(a.grad_loss, a.rows);
  p.grad_lse = cuda_operand(a.grad_lse, a.rows);
  p.grad_entropy = cuda_operand(a.grad_entropy, a.rows);
  p.loss = cuda_operand(reduces(a) ? Operand{} : a.loss, a.rows);
  p.lse = cuda_operand(a.is_backward ? Operand{} : a.lse, a.rows);
  p.entropy = cuda_operand(a.is_backward ? Operand{} : a.entropy, a.rows);
  p.prediction = cuda_operand(a.prediction, a.rows);
  p.correct = cuda_operand(a.correct, a.rows);
  p.gradient = cuda_operand(a.gradient, a.rows);
  p.input_stride = a.input.class_stride;
  p.target_stride = a.target.class_stride;
  p.gradient_stride = a.gradient.class_stride;
  p.weight_stride = a.weight.class_stride;
  p.weight = {a.weight.data, a.weight.dtype};
  p.normalizer = {a.reduction == Reduction::kMean ? a.normalizer.data : nullptr,
                  a.normalizer.dtype};
  p.loss_scalar = {reduces(a) ? a.loss.data : nullptr, a.loss.dtype};
  p.workspace = carve(workspace, plan);
  p.report = report;
  p.has_probabilities = a.has_probabilities;
  p.is_backward = a.is_backward;
  p.is_mean = a.reduction == Reduction::kMean;
  p.sums_weights = a.sums_weights();
  p.zero_on_empty = a.zero_on_empty;
  p.has_coefficients = a.has_probabilities || a.label_smoothing > 0;
  p.reads_all = a.has_stats() || (a.is_backward && (a.grad_lse || a.grad_entropy));
  p.weight_blocks = plan.weight_blocks;
  p.ignore_index = a.ignore_index;
  p.in_double = {1.0 - a.label_smoothing,
                 a.classes > 0 ? a.label_smoothing / static_cast<double>(a.classes) : 0.0,
                 a.softcap,
                 a.softcap > 0 ? 1.0 / a.softcap : 0.0,
                 a.logit_scale,
                 a.z_loss};
  auto rounded = [](double x) { return static_cast<float>(x); };
  p.in_float = {rounded(p.in_double.keep),        rounded(p.in_double.share),
                rounded(p.in_double.softcap),     rounded(p.in_double.inverse_softcap),
                rounded(p.in_double.logit_scale), rounded(p.in_double.z_loss)};
  p.denominator = !p.is_mean          ? 1.0
                  : a.has_denominator ? a.denominator
                                      : static_cast<double>(a.rows.numel);

  if (plan.workspace_bytes > 0) {
    if (p.target.dtype == Dtype::kInt64 && p.target.access == CudaOperand::kFlat &&
        p.weight.data == nullptr) {
      prepare_kernel<true><<<plan.weight_blocks, kThreads, 0, stream>>>(p);
    } else {
      prepare_kernel<false><<<plan.weight_blocks, kThreads, 0, stream>>>(p);
    }
  }
  if (a.rows.numel == 0 && !reduces(a)) return;
  if (plan.kernel != SoftmaxCePlan::kGeneral) {
    switch (a.input.dtype) {
      case Dtype::kBFloat16:
        return launch_rows<__nv_bfloat16>(p, plan, stream);
      case Dtype::kFloat16:
        return launch_rows<__half>(p, plan, stream);
      default:
        return launch_rows<float>(p, plan, stream);
    }
  }
  if (a.in_double) {
    general_kernel<double><<<plan.blocks, kThreads, 0, stream>>>(p, plan.group);
  } else {
    general_kernel<float><<<plan.blocks, kThreads, 0, stream>>>(p, plan.group);
  }
}

}  // namespace fused_ce
