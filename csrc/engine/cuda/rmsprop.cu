#include "step.cuh"

FUSEDAMP_CUDA_STEP(RmsProp)
FUSEDAMP_CUDA_STEP(RmsPropMomentum)
FUSEDAMP_CUDA_STEP(RmsPropCentered)
FUSEDAMP_CUDA_STEP(RmsPropCenteredMomentum)
