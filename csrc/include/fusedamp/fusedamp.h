// fusedamp for C++ programs: all public headers.
#pragma once

#include "files.h"
#include "optim.h"
#include "version.h"
