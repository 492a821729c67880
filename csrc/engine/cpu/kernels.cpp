// The loop bodies for one instruction set. Compiled several times, with FUSEDAMP_TARGET and compiler flags for the set.
// Includes nothing that could emit a shared inline function for it (no standard library).
#include "wide.h"  // first: the templates of math/ find its functions only if they are declared before

#include "kernels.h"

#include "../../math/bins.h"
#include "../lane.h"
#include "../tally.h"
#include "storage.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

using cpu::Chunk;
using cpu::ChunkExtremes;
using cpu::ChunkStats;
using cpu::ChunkTally;
using cpu::Norm;
using cpu::StatsJob;
using cpu::StepPass;

#include "numerics.inc"
#include "recode.inc"
#include "stats.inc"  // uses numerics
#include "tally.inc"

#include "step.inc"  // uses the tally

#include "measure.inc"  // uses both

}  // namespace FUSEDAMP_TARGET

#define FUSEDAMP_JOIN_(a, b) a##b
#define FUSEDAMP_JOIN(a, b) FUSEDAMP_JOIN_(a, b)
#define FUSEDAMP_TEXT_(a) #a
#define FUSEDAMP_TEXT(a) FUSEDAMP_TEXT_(a)

const cpu::Kernels cpu::FUSEDAMP_JOIN(kKernels_, FUSEDAMP_TARGET) = {
    FUSEDAMP_TEXT(FUSEDAMP_TARGET),
    {
#define FUSEDAMP_RULE(op, Rule) FUSEDAMP_TARGET::step<FUSEDAMP_TARGET::Rule>,
#include "../../math/optimizers.def"
    },
    {
#define FUSEDAMP_RULE(op, Rule) FUSEDAMP_TARGET::tallied_step<FUSEDAMP_TARGET::Rule>,
#include "../../math/optimizers.def"
    },
    {
#define FUSEDAMP_RULE(op, Rule) FUSEDAMP_TARGET::measure_of<FUSEDAMP_TARGET::Rule>(),
#include "../../math/optimizers.def"
    },
    {
#define FUSEDAMP_RULE(op, Rule) FUSEDAMP_TARGET::advance_rows<FUSEDAMP_TARGET::Rule>,
#include "../../math/optimizers.def"
    },
    FUSEDAMP_TARGET::stats,
    FUSEDAMP_TARGET::stats_with_extremes,
    FUSEDAMP_TARGET::histogram,
    FUSEDAMP_TARGET::unscale,
    FUSEDAMP_TARGET::recode,
};

}  // namespace fusedamp
