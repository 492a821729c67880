#include "step.cuh"

template void fusedamp::cuda::step_with<fusedamp::Adam>(const Device&, const std::vector<StepRow>&, const StepScalars&);
template void fusedamp::cuda::step_with<fusedamp::AdamAmsgrad>(const Device&, const std::vector<StepRow>&,
                                                               const StepScalars&);
