// Tensors as elementwise losses see them: one index space, and for every operand a pointer, a dtype
// and its strides in that space. No torch type: both the CPU bodies and the CUDA kernels take
// these.
#pragma once

#include <stdint.h>

namespace fused_ce {

enum class Dtype : int32_t {
  kFloat64,
  kFloat32,
  kFloat16,
  kBFloat16,
  kBool,
  kUInt8,
  kInt8,
  kInt16,
  kInt32,
  kInt64
};

// Bytes of an element.
inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
    case Dtype::kInt64:
      return 8;
    case Dtype::kFloat32:
    case Dtype::kInt32:
      return 4;
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
    case Dtype::kInt16:
      return 2;
    default:
      return 1;
  }
}

constexpr int kMaxRank = 64;  // torch's own limit

// A tensor over the index space. `data` is null where the operand is absent.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t strides[kMaxRank];  // [rank], in elements; 0 where the operand is broadcast

  explicit operator bool() const { return data != nullptr; }
};

// The index space. Dimension 0 runs fastest; dimensions that lie behind one another in every
// operand are merged, so that a dense tensor has rank 1 whatever its shape and memory format.
struct IndexSpace {
  int rank = 0;
  int64_t sizes[kMaxRank];  // [rank]
  int64_t numel = 1;
};

// How far the operand's last element lies behind its first; -1 in an empty space.
inline int64_t last_offset(const Operand& operand, const IndexSpace& space) {
  if (space.numel == 0) return -1;
  int64_t last = 0;
  for (int d = 0; d < space.rank; ++d) last += (space.sizes[d] - 1) * operand.strides[d];
  return last;
}

// Orders the dimensions by the strides of the first operand, then merges them. `operands` must hold
// strides for all `space.rank` dimensions, outermost first; absent ones are skipped.
inline void merge_dimensions(IndexSpace& space, Operand* const* operands, int count) {
  int order[kMaxRank];
  int kept = 0;
  space.numel = 1;
  for (int i = space.rank - 1; i >= 0; --i) {
    space.numel *= space.sizes[i];
    if (space.sizes[i] == 1) continue;
    int place = kept++;
    while (place > 0 && operands[0]->strides[order[place - 1]] > operands[0]->strides[i]) {
      order[place] = order[place - 1];
      --place;
    }
    order[place] = i;
  }
  int64_t sizes[kMaxRank];
  int rank = 0;
  int last[kMaxRank];  // the innermost original dimension of each merged one
  for (int k = 0; k < kept; ++k) {
    bool merges = rank > 0;
    for (int j = 0; merges && j < count; ++j) {
      if (!*operands[j]) continue;
      const int64_t* strides = operands[j]->strides;
      merges = strides[order[k]] == strides[last[rank - 1]] * sizes[rank - 1];
    }
    if (merges) {
      sizes[rank - 1] *= space.sizes[order[k]];
    } else {
      last[rank] = order[k];
      sizes[rank++] = space.sizes[order[k]];
    }
  }
  for (int j = 0; j < count; ++j) {
    if (!*operands[j]) continue;
    int64_t strides[kMaxRank];
    for (int k = 0; k < rank; ++k) strides[k] = operands[j]->strides[last[k]];
    for (int k = 0; k < rank; ++k) operands[j]->strides[k] = strides[k];
    if (rank == 0) operands[j]->strides[0] = 1;
  }
  space.rank = rank > 0 ? rank : 1;
  for (int k = 0; k < rank; ++k) space.sizes[k] = sizes[k];
  if (rank == 0) space.sizes[0] = space.numel;
}

}  // namespace fused_ce
