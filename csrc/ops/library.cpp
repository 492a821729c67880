// Declares every op. Each device's object registers its kernels for them.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY(fusedamp, m) {
  m.def(fusedamp::kCheckStepSchema);
  m.def(fusedamp::kMeasureSchema);
  m.def(fusedamp::kFindSharedSchema);
  m.def(fusedamp::kUnscaleSchema);
  m.def(fusedamp::kGradStatsSchema);
  m.def(fusedamp::kGradNumericsSchema);
  m.def(fusedamp::kUpdateScaleSchema);
  m.def(fusedamp::kUpdateScaleHeadroomSchema);
  m.def(fusedamp::kPackedGradStatsSchema);
  m.def(fusedamp::kPackedGradNumericsSchema);
  m.def(fusedamp::kCheckPlanSchema);
  m.def(fusedamp::kPlannedStepSchema);
  m.def(fusedamp::kCheckGradsSchema);
  m.def(fusedamp::kCheckNumericsSchema);
  m.def(fusedamp::kIsCapturingSchema);
  m.def(fusedamp::kRecodeSchema);
  m.def(fusedamp::kRecordSchema);
  m.def(fusedamp::kLinearSchema);
  m.def(fusedamp::kLinearInputGradSchema);
  m.def(fusedamp::kLinearGeluSchema);
  m.def(fusedamp::kLinearGeluInputGradSchema);
  m.def(fusedamp::kLinearWeightGradSchema);
  m.def(fusedamp::kLinearWeightGradAddSchema);
  m.def("_product_uses() -> str");  // what cuBLASLt was asked for (engine/cuda/lt_gemm.h)
  m.def("_cpu_origin() -> str");    // version and hash of the sources, as setup.py writes them
  m.def("_cuda_origin() -> str");
  m.def("cpu_target() -> str");                  // the instruction set that the CPU ops run on
  m.def("step_ops() -> str");                    // the names of all step ops, separated by blanks
  m.def("_rule_of(str op, int states) -> int");  // the number of the rule that has so many states per param
  m.def("_hyper_names(str op) -> str");          // of what is in an op's `hyper`, separated by blanks
#define FUSEDAMP_OP(op, Hyper, names) m.def(FUSEDAMP_STEP_SCHEMA(op));
#include "../math/optimizers.def"
}
