// Binary cross entropy on CUDA. Two kernels do all forms: `flat_kernel` the loss on logits that lie
// dense in memory, weighted or not; `general_kernel` everything else (other strides and dtypes,
// options, probabilities, focal). Both read each operand once, write each result once, and leave
// one partial sum a block; the block that ends last adds these up. `prepare_kernel` runs before
// them: it resets the ticket that tells which block that is, and counts the targets that are not
// ignored where a mean needs their number.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../math.h"
#include "bce_kernel.h"
#include "operand.cuh"
#include "reduce.cuh"

namespace fused_ce {
namespace {

enum class Output { kSum, kSumAndGradient, kLoss, kGradient };

struct FlatParams {
  const void* input;         // [numel]
  const void* target;        // [numel]
  void* loss;                // [numel] or null
  void* gradient;            // [numel] or null; may be `input`
  TypedPointer upstream;     // [1] or null
  TypedPointer loss_scalar;  // [1] or null
  BceWorkspace workspace;
  int64_t numel;
  float scale;         // of each gradient
  double denominator;  // of the loss
  CudaSpace space;
  CudaOperand weight, pos_weight,
      factor;  // each [*space]; `factor` is an unreduced upstream gradient
};

template <class S, int kCount>
__device__ __forceinline__ void load_period(const CudaOperand& operand, int64_t period,
                                            int64_t offset, float (&out)[kCount]) {
  const S* data = static_cast<const S*>(operand.data);
  if (operand.aligned && (operand.access == CudaOperand::kFlat || period % kCount == 0)) {
    Group<S, kCount> group = *reinterpret_cast<const Group<S, kCount>*>(data + offset);
    unpack(group, out);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    out[i] = to_real<float>(data[offset]);
    offset = offset + 1 == period ? 0 : offset + 1;
  }
}

// One element of a weight of type float or T.
template <class T>
__device__ __forceinline__ float load_weight(const CudaOperand& operand, int64_t offset) {
  return operand.dtype == Dtype::kFloat32
             ? static_cast<const float*>(operand.data)[offset]
             : to_real<float>(static_cast<const T*>(operand.data)[offset]);
}

// Elements first .. first + kCount of one whose access is not kStrided; 1 where it is absent.
template <class T, int kCount>
__device__ __forceinline__ void load_weights(const CudaOperand& operand, const CudaSpace& space,
                                             int64_t first, float (&out)[kCount]) {
  if (operand.access == CudaOperand::kAbsent || operand.access == CudaOperand::kScalar) {
    float value = operand.access == CudaOperand::kAbsent ? 1.0f : load_weight<T>(operand, 0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = value;
    return;
  }
  int64_t period = operand.access == CudaOperand::kFlat ? space.numel : space.sizes[0];
  int64_t offset = first;
  if (operand.access == CudaOperand::kPeriodic) {
    offset -= static_cast<int64_t>(__umul64hi(first, space.reciprocals[0])) * period;
    if (offset >= period) offset -= period;
  }
  if (operand.dtype == Dtype::kFloat32) {
    load_period<float>(operand, period, offset, out);
  } else {
    load_period<T>(operand, period, offset, out);
  }
}

// Of compute capability 7.5 an SM holds four of these blocks with 64 registers a thread, which the
// compiler would keep to and spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
#define FUSED_CE_FLAT_BOUNDS __launch_bounds__(kThreads, 3)
#else
#define FUSED_CE_FLAT_BOUNDS __launch_bounds__(kThreads)
#endif

template <class T, class Target, Output kOutput, Precision kPrecision, bool kWeighted>
__global__ void FUSED_CE_FLAT_BOUNDS flat_kernel(const __grid_constant__ FlatParams p) {
  constexpr int kCount = 16 / sizeof(T);
  using Inputs = Group<T, kCount>;
  using Targets = Group<Target, kCount>;
  constexpr bool kSums = kOutput == Output::kSum || kOutput == Output::kSumAndGradient;
  constexpr bool kWritesGradient =
      kOutput == Output::kGradient || kOutput == Output::kSumAndGradient;
  const Inputs* inputs = static_cast<const Inputs*>(p.input);
  const Targets* targets = static_cast<const Targets*>(p.target);
  float scale = p.scale;
  if (kOutput == Output::kGradient && p.upstream.data != nullptr) {
    scale *= load<float>(p.upstream, 0);
  }
  float sum = 0;

  auto evaluate = [&](float x, float t, float weight, float pos_weight, float factor) {
    LossAndGradient<float> value;
    if constexpr (kWeighted) {
      float negative = 1.0f - t, positive = pos_weight * t;
      value = BceLogits::evaluate<kPrecision>(x, negative, positive, negative + positive, scale);
      value.loss *= weight;
      value.gradient *= weight * factor;
    } else {
      value = BceLogits::evaluate<kPrecision>(x, 1.0f - t, t, 1.0f, scale);
    }
    if (kSums) sum += value.loss;
    return kWritesGradient ? value.gradient : value.loss;
  };
  auto work = [&](int64_t at, const Inputs& input, const Targets& target) {
    float x[kCount], t[kCount];
    unpack(input, x);
    if constexpr (kSums && kPrecision == Precision::kHalf && !kWeighted) {
      float gradient[kCount];
      unpack_negated(target, t);
      float group = bce_logits_group<kWritesGradient>(x, t, scale, gradient);
      if (group == group) {
        sum += group;
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) evaluate(x[i], -t[i], 1.0f, 1.0f, 1.0f);
      }
      if constexpr (kWritesGradient) {
        Inputs result;
        pack(gradient, result);
        static_cast<Inputs*>(p.gradient)[at] = result;
      }
      return;
    }
    unpack(target, t);
    float weight[kCount], pos_weight[kCount], factor[kCount];
    if constexpr (kWeighted) {
      load_weights<T>(p.weight, p.space, at * kCount, weight);
      load_weights<T>(p.pos_weight, p.space, at * kCount, pos_weight);
      load_weights<T>(p.factor, p.space, at * kCount, factor);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = kWeighted ? evaluate(x[i], t[i], weight[i], pos_weight[i], factor[i])
                       : evaluate(x[i], t[i], 1.0f, 1.0f, 1.0f);
    }
    if constexpr (kOutput != Output::kSum) {
      Inputs result;
      pack(x, result);
      static_cast<Inputs*>(kWritesGradient ? p.gradient : p.loss)[at] = result;
    }
  };

  int64_t groups = p.numel / kCount;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  // Two groups at a time, so that four loads are in flight. Weights are loads enough.
  for (; !kWeighted && at + step < groups; at += 2 * step) {
    Inputs first_input = inputs[at], second_input = inputs[at + step];
    Targets first_target = targets[at], second_target = targets[at + step];
    work(at, first_input, first_target);
    work(at + step, second_input, second_target);
  }
  for (; at < groups; at += step) {
    Inputs input = inputs[at];
    Targets target = targets[at];
    work(at, input, target);
  }

  int64_t tail = groups * kCount + threadIdx.x;
  if (blockIdx.x == 0 && tail < p.numel) {
    float x = to_real<float>(static_cast<const T*>(p.input)[tail]);
    float t = to_real<float>(static_cast<const Target*>(p.target)[tail]);
    auto one = [&](const CudaOperand& operand) {
      return operand.data == nullptr ? 1.0f
                                     : load_weight<T>(operand, offset_of(operand, p.space, tail));
    };
    float result = kWeighted ? evaluate(x, t, one(p.weight), one(p.pos_weight), one(p.factor))
                             : evaluate(x, t, 1.0f, 1.0f, 1.0f);
    if constexpr (kOutput != Output::kSum) {
      static_cast<T*>(kWritesGradient ? p.gradient : p.loss)[tail] = from_real<T>(result);
    }
  }

  if constexpr (kSums) {
    double total;
    if (grid_sum(sum, p.workspace.sums, p.workspace.ticket, total) && threadIdx.x == 0) {
      store(p.loss_scalar, 0, total / p.denominator);
    }
  }
}

// Targets are compared as stored, not as computed with.
__device__ __forceinline__ bool is_ignored(const BceKernelParams& p, int64_t index) {
  return p.has_ignore_index &&
         load<double>(p.target, p.space, index) == static_cast<double>(p.ignore_index);
}

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ BceKernelParams p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.workspace.ticket = 0;
  if (!p.counts_kept) return;
  int64_t kept = 0;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.space.numel;
       i += step) {
    kept += !is_ignored(p, i);
  }
  int64_t sum = block_sum<int64_t>(kept);
  if (threadIdx.x == 0) p.workspace.kept[blockIdx.x] = sum;
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    general_kernel(const __grid_constant__ BceKernelParams p) {
  double denominator = p.denominator;
  if (p.counts_kept) {
    int64_t kept = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) kept += p.workspace.kept[i];
    denominator = static_cast<double>(block_sum<int64_t>(kept));
  } else if (p.is_mean && p.normalizer.data != nullptr) {
    denominator = load<double>(p.normalizer, 0);
  }
  double inverse = inverse_of(denominator, p.zero_on_empty);
  Real scale = static_cast<Real>(inverse);
  Real target_scale = static_cast<Real>(p.target_scale);
  Real target_shift = static_cast<Real>(p.target_shift);
  const FocalOptions<Real> focal = focal_options<Real>(p.focal);
  Real sum = 0;

  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.space.numel;
       i += step) {
    LossAndGradient<Real> value{0, 0};
    if (!is_ignored(p, i)) {
      Real x = load<Real>(p.input, p.space, i);
      Real raw = load<Real>(p.target, p.space, i);
      Real target = raw * target_scale + target_shift;
      Real negative = (Real(1) - raw) * target_scale + target_shift;
      if (p.form == BceForm::kLogits) {
        Real positive = target;
        if (p.pos_weight.data != nullptr) positive *= load<Real>(p.pos_weight, p.space, i);
        value = BceLogits::evaluate<Precision::kFull>(x, negative, positive, negative + positive,
                                                      Real(1));
      } else if (p.form == BceForm::kFocal) {
        value = FocalLogits::evaluate<Precision::kFull>(x, target, focal);
      } else if (x >= Real(0) && x <= Real(1) && raw >= Real(0) && raw <= Real(1)) {
        value = BceProbability::evaluate(x, target);
      } else {
        bool is_target = x >= Real(0) && x <= Real(1);
        write_report(p.report,
                     {0, is_target ? Report::kTargetProbability : Report::kInputProbability, i, 0,
                      0, static_cast<double>(is_target ? raw : x)});
        value.loss = value.gradient = static_cast<Real>(__int_as_float(0x7fc00000));
      }
      Real weight =
          p.weight.data != nullptr ? load<Real>(p.weight, p.space, i) : static_cast<Real>(1);
      value.loss *= weight;
      value.gradient *= weight * scale;
      if (p.upstream.data != nullptr) value.gradient *= load<Real>(p.upstream, p.space, i);
    }
    sum += value.loss;
    if (p.loss.data != nullptr) store(p.loss, p.space, i, value.loss);
    if (p.gradient.data != nullptr) store(p.gradient, p.space, i, value.gradient);
  }

  if (p.loss_scalar.data != nullptr) {
    double total;
    if (grid_sum(sum, p.workspace.sums, p.workspace.ticket, total) && threadIdx.x == 0) {
      store(p.loss_scalar, 0, denominator == 0 ? total * inverse : total / denominator);
    }
  }
}

template <class T, class Target, Precision kPrecision, bool kWeighted>
void launch_flat(const FlatParams& params, int blocks, cudaStream_t stream) {
  if (params.loss_scalar.data != nullptr) {
    if (params.gradient != nullptr) {
      flat_kernel<T, Target, Output::kSumAndGradient, kPrecision, kWeighted>
          <<<blocks, kThreads, 0, stream>>>(params);
    } else {
      flat_kernel<T, Target, Output::kSum, kPrecision, kWeighted>
          <<<blocks, kThreads, 0, stream>>>(params);
    }
  } else if (params.gradient != nullptr) {
    flat_kernel<T, Target, Output::kGradient, kPrecision, kWeighted>
        <<<blocks, kThreads, 0, stream>>>(params);
  } else {
    flat_kernel<T, Target, Output::kLoss, kPrecision, kWeighted>
        <<<blocks, kThreads, 0, stream>>>(params);
  }
}

template <class T, Precision kPrecision, bool kWeighted>
void launch_flat(const FlatParams& params, bool byte_targets, int blocks, cudaStream_t stream) {
  if (byte_targets) {
    launch_flat<T, uint8_t, kPrecision, kWeighted>(params, blocks, stream);
  } else {
    launch_flat<T, T, kPrecision, kWeighted>(params, blocks, stream);
  }
}

template <class T>
void launch_flat(const FlatParams& params, bool half_precision, bool byte_targets, int blocks,
                 cudaStream_t stream) {
  bool weighted = params.weight.data != nullptr || params.pos_weight.data != nullptr ||
                  params.factor.data != nullptr;
  if (weighted) {
    launch_flat<T, Precision::kFull, true>(params, byte_targets, blocks, stream);
  } else if (sizeof(T) == 2 && half_precision) {
    launch_flat<T, sizeof(T) == 2 ? Precision::kHalf : Precision::kFull, false>(
        params, byte_targets, blocks, stream);
  } else {
    launch_flat<T, Precision::kFull, false>(params, byte_targets, blocks, stream);
  }
}

bool is_byte(Dtype dtype) { return dtype == Dtype::kBool || dtype == Dtype::kUInt8; }

// Whether `flat_kernel` does it.
bool is_flat(const BceArguments& a, const BceKernelParams& p) {
  auto flat = [&](const CudaOperand& operand) {
    return operand.access == CudaOperand::kFlat && operand.aligned;
  };
  auto same = [&](const CudaOperand& operand) {
    return operand.data == nullptr || (flat(operand) && operand.dtype == p.input.dtype);
  };
  auto weights = [&](const CudaOperand& operand) {
    return operand.data == nullptr ||
           (operand.access != CudaOperand::kStrided &&
            (operand.dtype == Dtype::kFloat32 || operand.dtype == p.input.dtype));
  };
  return !a.in_double && a.form == BceForm::kLogits && weights(p.weight) && weights(p.pos_weight) &&
         (p.upstream.access == CudaOperand::kScalar || weights(p.upstream)) && !a.normalizer &&
         !a.has_ignore_index && a.target_shift == 0 && flat(p.input) && flat(p.target) &&
         (same(p.target) || is_byte(p.target.dtype)) && same(p.loss) && same(p.gradient);
}

BceWorkspace carve(void* memory, int blocks) {
  auto* sums = static_cast<double*>(memory);
  auto* kept = reinterpret_cast<int64_t*>(sums + blocks);
  return {reinterpret_cast<unsigned*>(kept + blocks), sums, kept};
}

}  // namespace

BcePlan plan_bce(const BceArguments& a, int multiprocessors) {
  BcePlan plan;
  // Up to two blocks a multiprocessor, a group a thread is enough; beyond, each thread takes four,
  // which spreads its fixed cost, until the device is full.
  int64_t few = (a.space.numel + kThreads * 8 - 1) / (kThreads * 8);
  if (few > 2 * multiprocessors) few = 2 * multiprocessors;
  int64_t many = a.space.numel / (kThreads * 32);
  if (many > 8 * multiprocessors) many = 8 * multiprocessors;
  int64_t blocks = few > many ? few : many;
  plan.blocks = blocks > 0 ? static_cast<int>(blocks) : 1;
  bool reduces = a.loss && a.reduction != Reduction::kNone;
  plan.workspace_bytes = reduces || a.counts_kept() ? (2 * plan.blocks + 1) * sizeof(double) : 0;
  return plan;
}

void launch_bce(const BceArguments& a, const BcePlan& plan, void* workspace, Report* report,
                cudaStream_t stream) {
  bool reduces = a.loss && a.reduction != Reduction::kNone;
  BceKernelParams p;
  p.space = cuda_space(a.space);
  p.input = cuda_operand(a.input, a.space);
  p.target = cuda_operand(a.target, a.space);
  p.weight = cuda_operand(a.weight, a.space);
  p.pos_weight = cuda_operand(a.pos_weight, a.space);
  p.upstream = cuda_operand(a.upstream, a.space);
  p.gradient = cuda_operand(a.gradient, a.space);
  p.loss = cuda_operand(reduces ? Operand{} : a.loss, a.space);
  p.loss_scalar = {reduces ? a.loss.data : nullptr, a.loss.dtype};
  p.normalizer = {a.normalizer.data, a.normalizer.dtype};
  p.workspace = carve(workspace, plan.blocks);
  p.report = report;
  p.form = a.form;
  p.target_scale = a.target_scale;
  p.target_shift = a.target_shift;
  p.has_ignore_index = a.has_ignore_index;
  p.counts_kept = a.counts_kept();
  p.zero_on_empty = a.zero_on_empty;
  p.is_mean = a.reduction == Reduction::kMean;
  p.ignore_index = a.ignore_index;
  p.focal = a.focal;
  p.denominator = !p.is_mean          ? 1.0
                  : a.has_denominator ? a.denominator
                                      : static_cast<double>(a.space.numel);

  if (plan.workspace_bytes > 0) {
    prepare_kernel<<<p.counts_kept ? plan.blocks : 1, kThreads, 0, stream>>>(p);
  }
  if (a.space.numel == 0 && !reduces) return;
  if (p.denominator != 0 && is_flat(a, p)) {
    bool scalar_upstream = p.upstream.access == CudaOperand::kScalar;
    FlatParams flat{a.input.data,
                    a.target.data,
                    p.loss.data,
                    a.gradient.data,
                    {scalar_upstream ? a.upstream.data : nullptr, a.upstream.dtype},
                    p.loss_scalar,
                    p.workspace,
                    a.space.numel,
                    static_cast<float>(1.0 / p.denominator),
                    p.denominator,
                    p.space,
                    p.weight,
                    p.pos_weight,
                    scalar_upstream ? CudaOperand{} : p.upstream};
    bool byte_targets = is_byte(a.target.dtype);
    switch (a.input.dtype) {
      case Dtype::kBFloat16:
        return launch_flat<__nv_bfloat16>(flat, a.half_precision, byte_targets, plan.blocks,
                                          stream);
      case Dtype::kFloat16:
        return launch_flat<__half>(flat, a.half_precision, byte_targets, plan.blocks, stream);
      default:
        return launch_flat<float>(flat, a.half_precision, byte_targets, plan.blocks, stream);
    }
  }
  if (a.in_double) {
    general_kernel<double><<<plan.blocks, kThreads, 0, stream>>>(p);
  } else {
    general_kernel<float><<<plan.blocks, kThreads, 0, stream>>>(p);
  }
}

}  // namespace fused_ce
