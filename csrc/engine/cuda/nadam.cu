#include "step.cuh"

FUSEDAMP_CUDA_STEP(NAdam)
