#include "step.cuh"

FUSEDAMP_CUDA_STEP(Adam)
FUSEDAMP_CUDA_STEP(AdamAmsgrad)
