#include "step.cuh"

FUSEDAMP_CUDA_STEP(AdamW)
FUSEDAMP_CUDA_STEP(AdamWAmsgrad)
