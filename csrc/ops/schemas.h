// Every op's schema, spelled once. All optimizers share one shape.
#pragma once

namespace fusedamp {

// The scalars that every step takes.
#define FUSEDAMP_STEP_SCALARS                                                                      \
  "float lr, float[] hyper, bool maximize=False, Tensor? lr_tensor=None, Tensor? inv_scale=None, " \
  "Tensor? clip_coef=None, Tensor? found_inf=None, "

// params, grads, masters (empty, or one per param: float32, or the int16 remainders of split masters), states (all
// first ones, then all second ones ...: float32, bfloat16, or int8, uint8 where they are never negative), steps, scales
// (of 8-bit states, in their order). seeds: of each param's random numbers, by default its index. places: where its
// elements are in a whole tensor of which it is a shard, as Placement has it (math/random.h): three numbers per param,
// or none. squares: float64 [params, 2], the norms of whole tensors that _measure_ began; by default those of the
// params. updates: float64 [params, 4], what the step changed (Tally, engine/table.h); rewritten if due, int32 [], is
// not 0 (no due: always) and the step is taken.
#define FUSEDAMP_STEP_SCHEMA(op)                                                                               \
  #op "_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] states, Tensor(d!)[] steps, " \
      "Tensor(e!)[] scales, *, " FUSEDAMP_STEP_SCALARS                                                         \
      "int[] seeds=[], bool stochastic_rounding=False, "                                                       \
      "int[] places=[], Tensor? squares=None, Tensor(f!)? updates=None, Tensor? due=None) -> ()"

// All checks of a step op, which `op` names, and nothing else.
constexpr const char* kCheckStepSchema =
    "_check_step(Tensor[] params, Tensor[] grads, Tensor[] masters, Tensor[] states, Tensor[] steps, Tensor[] scales, "
    "*, str op, " FUSEDAMP_STEP_SCALARS
    "int[] seeds=[], bool stochastic_rounding=False, int[] places=[], "
    "Tensor? squares=None, Tensor? updates=None, Tensor? due=None) -> ()";

// The first pass of a step op with norms, on the shards of one rank -> its sums of squares, float64 [params, 2], which
// added up over ranks are the step's `squares`. Masters may follow modified weights already here. 0 where found_inf is
// not 0, and for ops without norms. For fusedamp's own Python only.
constexpr const char* kMeasureSchema =
    "_measure_(Tensor[] params, Tensor[] grads, Tensor(a!)[] masters, Tensor[] states, Tensor[] steps, "
    "Tensor[] scales, *, str op, float lr, float[] hyper, bool maximize=False, Tensor? lr_tensor=None, "
    "Tensor? inv_scale=None, Tensor? clip_coef=None, Tensor? found_inf=None) -> Tensor";

// -> the places of two dense tensors that share memory, of which one is among the first `written`; -1, -1 where none do
constexpr const char* kFindSharedSchema = "_find_shared_memory(Tensor[] tensors, int written) -> (int, int)";

constexpr const char* kUnscaleSchema = "unscale_(Tensor(a!)[] grads, Tensor inv_scale, Tensor(b!) found_inf) -> ()";

// -> found_inf fp32 [], total fp64 [], per_tensor fp64 [n], counts int64 [n, 3] (inf, NaN, overflowing when unscaled)
constexpr const char* kGradStatsSchema =
    "grad_stats(Tensor[] grads, Tensor? inv_scale=None, float norm_type=2.0) -> (Tensor, Tensor, Tensor, Tensor)";

// The same over addresses that the caller has packed (packed.h says how): handing over a tensor costs about 0.5 us of
// host time, an address a tenth of that. For fusedamp's own Python only. `like` is any tensor on the device.
constexpr const char* kPackedGradStatsSchema =
    "_packed_grad_stats(Tensor rows, Tensor like, Tensor? inv_scale=None, float norm_type=2.0) -> "
    "(Tensor, Tensor, Tensor, Tensor)";

// grad_stats, and what the gradients are like as they are stored, before inv_scale. extremes fp64 [n, 3]: the largest
// |s| (inf where one is not finite), zeros, elements with 0 < |s| < 2^-14. histogram int64 [n, 64] (math/bins.h):
// rewritten where due, int32 [] on the device, is not 0
#define FUSEDAMP_NUMERICS "Tensor(a!) extremes, Tensor(b!) histogram, Tensor due"
constexpr const char* kGradNumericsSchema =
    "grad_numerics(Tensor[] grads, " FUSEDAMP_NUMERICS
    ", *, Tensor? inv_scale=None, float norm_type=2.0) -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kPackedGradNumericsSchema =
    "_packed_grad_numerics(Tensor rows, Tensor like, " FUSEDAMP_NUMERICS
    ", Tensor? inv_scale=None, float norm_type=2.0, bool lean=False, bool only_due=False) -> "
    "(Tensor, Tensor, Tensor, Tensor)";

// A step of all groups at once, from tables that the caller keeps: rows, gradients' addresses and groups as the engines
// have them (engine/table.h, packed.h). _check_plan checks each row, once; _planned_step_ checks what the tables say
// together, the scalars, and on the CPU the step counts. Given log_steps, a step adds 1 to it, and where it is skipped
// it copies counts to log_counts and log_steps to log_step: int64, as all tables. updates and due: as of a step op, for
// all rows. For fusedamp's own Python only.
constexpr const char* kCheckPlanSchema = "_check_plan(Tensor rows, Tensor groups, Tensor like) -> ()";
constexpr const char* kPlannedStepSchema =
    "_planned_step_(Tensor rows, Tensor grads, Tensor groups, Tensor like, *, Tensor? inv_scale=None, "
    "Tensor? clip_coef=None, Tensor? found_inf=None, Tensor? counts=None, Tensor(a!)? log_counts=None, "
    "Tensor(b!)? log_step=None, Tensor(c!)? log_steps=None, Tensor(d!)? updates=None, Tensor? due=None) -> ()";

// grad_stats of gradients times 1 / scale, and what follows from it. rows as _packed_grad_stats takes them
// -> inv_scale fp32 [], clip_coef fp32 [], found_inf fp32 [], norm fp32 [] (fp64 if wide), counts int64 [n, 3]
constexpr const char* kCheckGradsSchema =
    "_check_grads(Tensor rows, Tensor scale, float norm_type, float max_norm, Tensor? max_norm_tensor=None, "
    "bool wide=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";

// The same beside grad_numerics -> those, and per_tensor fp64 [n]
constexpr const char* kCheckNumericsSchema =
    "_check_numerics(Tensor rows, " FUSEDAMP_NUMERICS
    ", Tensor scale, float norm_type, float max_norm, Tensor? max_norm_tensor=None, bool wide=False) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";

// Whether the current stream of like's device records a CUDA graph, whose replays would repeat what a first step does.
// For fusedamp's C++ API only, as torch's own function is newer than the oldest torch.
constexpr const char* kIsCapturingSchema = "_is_capturing(Tensor like) -> bool";

// A master or state into another format (engine/table.h, Recoding), one tensor into another of its shape and order of
// memory. weight: whose master source is; rewritten where target is int16, and else read only. scales: of source where
// it is in 8 bits, and then read only, else of target. For fusedamp's own Python only.
constexpr const char* kRecodeSchema =
    "_recode_(Tensor source, Tensor(a!) target, Tensor(b!)? weight=None, Tensor(c!)? scales=None) -> ()";

// What a watch keeps of a step (engine/table.h, StepRecord): extremes, histogram and squares of its gradient check,
// updates of its step. Rows are tensors; n may be 0. With `advance` the step ends, and clock and due become those of
// the next one. For fusedamp's own Python only.
constexpr const char* kRecordSchema =
    "_record_(Tensor(a!) clock, Tensor(b!) due, Tensor(c!) steps, Tensor(d!) numbers, Tensor(e!) bins, "
    "Tensor(f!)? trajectory, Tensor extremes, Tensor histogram, Tensor squares, *, int every, Tensor? updates=None, "
    "Tensor? scale=None, Tensor? found_inf=None, bool only_due=False, bool advance=True) -> ()";

constexpr const char* kUpdateScaleSchema =
    "update_scale_(Tensor(a!) scale, Tensor(b!) growth_tracker, Tensor(c!)? hysteresis_tracker, Tensor found_inf, *, "
    "float growth_factor, float backoff_factor, int growth_interval, float min_scale, float max_scale, "
    "int hysteresis, bool refill_on_good_step) -> ()";

// The scale by the rule of math/headroom.h. state: int32 [584], a HeadroomState. largest: float64, the largest
// |gradient|, still times the scale.
constexpr const char* kUpdateScaleHeadroomSchema =
    "update_scale_headroom_(Tensor(a!) scale, Tensor(b!) state, Tensor found_inf, Tensor largest, *, "
    "int headroom_bits, int growth_interval, float min_scale, float max_scale) -> ()";

// Linear layers: x [M, K], weight [N, K], grad [M, N], bias [N], all in one 16-bit dtype. Sums are FP32.
// _linear, _linear_input_grad: the products alone, where torch's own are slow. For fusedamp's own Python only.
constexpr const char* kLinearSchema = "_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor";
constexpr const char* kLinearInputGradSchema = "_linear_input_grad(Tensor grad, Tensor weight) -> Tensor";
// -> y = gelu(pre), pre = x weight^T + bias: [M, N]
constexpr const char* kLinearGeluSchema = "linear_gelu(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)";
// pre [M, K], what GELU took -> its gradient [M, K], the sums of that [K] in bias_dtype (else empty)
constexpr const char* kLinearGeluInputGradSchema =
    "linear_gelu_input_grad(Tensor grad, Tensor weight, Tensor pre, *, bool bias_grad, ScalarType bias_dtype) -> "
    "(Tensor, Tensor)";
// -> grad^T x [N, K], the sums of grad [N] (else empty), both in dtype. With acc, it is added to that.
constexpr const char* kLinearWeightGradSchema =
    "linear_weight_grad(Tensor grad, Tensor x, *, ScalarType dtype, bool bias_grad) -> (Tensor, Tensor)";
constexpr const char* kLinearWeightGradAddSchema =
    "linear_weight_grad_(Tensor(a!) acc, Tensor grad, Tensor x, *, bool bias_grad) -> Tensor";

}  // namespace fusedamp
