// Binary cross entropy on CUDA. Two kernels do all forms: `flat_kernel` the plain loss on logits
// that lie dense in memory; `group_kernel` everything else (weights, options, probabilities, focal,
// other strides and dtypes). Both read each operand once, write each result once, and leave
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
  TypedPointer unless_one;   // [1] or null: an upstream gradient, with nothing to do where it is 1
  TypedPointer loss_scalar;  // [1] or null
  BceWorkspace workspace;
  int64_t numel;
  float scale;         // of each gradient
  double denominator;  // of the loss
};

// For compute capability 7.5 the compiler would keep to 64 registers a thread, so that four blocks
// fit on a multiprocessor, and spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
#define FUSED_CE_FLAT_BOUNDS __launch_bounds__(kThreads, 3)
#else
#define FUSED_CE_FLAT_BOUNDS __launch_bounds__(kThreads)
#endif

template <class T, class Target, Output kOutput, Precision kPrecision>
__global__ void FUSED_CE_FLAT_BOUNDS flat_kernel(const __grid_constant__ FlatParams p) {
  constexpr int kCount = 16 / sizeof(T);
  using Inputs = Group<T, kCount>;
  using Targets = Group<Target, kCount>;
  constexpr bool kSums = kOutput == Output::kSum || kOutput == Output::kSumAndGradient;
  constexpr bool kWritesGradient =
      kOutput == Output::kGradient || kOutput == Output::kSumAndGradient;
  if (kOutput == Output::kGradient && is_done(p.unless_one)) return;
  const Inputs* inputs = static_cast<const Inputs*>(p.input);
  const Targets* targets = static_cast<const Targets*>(p.target);
  float scale = p.scale;
  if (kOutput == Output::kGradient && p.upstream.data != nullptr) {
    scale *= load<float>(p.upstream, 0);
  }
  float sum = 0;

  auto evaluate = [&](float x, float t) {
    auto value = BceLogits::evaluate<kPrecision>(x, 1.0f - t, t, 1.0f, scale);
    if (kSums) sum += value.loss;
    return kWritesGradient ? value.gradient : value.loss;
  };
  auto work = [&](int64_t at, const Inputs& input, const Targets& target) {
    float x[kCount], t[kCount];
    unpack(input, x);
    if constexpr (kSums && kPrecision == Precision::kHalf) {
      float gradient[kCount];
      unpack_negated(target, t);
      float group = bce_logits_group<kWritesGradient>(x, t, scale, gradient);
      if (group == group) {
        sum += group;
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) evaluate(x[i], -t[i]);
      }
      if constexpr (kWritesGradient) {
        Inputs result;
        pack(gradient, result);
        static_cast<Inputs*>(p.gradient)[at] = result;
      }
      return;
    }
    unpack(target, t);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = evaluate(x[i], t[i]);
    if constexpr (kOutput != Output::kSum) {
      Inputs result;
      pack(x, result);
      static_cast<Inputs*>(kWritesGradient ? p.gradient : p.loss)[at] = result;
    }
  };

  int64_t groups = p.numel / kCount;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  // Two groups at a time, so that four loads are in flight.
  for (; at + step < groups; at += 2 * step) {
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
    float result = evaluate(x, t);
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

// Whether a target is ignore_index; it is compared as stored, not as computed with.
template <class T>
__device__ __forceinline__ bool is_ignored(const BceKernelParams& p, T target) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<int64_t>(target) == p.ignore_index;
  } else if constexpr (std::is_same_v<T, double>) {
    return target == static_cast<double>(p.ignore_index);
  } else {
    return to_real<float>(target) == p.ignore_float;
  }
}

// The targets first .. first + kCount, and as bit i whether the i-th is ignored.
template <class Real, int kCount>
__device__ __forceinline__ unsigned load_targets(const BceKernelParams& p, int64_t first,
                                                 Real (&out)[kCount]) {
  unsigned ignored = 0;
  auto put = [&](int i, auto target) {
    out[i] = to_real<Real>(target);
    if (p.has_ignore_index && is_ignored(p, target)) ignored |= 1u << i;
  };
  for_each_run<kCount>(p.target, p.space, first, [&](int64_t offset, int begin, int end) {
    with_type(p.target.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      for_each_element<T, kCount>(
          p.target, offset, begin, end,
          [&](const Group<T, kCount>* group) {
            Group<T, kCount> targets = *group;
#pragma unroll
            for (int i = 0; i < kCount; ++i) put(i, targets[i]);
          },
          [&](int i, const T* element) { put(i, *element); });
    });
  });
  return ignored;
}

// Calls f<kCount>(i) for each whole group i that is this thread's, and f<1>(i) for one of the
// elements that are left over.
template <int kCount, class F>
__device__ __forceinline__ void for_each_group(int64_t numel, F f) {
  int64_t groups = numel / kCount;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; at < groups; at += step) f.template operator()<kCount>(at);
  int64_t left = groups * kCount + threadIdx.x;
  if (blockIdx.x == 0 && left < numel) f.template operator()<1>(left);
}

__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ BceKernelParams p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.workspace.ticket = 0;
  if (!p.counts_kept || is_done(p.unless_one)) return;
  int64_t kept = 0;
  for_each_group<8>(p.space.numel, [&]<int kCount>(int64_t at) {
    float targets[kCount];
    kept += kCount - __popc(load_targets(p, at * kCount, targets));
  });
  int64_t sum = block_sum<int64_t>(kept);
  if (threadIdx.x == 0) p.workspace.kept[blockIdx.x] = sum;
}

// Calls f<form>() for a form that is one of `kForms`.
template <BceForm kForm, BceForm... kForms, class F>
__device__ __forceinline__ void with_form(BceForm form, F f) {
  if constexpr (sizeof...(kForms) == 0) {
    f.template operator()<kForm>();
  } else if (form == kForm) {
    f.template operator()<kForm>();
  } else {
    with_form<kForms...>(form, f);
  }
}

// Blocks that a multiprocessor shall hold: what the registers allow without spilling.
template <BceForm... kForms>
constexpr int kBlocks = sizeof...(kForms) > 1                  ? 2
                        : ((kForms == BceForm::kFocal) || ...) ? 3
                                                               : 4;

// T and Target are the types of logits and targets where all operands but weights lie flat and
// aligned, else Any.
template <class Real, int kGroup, class T, class Target, Precision kPrecision, BceForm... kForms>
__global__ void __launch_bounds__(kThreads, kBlocks<kForms...>)
    group_kernel(const __grid_constant__ BceKernelParams p) {
  constexpr bool kFlat = !std::is_same_v<T, Any>;
  if (is_done(p.unless_one)) return;
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

  for_each_group<kGroup>(p.space.numel, [&]<int kCount>(int64_t at) {
    int64_t first = at * kCount;
    Real x[kCount], t[kCount];
    unsigned ignored = 0;
    if constexpr (kFlat) {
      Group<T, kCount> inputs = static_cast<const Group<T, kCount>*>(p.input.data)[at];
      Group<Target, kCount> targets = static_cast<const Group<Target, kCount>*>(p.target.data)[at];
      unpack(inputs, x);
      unpack(targets, t);
      if (p.has_ignore_index) {
        float index = p.ignore_float;
#pragma unroll
        for (int i = 0; i < kCount; ++i) ignored |= (t[i] == index ? 1u : 0u) << i;
      }
    } else {
      load_group<Any>(p.input, p.space, first, x);
      ignored = load_targets(p, first, t);
    }
    // Each element's loss takes the place of its target, its gradient that of its logit.
    auto put = [&](int i, const LossAndGradient<Real>& value) {
      t[i] = value.loss;
      x[i] = value.gradient;
    };
    with_form<kForms...>(p.form, [&]<BceForm kForm> {
      if constexpr (kForm == BceForm::kLogits) {
        Real positive[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) positive[i] = 1;
        if (p.pos_weight.data != nullptr) load_group<T>(p.pos_weight, p.space, first, positive);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          Real negative = (Real(1) - t[i]) * target_scale + target_shift;
          positive[i] *= t[i] * target_scale + target_shift;
          put(i, BceLogits::evaluate<kPrecision>(x[i], negative, positive[i],
                                                 negative + positive[i], scale));
        }
      } else {
        if constexpr (kForm == BceForm::kProbability) {
          unsigned outside = 0;
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            if (x[i] >= Real(0) && x[i] <= Real(1) && t[i] >= Real(0) && t[i] <= Real(1)) continue;
            outside |= 1u << i;
            x[i] = static_cast<Real>(__int_as_float(0x7fc00000));
          }
          if ((outside & ~ignored) != 0) {
            int64_t index = first + __ffs(outside & ~ignored) - 1;
            double probability = load<double>(p.input, p.space, index);
            bool is_target = probability >= 0 && probability <= 1;
            if (is_target) probability = load<double>(p.target, p.space, index);
            write_report(p.report,
                         {0, is_target ? Report::kTargetProbability : Report::kInputProbability,
                          index, 0, 0, probability});
          }
        }
        auto evaluate = [&](const FocalOptions<Real>& options) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) {
            Real target = t[i] * target_scale + target_shift;
            if constexpr (kForm == BceForm::kProbability) {
              put(i, BceProbability::evaluate<kPrecision>(x[i], target));
            } else {
              put(i, FocalLogits::evaluate<kPrecision>(x[i], target, options));
            }
            x[i] *= scale;
          }
        };
        if (kForm == BceForm::kFocal && focal.power == 2) {
          // Said outright, the usual power takes fewer instructions.
          evaluate({focal.positive, focal.negative, Real(2), Real(1), 2});
        } else {
          evaluate(focal);
        }
      }
    });
#pragma unroll 1
    for (int k = 0; k < p.factors_count; ++k) {
      Real factor[kCount];
      load_group<T>(p.factors[k], p.space, first, factor);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        t[i] *= factor[i];
        x[i] *= factor[i];
      }
    }
    if (ignored != 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (ignored >> i & 1) t[i] = x[i] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += t[i];
    if (p.loss.data != nullptr) store_group<T>(p.loss, p.space, first, t);
    if (p.gradient.data != nullptr) {
      if constexpr (kFlat) {
        store_whole(static_cast<Group<T, kCount>*>(p.gradient.data) + at, x);
      } else {
        store_group<Any>(p.gradient, p.space, first, x);
      }
    }
  });

  if (p.loss_scalar.data != nullptr) {
    double total;
    if (grid_sum(sum, p.workspace.sums, p.workspace.ticket, total) && threadIdx.x == 0) {
      store(p.loss_scalar, 0, reduced(total, denominator, p.zero_on_empty));
    }
  }
}

template <class T, class Target, Precision kPrecision>
void launch_flat(const FlatParams& params, int blocks, cudaStream_t stream) {
  if (params.loss_scalar.data != nullptr) {
    if (params.gradient != nullptr) {
      flat_kernel<T, Target, Output::kSumAndGradient, kPrecision>
          <<<blocks, kThreads, 0, stream>>>(params);
    } else {
      flat_kernel<T, Target, Output::kSum, kPrecision><<<blocks, kThreads, 0, stream>>>(params);
    }
  } else if (params.gradient != nullptr) {
    flat_kernel<T, Target, Output::kGradient, kPrecision><<<blocks, kThreads, 0, stream>>>(params);
  } else {
    flat_kernel<T, Target, Output::kLoss, kPrecision><<<blocks, kThreads, 0, stream>>>(params);
  }
}

template <class T, Precision kPrecision>
void launch_flat(const FlatParams& params, bool byte_targets, int blocks, cudaStream_t stream) {
  if (byte_targets) {
    launch_flat<T, uint8_t, kPrecision>(params, blocks, stream);
  } else {
    launch_flat<T, T, kPrecision>(params, blocks, stream);
  }
}

template <class T>
void launch_flat(const FlatParams& params, bool half_precision, bool byte_targets, int blocks,
                 cudaStream_t stream) {
  if (sizeof(T) == 2 && half_precision) {
    launch_flat<T, sizeof(T) == 2 ? Precision::kHalf : Precision::kFull>(params, byte_targets,
                                                                         blocks, stream);
  } else {
    launch_flat<T, Precision::kFull>(params, byte_targets, blocks, stream);
  }
}

bool is_byte(Dtype dtype) { return dtype == Dtype::kBool || dtype == Dtype::kUInt8; }
bool is_half(Dtype dtype) { return dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16; }

// Whether `flat_kernel` does it.
bool is_flat(const BceArguments& a, const BceKernelParams& p) {
  auto flat = [&](const CudaOperand& operand) {
    return operand.access == CudaOperand::kFlat && operand.aligned;
  };
  auto same = [&](const CudaOperand& operand) {
    return operand.data == nullptr || (flat(operand) && operand.dtype == p.input.dtype);
  };
  return !a.in_double && a.form == BceForm::kLogits && !a.weight && !a.sample_weight &&
         !a.pos_weight && (!a.upstream || p.factors[0].access == CudaOperand::kScalar) &&
         !a.normalizer && !a.has_ignore_index && a.target_shift == 0 && flat(p.input) &&
         flat(p.target) && (same(p.target) || is_byte(p.target.dtype)) && same(p.loss) &&
         same(p.gradient);
}

template <class T, class Target, Precision kPrecision>
void launch_typed(const BceKernelParams& p, int blocks, cudaStream_t stream) {
  constexpr int kCount = 16 / sizeof(T);
  auto kernel = group_kernel<float, kCount, T, Target, kPrecision, BceForm::kLogits>;
  if (p.form == BceForm::kFocal) {
    kernel = group_kernel<float, kCount, T, Target, kPrecision, BceForm::kFocal>;
  }
  if constexpr (sizeof(T) == 4 || kPrecision == Precision::kHalf) {
    if (p.form == BceForm::kProbability) {
      kernel = group_kernel<float, kCount, T, Target, kPrecision, BceForm::kProbability>;
    }
  }
  kernel<<<blocks, kThreads, 0, stream>>>(p);
}

// What fits all types and strides: one kernel for all forms.
template <class Real, int kCount>
void launch_any(const BceKernelParams& p, int blocks, cudaStream_t stream) {
  group_kernel<Real, kCount, Any, Any, Precision::kFull, BceForm::kLogits, BceForm::kProbability,
               BceForm::kFocal><<<blocks, kThreads, 0, stream>>>(p);
}

// Whether group_kernel has been compiled for the types, and all operands but weights lie as it
// asks.
bool is_typed(const BceArguments& a, const BceKernelParams& p) {
  auto flat = [&](const CudaOperand& operand) {
    return operand.data == nullptr || (operand.access == CudaOperand::kFlat && operand.aligned);
  };
  auto like = [&](const CudaOperand& operand) {
    return operand.data == nullptr || operand.dtype == p.input.dtype ||
           operand.dtype == Dtype::kFloat32;
  };
  bool good = !a.in_double && flat(p.input) && flat(p.target) && flat(p.loss) && flat(p.gradient) &&
              like(p.loss) && like(p.pos_weight);
  for (int k = 0; k < p.factors_count; ++k) good = good && like(p.factors[k]);
  bool same = p.target.dtype == p.input.dtype || is_byte(p.target.dtype);
  if (a.half_precision || p.input.dtype == Dtype::kFloat32) return good && same;
  return good && p.form != BceForm::kProbability && (same || p.target.dtype == Dtype::kFloat32);
}

template <class T>
void launch_half(const BceArguments& a, const BceKernelParams& p, int blocks, cudaStream_t stream) {
  auto launch = [&]<Precision kPrecision>() {
    if (is_byte(p.target.dtype)) {
      launch_typed<T, uint8_t, kPrecision>(p, blocks, stream);
    } else {
      launch_typed<T, T, kPrecision>(p, blocks, stream);
    }
  };
  if (a.half_precision) {
    launch.template operator()<Precision::kHalf>();
  } else if (p.target.dtype == Dtype::kFloat32) {
    launch_typed<T, float, Precision::kFull>(p, blocks, stream);
  } else {
    launch.template operator()<Precision::kFull>();
  }
}

void launch_group(const BceArguments& a, const BceKernelParams& p, int blocks,
                  cudaStream_t stream) {
  if (a.in_double) return launch_any<double, 2>(p, blocks, stream);
  if (!is_typed(a, p)) {
    return is_half(p.input.dtype) ? launch_any<float, 8>(p, blocks, stream)
                                  : launch_any<float, 4>(p, blocks, stream);
  }
  if (p.input.dtype == Dtype::kBFloat16) return launch_half<__nv_bfloat16>(a, p, blocks, stream);
  if (p.input.dtype == Dtype::kFloat16) return launch_half<__half>(a, p, blocks, stream);
  if (is_byte(p.target.dtype)) {
    launch_typed<float, uint8_t, Precision::kFull>(p, blocks, stream);
  } else {
    launch_typed<float, float, Precision::kFull>(p, blocks, stream);
  }
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
  p.pos_weight = cuda_operand(a.pos_weight, a.space);
  p.factors_count = 0;
  for (const Operand* factor : {&a.weight, &a.sample_weight, &a.upstream}) {
    if (*factor) p.factors[p.factors_count++] = cuda_operand(*factor, a.space);
  }
  p.gradient = cuda_operand(a.gradient, a.space);
  p.loss = cuda_operand(reduces ? Operand{} : a.loss, a.space);
  p.loss_scalar = {reduces ? a.loss.data : nullptr, a.loss.dtype};
  p.normalizer = {a.normalizer.data, a.normalizer.dtype};
  p.unless_one = {a.is_written ? a.upstream.data : nullptr, a.upstream.dtype};
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
  float ignore_float = static_cast<float>(a.ignore_index);
  bool is_float = static_cast<double>(ignore_float) == static_cast<double>(a.ignore_index);
  p.ignore_float = is_float ? ignore_float : NAN;
  p.focal = a.focal;
  p.denominator = !p.is_mean          ? 1.0
                  : a.has_denominator ? a.denominator
                                      : static_cast<double>(a.space.numel);

  if (plan.workspace_bytes > 0) {
    prepare_kernel<<<p.counts_kept ? plan.blocks : 1, kThreads, 0, stream>>>(p);
  }
  if (a.space.numel == 0 && !reduces) return;
  if (p.denominator != 0 && is_flat(a, p)) {
    FlatParams flat{a.input.data,
                    a.target.data,
                    p.loss.data,
                    a.gradient.data,
                    {a.upstream.data, a.upstream.dtype},
                    p.unless_one,
                    p.loss_scalar,
                    p.workspace,
                    a.space.numel,
                    static_cast<float>(1.0 / p.denominator),
                    p.denominator};
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
  launch_group(a, p, plan.blocks, stream);
}

}  // namespace fused_ce
