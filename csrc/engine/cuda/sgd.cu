#include "step.cuh"

template void fusedamp::cuda::step_with<fusedamp::Sgd>(const Device&, const std::vector<StepRow>&, const StepScalars&);
template void fusedamp::cuda::step_with<fusedamp::SgdMomentum>(const Device&, const std::vector<StepRow>&,
                                                               const StepScalars&);
