// Huge pages, on Linux.
#pragma once
#include <cstdint>

namespace fusedamp {

// Asks for huge pages in memory that was not written yet: 4 KiB pages cost a step up to a tenth of its time. Only whole
// huge pages, so no memory is added; does nothing if the system has none.
void advise_huge_pages(int64_t address, int64_t bytes);

}  // namespace fusedamp
