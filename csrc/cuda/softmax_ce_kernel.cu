// Softmax cross entropy on CUDA. `prepare_kernel` goes first and finds the mean's denominator;
// `general_kernel` takes any call; `plan_softmax_ce` chooses between it and the faster kernels of
// softmax_ce_rows.cu (dense rows) and softmax_ce_few.cu (few classes, or classes that lie apart).
// In all of them the block that ends last adds up the losses.
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
  if (!p.sums_weights || is_done(p.unless_one)) return;
  double weights = 0;
  int kept = 0;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if constexpr (kPlain) {
    using Labels = Group<int64_t, 2>;
    constexpr int kBatch = 4;
    const int64_t* labels = static_cast<const int64_t*>(p.target.data);
    const Labels* from = static_cast<const Labels*>(p.target.data);
    auto count = [&](int64_t label) { kept += label != p.ignore_index; };
    from += static_cast<int64_t>(blockIdx.x) * kBatch * kThreads + threadIdx.x;
    int64_t batches = p.rows.numel / (2 * kBatch * kThreads);
    for (int64_t batch = blockIdx.x; batch < batches; batch += gridDim.x) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        Labels two = from[i * kThreads];
        count(two.values[0]);
        count(two.values[1]);
      }
      from += kBatch * step;
    }
    row += batches * 2 * kBatch * kThreads;
    for (; row < p.rows.numel; row += step) count(labels[row]);
  } else {
    for (; row < p.rows.numel; row += step) {
      int64_t label = load_label(p.target.data, p.target.dtype, row_offset(p.target, p.rows, row));
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
      auto capped = cap<Precision::kFull>(k.softcap, l.raw * k.inverse_softcap);
      l.value = capped.value;
      l.slope *= capped.slope;
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
  using Sums = RowSums<Real, Terms::kWeighted>;
  struct Shared {
    Sums sums;
    Largest<Real> top, top_target;
  };
  __shared__ Shared shared[2][kWarps];
  if (is_done(p.unless_one)) return;
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
      target = load_target<Real>(p, row, lane == 0);
      r.input = row_offset(p.input, p.rows, row);
      if (p.has_probabilities) r.target = row_offset(p.target, p.rows, row);
      if (p.gradient.data != nullptr) r.gradient = row_offset(p.gradient, p.rows, row);
      if (target.is_kept && target.label >= 0) label_logit = r.logit(target.label).value;
    }
    bool reads = exists && (target.is_kept || p.reads_all);

    auto gathered = LongRowSums<Real, Terms::kWeighted>::none();
    auto top = Largest<Real>::none(), top_target = top;
#pragma unroll 1
    for (int64_t c = lane; reads && c < p.classes; c += group) {
      auto l = r.logit(c);
      gathered.admit(l.value);
      Real shifted = l.value - gathered.reference;
      Real e = Sums::exponential(shifted);
      gathered.gather(e);
      if (wants_entropy) gathered.entropy -= e * finite(shifted);
      if (p.has_coefficients) {
        Real b = r.coefficient(c);
        gathered.gather_terms(b, -b * shifted);
      }
      if (wants_top) top.offer(l.raw, c);
      if (wants_target) top_target.offer(r.probability(c), c);
    }

    Sums sums = gathered.settled();
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
    SoftmaxRow<Real> result{};
    if (reads) result = row_result(p, target, sums, label_logit, lane == 0);
    if (lane == 0) {
      loss += result.loss;
      store_result(p, row, result);
      store_prediction(p, row, top.index, wants_target ? top_target.index : target.label,
                       target.is_kept);
    }
    if (p.gradient.data == nullptr) continue;
    SoftmaxGradient<Real> g{};
    reads = reads && has_gradient(p, target);
    if (reads) g = row_gradient(p, row, target, sums, result, scale);
    TypedPointer to{p.gradient.data, p.gradient.dtype};
#pragma unroll 1
    for (int64_t c = lane; c < p.classes; c += group) {
      Real value = 0;
      if (reads) {
        auto l = r.logit(c);
        Real shifted = l.value - sums.reference;
        Real e = math::exp_shifted<Precision::kFull>(shifted);
        value = e * (g.exponential - g.entropy * finite(shifted));
        if (target.is_kept && p.has_coefficients) value -= g.coefficient * r.coefficient(c);
        if (target.is_kept && c == target.label) value -= g.label;
        value *= l.slope;
      }
      store(to, r.gradient + c * p.gradient_stride, value);
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

constexpr int kFewClasses = 32;
constexpr int64_t kMostClasses = 1 << 30;  // that an int may count, and add a step to
constexpr int kReservedBytes = 1792;       // of a block's shared memory: static, and the driver's
constexpr int kMostResident = 8;           // blocks of kThreads that a multiprocessor holds

// Whether a row begins where the one before it ends.
bool is_packed(const SoftmaxCeArguments& a) {
  if (a.rows.numel == 1) return true;
  return a.rows.rank == 1 && a.input.strides[0] == a.classes &&
         (!a.gradient || a.gradient.strides[0] == a.classes);
}

bool is_aligned(const Operand& operand) {
  return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
}

Terms terms_of(const SoftmaxCeArguments& a) {
  if (a.has_probabilities || (a.weight && a.label_smoothing > 0)) return Terms::kWeighted;
  bool is_plain = !a.entropy && !a.grad_entropy && !a.prediction && !a.correct && a.softcap == 0;
  return is_plain ? Terms::kPlain : Terms::kStatistics;
}

// Whether the logits are such as all but `general_kernel` take.
bool is_simple(const SoftmaxCeArguments& a) {
  bool same_gradient = !a.gradient || a.gradient.dtype == a.input.dtype;
  return !a.in_double && same_gradient && a.classes > 1 && a.classes < kMostClasses &&
         a.logit_scale > 0;
}

// Whether what is read for each class besides logits is such as all but `general_kernel` take.
bool has_simple_coefficients(const SoftmaxCeArguments& a) {
  auto is_simple = [&](const ClassOperand& operand) {
    return operand.dtype == a.input.dtype || operand.dtype == Dtype::kFloat32;
  };
  return (!a.has_probabilities || is_simple(a.target)) &&
         (!a.weight || (is_simple(a.weight) && a.weight.class_stride == 1));
}

bool is_dense(const SoftmaxCeArguments& a) {
  return a.input.class_stride == 1 && (!a.gradient || a.gradient.class_stride == 1) &&
         (!a.has_probabilities || a.target.class_stride == 1);
}

// Whether rows lie side by side in groups of so many, each class of which is one aligned access.
bool lies_in_groups(const SoftmaxCeArguments& a, int count) {
  auto has_groups = [&](const ClassOperand& operand) {
    if (!operand) return true;
    bool whole = operand.strides[0] == 1 && operand.class_stride % count == 0 &&
                 reinterpret_cast<uintptr_t>(operand.data) %
                         static_cast<uintptr_t>(count * size_of(operand.dtype)) ==
                     0;
    for (int d = 1; d < a.rows.rank; ++d) whole &= operand.strides[d] % count == 0;
    return whole;
  };
  return a.rows.sizes[0] % count == 0 && has_groups(a.input) && has_groups(a.gradient);
}

}  // namespace

SoftmaxCePlan plan_softmax_ce(const SoftmaxCeArguments& a, const DeviceLimits& device) {
  SoftmaxCePlan plan{};
  plan.multiprocessors = device.multiprocessors;
  int64_t rows = a.rows.numel;
  plan.cluster = 1;
  plan.terms = terms_of(a);
  const bool is_plain = plan.terms == Terms::kPlain;
  const bool is_general =
      !is_simple(a) || (plan.terms == Terms::kWeighted && !has_simple_coefficients(a));
  const int pairs = static_cast<int>(8 / size_of(a.input.dtype));  // that pair_kernel takes
  // Rows of a few classes are shared among threads without options alone.
  if (!is_general && is_dense(a) && (is_plain || a.classes > kFewClasses)) {
    // A row takes so many vectors at most, whatever its alignment.
    int64_t vectors = a.classes * size_of(a.input.dtype) / 16;
    // What a vector of logits and its probabilities take.
    int64_t vector_bytes = 16;
    if (a.has_probabilities) vector_bytes += 16 * size_of(a.target.dtype) / size_of(a.input.dtype);
    int64_t bytes = vectors * vector_bytes;
    bool packed = is_packed(a);
    // What a block may have if so many are to fit into a multiprocessor.
    auto share = [&](int blocks) {
      int64_t part = device.multiprocessor_shared_memory / blocks;
      return (part < device.shared_memory ? part : device.shared_memory) - kReservedBytes;
    };
    plan.aligned = is_aligned(a.input) && (!a.gradient || is_aligned(a.gradient));
    if (is_plain && packed && plan.aligned && a.classes == 2) {
      plan.kernel = SoftmaxCePlan::kPair;
      plan.group = 1;
    } else if (is_plain && packed && a.classes <= 128) {
      plan.kernel = SoftmaxCePlan::kFew;
      plan.group = a.classes <= 16 ? 1 : a.classes <= 24 ? 2 : a.classes <= 64 ? 4 : 8;
    } else if (is_plain && bytes * (kThreads / 8) <= share(4)) {
      plan.kernel = SoftmaxCePlan::kWarp;
      plan.group = 8;
    } else if (bytes * kWarps <= share(2)) {
      plan.kernel = SoftmaxCePlan::kWarp;
      plan.group = 32;
    } else {
      plan.kernel = SoftmaxCePlan::kBlock;
      plan.group = kThreads;
      if (a.gradient && bytes > share(3) && device.has_clusters) {
        while (plan.cluster < kMostBlocks && bytes / plan.cluster + vector_bytes > share(3)) {
          plan.cluster *= 2;
        }
        if (bytes / plan.cluster + vector_bytes > share(1)) plan.cluster = 1;
        if (plan.cluster > 1) plan.kernel = SoftmaxCePlan::kCluster;
      }
    }
    int groups = kThreads / plan.group;
    int64_t kept = (vectors + plan.cluster - 1) / plan.cluster + (vectors == 0);
    int64_t kept_bytes = kept * groups * vector_bytes;
    // Rows of a warp or a cluster are always kept. A block's need not be where only the sums are
    // wanted, and cannot be where it is too long.
    bool keeps = plan.kernel == SoftmaxCePlan::kBlock ? kept_bytes <= share(a.gradient ? 1 : 3)
                                                      : plan.kernel >= SoftmaxCePlan::kWarp;
    if (keeps) {
      plan.kept_vectors = static_cast<int>(kept);
      plan.shared_bytes = static_cast<int>(kept_bytes);
    }
    if (plan.kernel == SoftmaxCePlan::kPair) groups *= 4;
    plan.blocks = at_most((rows + groups - 1) / groups,
                          device.multiprocessors * kMostResident / plan.cluster) *
                  plan.cluster;
  } else if (!is_general && is_plain && a.classes == 2 && lies_in_groups(a, pairs)) {
    plan.kernel = SoftmaxCePlan::kPair;
    plan.group = 1;
    plan.blocks =
        at_most((rows / pairs + kThreads - 1) / kThreads, kMostResident * device.multiprocessors);
  } else if (!is_general && rows >= 64 * device.multiprocessors &&
             (a.classes <= kFewClasses || a.input.class_stride != 1)) {
    plan.kernel = SoftmaxCePlan::kSpread;
    plan.group = 1;
    // Two rows where there remains a block for every multiprocessor.
    bool fills = rows >= int64_t{2} * kThreads * device.multiprocessors;
    plan.rows = is_plain && fills && lies_in_groups(a, 2) ? 2 : 1;
    plan.blocks = at_most((rows / plan.rows + kThreads - 1) / kThreads,
                          kMostResident * device.multiprocessors);
  } else {
    plan.kernel = SoftmaxCePlan::kGeneral;
    // Neighbouring threads take neighbouring classes or, where classes lie apart, rows; unless rows
    // are too few to fill the device.
    bool few_rows = rows < 256 * device.multiprocessors;
    plan.group = a.classes > 4096 && rows < 64 * device.multiprocessors      ? kThreads
                 : a.classes > 32 && (a.input.class_stride == 1 || few_rows) ? 32
                                                                             : 1;
    plan.blocks = at_most((rows * plan.group + kThreads - 1) / kThreads,
                          kMostResident * device.multiprocessors);
  }
  // Every block of the second kernel adds up what each of the first has found.
  plan.weight_blocks = a.sums_weights() ? at_most(rows / (4 * kThreads), 128) : 1;
  bool needs = reduces(a) || a.sums_weights();
  plan.workspace_bytes = needs ? (plan.blocks + plan.weight_blocks + 1) * sizeof(double) : 0;
  return plan;
}

int compiled_architecture() {
  cudaFuncAttributes attributes{};
  cudaFuncGetAttributes(&attributes, prepare_kernel<true>);
  return attributes.ptxVersion;
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
  p.unless_one = {a.is_written ? a.grad_loss.data : nullptr, a.grad_loss.dtype};
  p.workspace = carve(workspace, plan);
  p.report = report;
  p.has_probabilities = a.has_probabilities;
  p.is_backward = a.is_backward;
  p.is_mean = a.reduction == Reduction::kMean;
  p.sums_weights = a.sums_weights();
  p.zero_on_empty = a.zero_on_empty;
  p.has_coefficients = a.has_probabilities || a.label_smoothing > 0;
  p.reads_all = a.reads_ignored();
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
                                      : static_cast<double>(a.classes > 0 ? a.rows.numel : 0);

  if (plan.workspace_bytes > 0) {
    if (p.target.dtype == Dtype::kInt64 && p.target.access == CudaOperand::kFlat &&
        p.target.aligned && p.weight.data == nullptr) {
      prepare_kernel<true><<<plan.weight_blocks, kThreads, 0, stream>>>(p);
    } else {
      prepare_kernel<false><<<plan.weight_blocks, kThreads, 0, stream>>>(p);
    }
  }
  if (a.rows.numel == 0 && !reduces(a)) return;
  if (plan.kernel >= SoftmaxCePlan::kWarp) return launch_softmax_ce_rows(p, plan, stream);
  if (plan.kernel != SoftmaxCePlan::kGeneral) return launch_softmax_ce_few(p, plan, stream);
  if (a.in_double) {
    general_kernel<double>
        <<<resident_blocks(general_kernel<double>, plan), kThreads, 0, stream>>>(p, plan.group);
  } else {
    general_kernel<float>
        <<<resident_blocks(general_kernel<float>, plan), kThreads, 0, stream>>>(p, plan.group);
  }
}

}  // namespace fused_ce
