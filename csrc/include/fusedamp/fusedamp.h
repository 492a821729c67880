// fusedamp for C++ programs: all public headers.
#pragma once

#include "version.h"
