#include "step.cuh"

FUSEDAMP_CUDA_STEP(Sgd)
FUSEDAMP_CUDA_STEP(SgdMomentum)
