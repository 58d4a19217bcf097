// From torch::stable::Tensor to the operands of elementwise.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "elementwise.h"

namespace fused_ce {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Bool:
      return Dtype::kBool;
    case ScalarType::Byte:
      return Dtype::kUInt8;
    case ScalarType::Char:
      return Dtype::kInt8;
    case ScalarType::Short:
      return Dtype::kInt16;
    case ScalarType::Int:
      return Dtype::kInt32;
    case ScalarType::Long:
      return Dtype::kInt64;
    default:
      STD_TORCH_CHECK(false, "fused_ce: unsupported dtype");
  }
}

inline bool is_float(ScalarType type) { return dtype_of(type) <= Dtype::kBFloat16; }

inline bool is_half(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() == like.is_cpu() && tensor.get_device_index() == like.get_device_index(),
      "Expected all tensors to be on the same device, but ", name, " is not on the input's");
}

inline IndexSpace space_of(const Tensor& tensor) {
  IndexSpace space;
  auto sizes = tensor.sizes();
  space.rank = static_cast<int>(sizes.size());
  space.numel = tensor.numel();
  for (int i = 0; i < space.rank; ++i) space.sizes[i] = sizes[i];
  return space;
}

// The operand for `tensor`, broadcast (trailing-aligned) to the space. Its own device must be
// `like`'s.
inline void set_operand(Operand& operand, const Tensor& tensor, const IndexSpace& space,
                        const Tensor& like, const char* name) {
  check_device(tensor, like, name);
  auto sizes = tensor.sizes();
  auto strides = tensor.strides();
  int shift = space.rank - static_cast<int>(sizes.size());
  STD_TORCH_CHECK(shift >= 0, name, " has more dimensions than the input");
  for (int i = 0; i < space.rank; ++i) {
    int64_t size = i < shift ? 1 : sizes[i - shift];
    STD_TORCH_CHECK(size == 1 || size == space.sizes[i], name,
                    " cannot be broadcast to the input's shape");
    operand.strides[i] = size == 1 ? 0 : strides[i - shift];
  }
  // A tensor without elements has no address; the space is empty too, and nothing is read.
  operand.data = space.numel == 0 ? &operand : tensor.data_ptr();
  operand.dtype = dtype_of(tensor.scalar_type());
}

inline void set_operand(Operand& operand, const std::optional<Tensor>& tensor,
                        const IndexSpace& space, const Tensor& like, const char* name) {
  if (tensor.has_value()) set_operand(operand, *tensor, space, like, name);
}

inline void set_scalar(Operand& operand, const std::optional<Tensor>& tensor, const Tensor& like,
                       const char* name) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(tensor->numel() == 1, name, " must have one element");
  set_operand(operand, *tensor, IndexSpace{}, like, name);
}

inline Tensor empty_strided(const Tensor& like, ScalarType dtype, int64_t rank,
                            const int64_t* sizes,      // [rank]
                            const int64_t* strides) {  // [rank]
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, strides,
                                                         to<int32_t>(from(dtype)), device_type,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_like(const Tensor& like, ScalarType dtype,
                         std::optional<torch::stable::Device> device = std::nullopt) {
  using torch::stable::detail::from;
  StableIValue stack[] = {from(like),   from(std::optional(dtype)), from(std::nullopt),
                          from(device), from(std::nullopt),         from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace fused_ce
