// Pages of memory, as far as Linux can be told.
#pragma once
#include <cstdint>

namespace fusedamp {

// Ask for huge pages where nothing has been written yet: large tables of 4 KiB pages cost a step up to a tenth of its
// time. Whole huge pages only, so that no memory is added; does nothing where the system has none to give.
void advise_huge_pages(int64_t address, int64_t bytes);

}  // namespace fusedamp
