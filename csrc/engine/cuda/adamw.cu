#include "step.cuh"

template void fusedamp::cuda::step_with<fusedamp::AdamW>(const Device&, const std::vector<StepRow>&,
                                                         const StepScalars&);
template void fusedamp::cuda::step_with<fusedamp::AdamWAmsgrad>(const Device&, const std::vector<StepRow>&,
                                                                const StepScalars&);
