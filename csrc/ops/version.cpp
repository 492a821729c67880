// The only symbol that the library exports.
#include "../include/fusedamp/version.h"

const char* fusedamp_version() noexcept { return FUSEDAMP_VERSION; }
