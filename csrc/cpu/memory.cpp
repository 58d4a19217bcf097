// The op that gives a large gradient its memory. A training step frees what the next one needs
// again, and between the two malloc may return it to the system; the first touch of newly mapped
// memory then takes longer than the arithmetic. So the memory of the last gradients is kept.
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

// glibc's malloc keeps blocks up to this size for good.
constexpr size_t kMostOfMalloc = size_t{32} << 20;

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
Block kept[4];  // the one that was given back last comes first

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

// The smallest kept block that holds so much, if it is at most twice as large, or a new one.
Block take(size_t bytes) {
  bytes = (bytes + kHugePage - 1) & ~(kHugePage - 1);
  if (std::unique_lock<std::mutex> lock(mutex, std::try_to_lock); lock) {
    Block* best = nullptr;
    for (Block& block : kept) {
      bool fits = block.bytes >= bytes && block.bytes / 2 <= bytes;
      if (fits && (!best || block.bytes < best->bytes)) best = &block;
    }
    if (best) return std::exchange(*best, {});
  }
  return map(bytes);
}

// Keeps a block in the place of the oldest.
void keep(Block block) {
  if (std::unique_lock<std::mutex> lock(mutex, std::try_to_lock); lock) {
    for (Block& other : kept) {
      std::swap(block, other);
      if (!block.data) return;
    }
  }
  unmap(block);
}

void give_back(void* data, void* bytes) {
  Block block{data, reinterpret_cast<size_t>(bytes)};
  // Smaller blocks malloc would keep as well. The pages of larger ones stay too, but the system may
  // take them whenever it needs memory.
  if (block.bytes > kMostOfMalloc) madvise(block.data, block.bytes, MADV_FREE);
  keep(block);
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

void release_gradients() {
#if defined(__linux__)
  std::lock_guard<std::mutex> lock(mutex);
  for (Block& block : kept) unmap(std::exchange(block, {}));
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fused_ce, CPU, m) {
  m.impl("_empty_gradient", TORCH_BOX(&empty_gradient));
}

}  // namespace fused_ce
