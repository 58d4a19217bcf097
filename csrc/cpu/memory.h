// Huge pages, which large buffers need to be fast.
#pragma once

#include "../elementwise.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_ce {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;

// Asks for 2 MiB pages under a large fresh buffer whose last element lies `last` elements behind
// its first. Its first touch then costs a quarter of what 4 KiB pages do, and for a large gradient
// that is more than the arithmetic. Advice only: where the kernel has no huge pages to give,
// nothing changes.
inline void use_huge_pages(const Operand& operand, int64_t last) {
#if defined(__linux__)
  if (last <= 0) return;
  uintptr_t begin = reinterpret_cast<uintptr_t>(operand.data);
  uintptr_t end = begin + static_cast<uintptr_t>((last + 1) * size_of(operand.dtype));
  begin = (begin + kHugePage - 1) & ~(kHugePage - 1);
  end &= ~(kHugePage - 1);
  if (end > begin + kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Gives back to the system what is kept of freed gradients.
void release_gradients();

}  // namespace fused_ce
