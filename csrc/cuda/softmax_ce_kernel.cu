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
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ SoftmaxCeParams p) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.workspace.ticket = 0;
  if (!p.sums_weights) return;
  double weights = 0;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < p.rows.numel;
       row += step) {
    int64_t label = load_label(p.target.data, p.target.dtype, offset_of(p.target, p.rows, row));
    if (label == p.ignore_index) continue;
    if (p.weight.data == nullptr) {
      weights += 1;
    } else if (static_cast<uint64_t>(label) < static_cast<uint64_t>(p.classes)) {
      weights += load<double>(p.weight, label * p.weight_stride);
    }
  }
  double sum = block_sum<double>(weights);
  if (threadIdx.x == 0) p.workspace.weights[blockIdx.x] = sum;
}

// Any dtypes, strides and options. A row has `group` threads, 1, 32 or all of the block: it is read
// once for its sums, and again, from cache, for its gradient.
template <class Real>
struct GeneralRow {
  static constexpr Precision kPrecision = Precision::kFull;
  using Sums = RowSums<Real, kPrecision>;
  const SoftmaxCeParams& p;
  int64_t input, target, gradient;  // offsets
  Real scale, cap, keep, share;

  struct Logit {
    Real raw;  // before the cap
    Real value;
    Real slope;  // d value / d input
  };
  __device__ __forceinline__ Logit logit(int64_t c) const {
    Real x = load<Real>(TypedPointer{p.input.data, p.input.dtype}, input + c * p.input_stride);
    Logit l{x * scale, x * scale, scale};
    if (cap != 0) {
      Real t = math::tanh(l.raw * static_cast<Real>(p.inverse_softcap));
      l.value = cap * t;
      l.slope = scale * (1 - t * t);
    }
    return l;
  }
  __device__ __forceinline__ Real probability(int64_t c) const {
    return load<Real>(TypedPointer{p.target.data, p.target.dtype}, target + c * p.target_stride);
  }
  __device__ __forceinline__ Real coefficient(int64_t c) const {
    Real b = p.has_probabilities ? probability(c) * keep + share : share;
    return p.weight.data == nullptr ? b : b * load<Real>(p.weight, c * p.weight_stride);
  }
};

template <class Real>
__global__ void __launch_bounds__(kThreads, 2)
    general_kernel(const __grid_constant__ SoftmaxCeParams p, int group) {
  using Row = GeneralRow<Real>;
  using Sums = typename Row::Sums;
  struct Shared {
    Sums sums;
    Largest<Real> top, top_target;
  };
  __shared__ Shared shared[2][kWarps];
  double denominator = load_denominator(p);
  Real scale = static_cast<Real>(inverse_of(denominator, p.zero_on_empty));
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
    Row r{p,
          0,
          0,
          0,
          static_cast<Real>(p.logit_scale),
          static_cast<Real>(p.softcap),
          static_cast<Real>(p.keep),
          static_cast<Real>(p.share)};
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

    auto combine = [&](int width) {
      sums.combine(width, p.has_coefficients, wants_entropy);
      for (int distance = width >> 1; wants_top && distance > 0; distance >>= 1) {
        top.offer(from_lane(top.value, distance), from_lane(top.index, distance));
        top_target.offer(from_lane(top_target.value, distance),
                         from_lane(top_target.index, distance));
      }
    };
    combine(group < 32 ? group : 32);
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
      combine(kWarps);
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
    if (reads) g = row_gradient(p, row, target, sums, result, scale);
    TypedPointer to{p.gradient.data, p.gradient.dtype};
#pragma unroll 1
    for (int64_t c = lane; c < p.classes; c += group) {
      Real value = 0;
      if (reads) {
        auto l = r.logit(c);
        Real shifted = l.value - sums.reference;
        Real e = Sums::exponential(shifted);
        value = e * g.exponential;
        if (g.entropy != 0 && e != 0) value += e * g.entropy * (shifted + g.shift);
        if (target.is_kept && p.has_coefficients) value -= g.coefficient * r.coefficient(c);
        if (target.is_kept && c == target.label) value -= g.label;
        value *= l.slope;
      }
      store(to, r.gradient + c * p.gradient_stride, value);
    }
  }

  if (p.loss_scalar.data != nullptr) {
    double total;
    if (grid_sum(loss, p.workspace.sums, p.workspace.ticket, total) && threadIdx.x == 0) {
      store(p.loss_scalar, 0,
            denominator == 0 ? total * inverse_of(0, p.zero_on_empty) : total / denominator);
    }
  }
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

}  // namespace

SoftmaxCePlan plan_softmax_ce(const SoftmaxCeArguments& a, int multiprocessors) {
  SoftmaxCePlan plan;
  int64_t rows = a.rows.numel;
  // Neighbouring threads take neighbouring classes or, where classes lie apart, rows; unless rows
  // are too few to fill the device.
  bool few_rows = rows < 256 * multiprocessors;
  plan.group = a.classes > 4096 && rows < 64 * multiprocessors             ? kThreads
               : a.classes > 32 && (a.input.class_stride == 1 || few_rows) ? 32
                                                                           : 1;
  plan.blocks = at_most((rows * plan.group + kThreads - 1) / kThreads, 8 * multiprocessors);
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
  p.keep = 1.0 - a.label_smoothing;
  p.share = a.classes > 0 ? a.label_smoothing / static_cast<double>(a.classes) : 0.0;
  p.softcap = a.softcap;
  p.inverse_softcap = a.softcap > 0 ? 1.0 / a.softcap : 0.0;
  p.logit_scale = a.logit_scale;
  p.z_loss = a.z_loss;
  p.denominator = !p.is_mean          ? 1.0
                  : a.has_denominator ? a.denominator
                                      : static_cast<double>(a.rows.numel);

  if (plan.workspace_bytes > 0) {
    prepare_kernel<<<plan.weight_blocks, kThreads, 0, stream>>>(p);
  }
  if (a.rows.numel == 0 && !reduces(a)) return;
  if (a.in_double) {
    general_kernel<double><<<plan.blocks, kThreads, 0, stream>>>(p, plan.group);
  } else {
    general_kernel<float><<<plan.blocks, kThreads, 0, stream>>>(p, plan.group);
  }
}

}  // namespace fused_ce
