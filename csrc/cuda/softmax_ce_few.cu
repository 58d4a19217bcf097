// Softmax cross entropy of rows that a thread, or a few lanes, take: classes that lie apart, and
// few classes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "softmax_row.cuh"

namespace fused_ce {
namespace {

// Classes that lie apart: a thread takes kRows rows that lie side by side, and its neighbours' rows
// lie beside these. The second read, for the gradient, comes from cache. `alike` are logits and
// gradient that have the same strides: a row's offset costs as much as several classes.
template <class T, bool kGradient, bool kPlain, int kRows>
__global__ void __launch_bounds__(kThreads, kRows == 1 || kPlain || !kGradient ? 4 : 3)
    spread_kernel(const __grid_constant__ SoftmaxCeParams p, bool alike) {
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  using Rows = Group<T, kRows>;
  if (kGradient && !kPlain && is_done(p.unless_one)) return;
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  const float logit_scale = kPlain ? 1.0f : p.in_float.logit_scale;
  const float share = kPlain ? 0.0f : p.in_float.share;
  const bool has_coefficients = !kPlain && p.has_coefficients;
  const bool reads_all = !kPlain && p.reads_all;
  float loss = 0;

  // Calls f<kN> for the next kN classes, of which 8 fit into registers.
  auto for_classes = [&](const auto& f) {
    int left = static_cast<int>(p.classes);
#pragma unroll 1
    for (; left >= 8; left -= 8) f.template operator()<8>();
    if (left & 4) f.template operator()<4>();
    if (left & 2) f.template operator()<2>();
    if (left & 1) f.template operator()<1>();
  };
  // The logits of kN classes, for each row, from `x` on, which goes on to the next class.
  auto load_classes = [&]<int kN>(const T*& x, float (&logits)[kRows][kN]) {
    Rows raw[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i, x += p.input_stride) raw[i] = *reinterpret_cast<const Rows*>(x);
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      float of_class[kRows];
      unpack(raw[i], of_class);
#pragma unroll
      for (int r = 0; r < kRows; ++r) logits[r][i] = of_class[r];
    }
  };

  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kRows;
  int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRows;
  for (; row < p.rows.numel; row += step) {
    RowTarget<float> targets[kRows];
    bool reads = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      targets[r] = load_target<float, kPlain>(p, row + r, true);
      reads |= targets[r].is_kept || reads_all;
    }
    const int64_t offset = row_offset(p.input, p.rows, row);
    const T* x = static_cast<const T*>(p.input.data) + offset;
    using Sums = RowSums<float, Terms::kPlain>;
    Sums sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] = Sums::none();
    if (reads) {
      const T* from = x;
      for_classes([&]<int kN>() {
        float logits[kRows][kN];
        load_classes(from, logits);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r].add(logits[r], logit_scale, has_coefficients);
      });
    }

    // Of rows with a gradient; a label of -1 is none.
    bool wants[kRows], any_wants = false;
    float factor[kRows], shift[kRows], at_label[kRows];
    int labels[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const RowTarget<float>& target = targets[r];
      SoftmaxRow<float> result{};
      float label_logit = 0;
      wants[r] = false;
      labels[r] = -1;
      if (target.is_kept || reads_all) {
        sums[r].coefficients *= share;
        sums[r].cost *= share;
        if (target.label >= 0) {
          label_logit = to_real<float>(x[target.label * p.input_stride + r]) * logit_scale;
        }
        result = row_result<kPlain>(p, target, sums[r], label_logit, true);
        if (kGradient && has_gradient<kPlain>(p, target)) {
          auto g = row_gradient<kPlain>(p, row + r, target, sums[r], result, scale);
          factor[r] = g.exponential * logit_scale;
          shift[r] = share == 0 ? 0.0f : -g.coefficient * share * logit_scale;
          float e = math::exp_shifted<kPrecision>(label_logit - sums[r].reference);
          at_label[r] = fmaf(e, factor[r], shift[r]) - g.label * logit_scale;
          labels[r] = static_cast<int>(target.label);
          wants[r] = any_wants = true;
        }
      }
      loss += result.loss;
      if constexpr (!kPlain) store_result(p, row + r, result);
    }

    if constexpr (kGradient) {
      T* dx = static_cast<T*>(p.gradient.data);
      dx += alike ? offset : row_offset(p.gradient, p.rows, row);
      T* to = dx;
      if (!any_wants) {
        float none[kRows] = {};
        for (int64_t c = 0; c < p.classes; ++c, to += p.gradient_stride) {
          store_whole(reinterpret_cast<Rows*>(to), none);
        }
        continue;
      }
      const T* from = x;
      for_classes([&]<int kN>() {
        float logits[kRows][kN];
        load_classes(from, logits);
#pragma unroll
        for (int i = 0; i < kN; ++i, to += p.gradient_stride) {
          float gradients[kRows];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float shifted = fmaf(logits[r][i], logit_scale, -sums[r].reference);
            float g = fmaf(math::exp_shifted<kPrecision>(shifted), factor[r], shift[r]);
            // An ignored row may hold anything.
            gradients[r] = kRows == 1 || wants[r] ? g : 0.0f;
          }
          store_whole(reinterpret_cast<Rows*>(to), gradients);
        }
      });
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (labels[r] >= 0) dx[labels[r] * p.gradient_stride + r] = from_real<T>(at_label[r]);
      }
    }
  }
  if (p.loss_scalar.data != nullptr) reduce_loss(p, loss, factors);
}

// A few classes, dense in memory from row to row: blocks copy rows to shared memory and gradients
// back in vectors of 16 bytes, and kGroup lanes take a row in between, each up to kPerLane of its
// classes, which stay in registers. kFewest of these there are for certain.
template <class T, bool kGradient, bool kPlain, int kGroup, int kPerLane, int kFewest>
__global__ void __launch_bounds__(kThreads, 3)
    few_kernel(const __grid_constant__ SoftmaxCeParams p, bool aligned) {
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  constexpr int kCount = 16 / sizeof(T);
  constexpr int kVectors = (kPerLane + kCount - 1) / kCount;  // that a thread copies at most
  // A lane's exponentials go to so many sums in turn: the roundings of a single one would add up.
  constexpr int kSums = kPrecision == Precision::kHalf ? 1 : kPerLane > 4 ? 4 : 2;
  constexpr int kSureVectors = kFewest / kCount > 0 ? kFewest / kCount : 1;  // of a full tile
  using Vector = Group<T, kCount>;
  constexpr int kRows = kThreads / kGroup;
  // Rows of a power of two of vectors would all begin on the same few banks: a vector is left free
  // after each. Of the numbers of classes that an instance takes only the largest may be one.
  constexpr bool kMayPad = (kPerLane & (kPerLane - 1)) == 0;
  __shared__ alignas(16) T tile[kThreads * kPerLane + (kMayPad ? kRows * kCount : 0)];
  if (kGradient && !kPlain && is_done(p.unless_one)) return;
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  const float logit_scale = kPlain ? 1.0f : p.in_float.logit_scale;
  const float share = kPlain ? 0.0f : p.in_float.share;
  const int classes = static_cast<int>(p.classes);
  const int lane = threadIdx.x % kGroup;
  constexpr int kRowVectors = kGroup * kPerLane / kCount;
  const bool pads = kMayPad && kRowVectors > 1 && aligned && classes == kGroup * kPerLane;
  const int row_stride = classes + (pads ? kCount : 0);
  const int shift = pads ? __ffs(kRowVectors) - 1 : 31;
  const int next_slot = kThreads + (kThreads >> shift);
  Vector* const slots = reinterpret_cast<Vector*>(tile) + threadIdx.x + (threadIdx.x >> shift);
  float loss = 0;

  int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  const T* x = static_cast<const T*>(p.input.data) + first * classes;
  T* dx = static_cast<T*>(p.gradient.data) + first * classes;
  for (; first < p.rows.numel; first += step, x += step * classes, dx += step * classes) {
    int64_t left = p.rows.numel - first;
    const int rows = left < kRows ? static_cast<int>(left) : kRows;
    const int count = rows * classes;
    const int vectors = aligned ? static_cast<unsigned>(count) / kCount : 0;
    const int copied = vectors - static_cast<int>(threadIdx.x);  // from this thread's first on
    // Calls f(i) for the vectors i kThreads from its first on that this thread copies.
    auto for_vectors = [&](const auto& f) {
      if (copied > (kSureVectors - 1) * kThreads) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (i < kSureVectors || i * kThreads < copied) f(i);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kSureVectors; ++i) {
          if (i * kThreads < copied) f(i);
        }
      }
    };
    const Vector* from = reinterpret_cast<const Vector*>(x) + threadIdx.x;
    for_vectors([&](int i) { slots[i * next_slot] = from[i * kThreads]; });
    if (vectors * kCount != count) {
#pragma unroll 1
      for (int i = vectors * kCount + threadIdx.x; i < count; i += kThreads) tile[i] = x[i];
    }
    __syncthreads();

    // Threads without a row do the last one's work, and drop it.
    const bool exists = threadIdx.x / kGroup < rows;
    const int place = exists ? threadIdx.x / kGroup : rows - 1;
    int64_t row = first + place;
    T* const mine = tile + place * row_stride + lane;  // every kGroup-th is this lane's
    RowTarget<float> target = load_target<float, kPlain>(p, row, lane == 0);
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
    auto sums = RowSums<float, Terms::kPlain>::none();
    sums.reference = warp_max<kGroup>(top);
    // From the logits in `e`, or again from those in the tile.
    auto exponentiate = [&]<bool kFinite>() {
      float parts[kSums] = {};
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i >= kFewest && i * kGroup >= end) break;
        if (!kFinite) e[i] = to_real<float>(mine[i * kGroup]) * logit_scale;
        e[i] -= sums.reference;
        if (kFinite && !kPlain && p.has_coefficients) sums.cost -= e[i];
        e[i] = math::exp_shifted<kPrecision, kFinite>(e[i]);
        parts[i % kSums] = i < kSums ? e[i] : parts[i % kSums] + e[i];
      }
      sums.exponentials = pairwise_sum(parts);
    };
    exponentiate.template operator()<true>();
    if (sums.exponentials != sums.exponentials) {
      asm volatile("" ::: "memory");  // so that registers keep nothing for so rare a row
      exponentiate.template operator()<false>();
    }
    sums.exponentials = warp_sum<kGroup>(sums.exponentials);
    if (!kPlain && p.has_coefficients) {
      sums.cost = share * warp_sum<kGroup>(sums.cost);
      sums.coefficients = share * static_cast<float>(classes);
    }
    float label_logit = 0;
    if (reads && label >= 0) label_logit = to_real<float>(mine[label - lane]) * logit_scale;
    SoftmaxRow<float> result{};
    if (reads) result = row_result<kPlain>(p, target, sums, label_logit, lane == 0);
    if (lane == 0 && exists) {
      loss += result.loss;
      if constexpr (!kPlain) store_result(p, row, result);
    }

    if constexpr (kGradient) {
      __syncthreads();  // all have read their row, and the label's logit
      if (reads && has_gradient<kPlain>(p, target)) {
        auto g = row_gradient<kPlain>(p, row, target, sums, result, scale);
        const float factor = g.exponential * logit_scale;
        const float shift = share == 0 ? 0.0f : -g.coefficient * share * logit_scale;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (i >= kFewest && i * kGroup >= end) break;
          if (exists) mine[i * kGroup] = from_real<T>(fmaf(e[i], factor, shift));
        }
        if (exists && label >= 0 && label % kGroup == lane) {
          T& at_label = mine[label - lane];
          if constexpr (sizeof(T) == sizeof(float)) {
            at_label -= g.label * logit_scale;
          } else {  // which has been rounded
            float label_e = math::exp_shifted<kPrecision>(label_logit - sums.reference);
            at_label = from_real<T>(fmaf(label_e, factor, shift) - g.label * logit_scale);
          }
        }
      } else if (exists) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          if (i >= kFewest && i * kGroup >= end) break;
          mine[i * kGroup] = from_real<T>(0.0f);
        }
      }
      __syncthreads();
      Vector* to = reinterpret_cast<Vector*>(dx) + threadIdx.x;
      for_vectors([&](int i) { to[i * kThreads] = slots[i * next_slot]; });
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
  constexpr Precision kPrecision = sizeof(T) == 2 ? Precision::kHalf : Precision::kFull;
  constexpr int kRows = 8 / sizeof(T);
  using Vector = Group<T, 2 * kRows>;
  if (kGradient && !kPlain && is_done(p.unless_one)) return;
  const Scale factors = load_scale(p);
  const float scale = static_cast<float>(factors.inverse);
  float loss = 0;

  struct Pair {
    float e, upper;  // of the two probabilities, upper and e * upper, the larger
    float log_sum;   // log(1 + e)
    float loss;      // of the label
    float other;     // the probability of the other class
  };
  // `margin` is that of the other class over the label's, `below` the one of the two signs that is
  // not above 0.
  auto pair_of = []<bool kFinite>(float margin, float below, std::bool_constant<kFinite>) {
    Pair r;
    r.e = math::exp_shifted<kPrecision, kFinite>(below);
    r.upper = math::reciprocal(1 + r.e);
    r.log_sum = math::log1p_unit<Precision::kFull>(r.e);
    r.loss = fmaxf(margin, 0.0f) + r.log_sum;
    r.other = (margin >= 0 ? 1.0f : r.e) * r.upper;
    return r;
  };
  // The gradients take the place of the logits.
  auto evaluate = [&](int64_t row, float& x0, float& x1) {
    RowTarget<float> target = load_target<float>(p, row, true);
    SoftmaxRow<float> result{};
    float g0 = 0, g1 = 0;
    if (target.is_kept || p.reads_all) {
      const float logit_scale = p.in_float.logit_scale, share = p.in_float.share;
      const float z_loss = p.in_float.z_loss;
      float l0 = x0 * logit_scale, l1 = x1 * logit_scale;
      float margin = target.label == 1 ? l0 - l1 : l1 - l0;
      // An infinite logit makes the row NaN, as in torch, unless it is the smaller one.
      float top = fmaxf(l0, l1);
      if (top > kGreatest<float>) margin = quiet_nan<float>();
      Pair r = pair_of(margin, -fabsf(margin), std::false_type());
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
  // of bounds or the logits too far apart for the exponential's correction.
  using Labels = Group<int64_t, kRows>;
  constexpr float kFarthest = -1e4f;
  auto evaluate_plain = [&](const Labels& labels, const float (&values)[2 * kRows],
                            float (&gradients)[2 * kRows]) {
    float sum = 0, farthest = 0;
    bool is_rare = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int64_t label = labels.values[i];
      bool is_kept = label != p.ignore_index, is_second = label == 1;
      float difference = values[2 * i + 1] - values[2 * i], opposite = -difference;
      float below = fminf(difference, opposite);
      is_rare |= static_cast<uint64_t>(label) > 1 && is_kept;
      farthest = i == 0 ? below : fminf(farthest, below);
      Pair r = pair_of(is_second ? opposite : difference, below, std::true_type());
      float one = is_kept ? r.loss : 0.0f;
      sum = i == 0 ? one : sum + one;
      gradients[2 * i + 1] = is_kept ? r.other * (is_second ? -scale : scale) : 0.0f;
      gradients[2 * i] = -gradients[2 * i + 1];
    }
    if (is_rare || farthest < kFarthest) return false;
    loss += sum;
    return true;
  };

  int64_t vectors = p.rows.numel / kRows;
  int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const Vector* from = static_cast<const Vector*>(p.input.data) + at;
  Vector* to = static_cast<Vector*>(p.gradient.data) + at;
  const Labels* labels = static_cast<const Labels*>(p.target.data) + at;  // where plain
  for (int64_t v = at; v < vectors; v += step, from += step, to += step, labels += step) {
    Vector raw = *from;
    float values[2 * kRows];
    unpack(raw, values);
    if constexpr (kPlain) {
      float gradients[2 * kRows];
      if (evaluate_plain(*labels, values, gradients)) {
        if constexpr (kGradient) {
          pack(gradients, raw);
          *to = raw;
        }
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) evaluate(v * kRows + i, values[2 * i], values[2 * i + 1]);
    if constexpr (kGradient) {
      pack(values, raw);
      *to = raw;
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

template <class T, bool kGradient, bool kPlain, int kGroup, int kPerLane, int kFewest>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  auto kernel = few_kernel<T, kGradient, kPlain, kGroup, kPerLane, kFewest>;
  kernel<<<resident_blocks(kernel, plan), kThreads, 0, stream>>>(p, plan.aligned);
}

template <class T, bool kGradient, bool kPlain>
void launch_spread(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  bool alike = std::equal(p.input.strides, p.input.strides + p.rows.rank, p.gradient.strides);
  auto* kernel = plan.rows == 2 ? spread_kernel<T, kGradient, kPlain, 2>
                                : spread_kernel<T, kGradient, kPlain, 1>;
  kernel<<<resident_blocks(kernel, plan), kThreads, 0, stream>>>(p, alike);
}

template <class T, bool kGradient, bool kPlain>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  if (plan.kernel == SoftmaxCePlan::kSpread) {
    launch_spread<T, kGradient, kPlain>(p, plan, stream);
  } else if (plan.kernel == SoftmaxCePlan::kPair) {
    auto kernel = pair_kernel<T, kGradient, kPlain>;
    kernel<<<resident_blocks(kernel, plan), kThreads, 0, stream>>>(p);
  } else if (plan.group == 8) {
    launch_few<T, kGradient, kPlain, 8, 16, 8>(p, plan, stream);
  } else if (plan.group == 4) {
    if (p.classes <= 32) {
      launch_few<T, kGradient, kPlain, 4, 8, 6>(p, plan, stream);
    } else {
      launch_few<T, kGradient, kPlain, 4, 16, 8>(p, plan, stream);
    }
  } else if (plan.group == 2) {
    launch_few<T, kGradient, kPlain, 2, 12, 8>(p, plan, stream);
  } else if (!kPlain) {
    launch_few<T, kGradient, kPlain, 1, 16, 2>(p, plan, stream);
  } else if (p.classes <= 4) {
    launch_few<T, kGradient, kPlain, 1, 4, 2>(p, plan, stream);
  } else if (p.classes <= 8) {
    launch_few<T, kGradient, kPlain, 1, 8, 5>(p, plan, stream);
  } else if (p.classes <= 10) {
    launch_few<T, kGradient, kPlain, 1, 10, 9>(p, plan, stream);
  } else {
    launch_few<T, kGradient, kPlain, 1, 16, 11>(p, plan, stream);
  }
}

template <class T, bool kGradient>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  bool plain = !p.has_coefficients && !p.is_backward && !p.reads_all && !p.weight.data &&
               !p.sample_weight.data && !p.loss.data && p.in_float.z_loss == 0 &&
               p.in_float.logit_scale == 1 && p.in_float.keep == 1 &&
               p.target.dtype == Dtype::kInt64 && p.target.access == CudaOperand::kFlat &&
               (plan.kernel != SoftmaxCePlan::kPair || p.target.aligned);
  if (plain) {
    launch_few<T, kGradient, true>(p, plan, stream);
  } else {
    launch_few<T, kGradient, false>(p, plan, stream);
  }
}

template <class T>
void launch_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan, cudaStream_t stream) {
  if (p.gradient.data != nullptr) {
    launch_few<T, true>(p, plan, stream);
  } else {
    launch_few<T, false>(p, plan, stream);
  }
}

}  // namespace

void launch_softmax_ce_few(const SoftmaxCeParams& p, const SoftmaxCePlan& plan,
                           cudaStream_t stream) {
  switch (p.input.dtype) {
    case Dtype::kBFloat16:
      return launch_few<__nv_bfloat16>(p, plan, stream);
    case Dtype::kFloat16:
      return launch_few<__half>(p, plan, stream);
    default:
      return launch_few<float>(p, plan, stream);
  }
}

}  // namespace fused_ce
