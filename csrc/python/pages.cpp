#include "pages.h"

#include <sys/mman.h>

namespace fusedamp {

void advise_huge_pages(int64_t address, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kHuge = 2 << 20;
  const int64_t begin = (address + kHuge - 1) / kHuge * kHuge, end = (address + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#endif
}

}  // namespace fusedamp
