// The op that gives a large gradient its memory. A training step frees what the next one needs
// again, and between the two malloc returns large blocks to the system; the first touch of newly
// mapped memory then takes longer than the arithmetic. So the last gradient's memory is kept.
#include "memory.h"

#include <torch/csrc/stable/library.h>

#include <mutex>
#include <utility>

#include "../tensor_operands.h"

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fused_ce {
namespace {

#if defined(__linux__)

// Torch's function of that name, or null: torch 2.10, the oldest that we load into, lacks it.
using TorchFromBlob = AOTITorchError (*)(void* data, int64_t rank,
                                         const int64_t* sizes,    // [rank]
                                         const int64_t* strides,  // [rank]
                                         int64_t storage_offset, int32_t dtype, int32_t device_type,
                                         int32_t device_index, AtenTensorHandle* tensor,
                                         int32_t layout, const uint8_t* metadata,
                                         int64_t metadata_size,
                                         void (*deleter)(void* data, void* context), void* context);
const TorchFromBlob torch_from_blob =
    reinterpret_cast<TorchFromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

// Never waited for: in a process forked while it is held it stays so, and there no block is kept.
std::mutex mutex;
Block kept;

// A new block that starts at a huge page; null where there is no memory.
Block map(size_t bytes) {
  void* mapped =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {};
  uintptr_t begin = reinterpret_cast<uintptr_t>(mapped);
  uintptr_t aligned = (begin + kHugePage - 1) & ~(kHugePage - 1);
  if (aligned > begin) munmap(mapped, aligned - begin);
  munmap(reinterpret_cast<void*>(aligned + bytes), begin + kHugePage - aligned);
  return {reinterpret_cast<void*>(aligned), bytes};
}

void unmap(const Block& block) {
  if (block.data) munmap(block.data, block.bytes);
}

// Serves from the kept block if that is at most twice as large; a smaller one makes room first.
Block take(size_t bytes) {
  bytes = (bytes + kHugePage - 1) & ~(kHugePage - 1);
  Block found;
  std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (lock && kept.bytes / 2 <= bytes) std::swap(found, kept);
  if (found.bytes >= bytes) return found;
  unmap(found);
  return map(bytes);
}

void give_back(void* data, void* bytes) {
  Block block{data, reinterpret_cast<size_t>(bytes)};
  // The pages stay, but the system may take them whenever it needs memory.
  madvise(block.data, block.bytes, MADV_FREE);
  if (std::unique_lock<std::mutex> lock(mutex, std::try_to_lock); lock) std::swap(block, kept);
  unmap(block);
}

#endif

Tensor empty_gradient(const Tensor& logits) {
  ScalarType dtype = logits.scalar_type();
#if defined(__linux__)
  if (torch_from_blob) {
    using torch::stable::detail::from;
    using torch::stable::detail::to;
    Tensor like = empty_like(logits, dtype, torch::headeronly::DeviceType::Meta);
    Block block = take(static_cast<size_t>(logits.numel() * size_of(dtype_of(dtype))));
    AtenTensorHandle handle;
    if (block.data) {
      STABLE_TORCH_ERROR_CODE_CHECK(
          torch_from_blob(block.data, like.dim(), like.sizes().data(), like.strides().data(), 0,
                          to<int32_t>(from(dtype)), aoti_torch_device_type_cpu(), -1, &handle,
                          aoti_torch_layout_strided(), nullptr, 0, give_back,
                          reinterpret_cast<void*>(block.bytes)));
      return Tensor(handle);
    }
  }
#endif
  return empty_like(logits, dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) {
  m.impl("_empty_gradient", TORCH_BOX(&empty_gradient));
}

}  // namespace fused_ce
