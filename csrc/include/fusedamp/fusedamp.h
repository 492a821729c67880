#pragma once
#include "files.h"
#include "optim.h"
