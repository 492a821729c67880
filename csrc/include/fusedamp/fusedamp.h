// fusedamp for C++ programs: all public headers.
#pragma once

#include "clip.h"
#include "files.h"
#include "grad_scaler.h"
#include "optim.h"
#include "version.h"
