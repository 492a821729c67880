#include "rows.h"

#include "../math/bins.h"
#include "../math/count.h"
#include "../math/quantize.h"

namespace fusedamp {
namespace {

bool never_negative(RuleId rule, size_t state) {
  static constexpr int kMasks[] = {
#define FUSEDAMP_RULE(op, Rule) Rule::kNonNegative,
#include "../math/optimizers.def"
  };
  return kMasks[rule] >> state & 1;
}

DType master_dtype(const std::string& op, const Name& name, const Tensor& master, const Name& like,
                   const Tensor& param) {
  if (master.scalar_type() == ScalarType::Float) return DType::f32;
  if (master.scalar_type() == ScalarType::Short) return DType::i16;
  fail(op, name, " is ", dtype_name(master), "; expected float32, or int16 for a split master, because ", like, " is ",
       dtype_name(param));
}

// All 8-bit states are i8 to the engines, which know their signs from the rule.
DType state_dtype(const std::string& op, const Name& name, const Tensor& state, bool never_negative, const Name& like,
                  const Tensor& param) {
  const ScalarType got = state.scalar_type();
  if (param.scalar_type() == ScalarType::Double) {
    need_dtype(op, name, state, ScalarType::Double, like, param);
    return DType::f64;
  }
  if (got == ScalarType::Float) return DType::f32;
  if (got == ScalarType::BFloat16) return DType::bf16;
  if (got == (never_negative ? ScalarType::Byte : ScalarType::Char)) return DType::i8;
  fail(op, name, " is ", dtype_name(state), "; expected float32, bfloat16, or ", never_negative ? "uint8" : "int8",
       " with scales, because ", like, " is ", dtype_name(param));
}

float* scales_at(const std::string& op, size_t k, const Tensor& scales, const Tensor& param) {
  const Name name = at("scales", k);
  need_device(op, name, scales, {"params"}, param);
  const int64_t wanted = (param.numel() + kScaleBlock - 1) / kScaleBlock;
  if (scales.scalar_type() != ScalarType::Float || scales.numel() != wanted || !scales.is_contiguous())
    fail(op, name, " is ", dtype_name(scales), " of shape ", list_text(scales.sizes()),
         "; expected contiguous float32 [", wanted, "], one for each ", kScaleBlock, " elements of the param");
  return static_cast<float*>(data_of(op, name, scales));
}

// How many of the op's lists of states hold scalars, one element for each parameter: the last ones.
size_t scalar_lists(const std::string& op) {
#define FUSEDAMP_RULE(rule_op, Rule) \
  if (op == #rule_op "_") return Rule::kScalars;
#include "../math/optimizers.def"
  return 0;
}

constexpr size_t word_count(const char* text) {
  size_t count = *text ? 1 : 0;
  for (; *text; ++text) count += *text == ' ';
  return count;
}

// Where the elements of params[i] are in a whole tensor; throws unless each has a place of its own.
Placement place_at(const std::string& op, const int64_t* place, size_t i, int64_t numel) {
  const auto [first, run, stride] = Placement{place[0], place[1], place[2]};
  constexpr int64_t most = std::numeric_limits<int64_t>::max() / 4;
  const bool fits = first >= 0 && first < most && run >= 0 && stride >= 0 &&
                    (run == 0 ? numel < most : stride >= run && numel / run < most / stride);
  if (!fits)
    fail(op, "places of params[", i, "] are ", first, ", ", run, ", ", stride, "; expected its first element, the ",
         "length of a run and the distance of runs in the whole tensor: 0 or more, and runs apart. A run of 0 is ",
         "all of it");
  return {first, run, stride};
}

// The sums over all ranks of a rule's norms; null where there are none.
double* squares_of(const std::string& op, const StepLists& lists) {
  if (!lists.squares) return nullptr;
  const Tensor& squares = *lists.squares;
  const auto n = static_cast<int64_t>(lists.params.size());
  need_device(op, {"squares"}, squares, at("params", 0), lists.params[0]);
  if (squares.scalar_type() != ScalarType::Double || !squares.is_contiguous() || squares.numel() != n * kMaxNorms)
    fail(op, "squares is ", dtype_name(squares), " of shape ", list_text(squares.sizes()), "; expected contiguous ",
         "float64 [", n, ", ", kMaxNorms, "]");
  return static_cast<double*>(squares.data_ptr());
}

// Throws if `updates` shares memory with one of the tensors that the step only reads.
void need_own_updates(const std::string& op, const StepLists& lists,
                      const std::vector<std::pair<const char*, const OptionalTensor&>>& read) {
  if (!lists.updates) return;
  std::vector<Span> spans;
  add_span(spans, true, {"updates"}, *lists.updates);
  for (const auto& [name, tensor] : read)
    if (tensor) add_span(spans, false, {name}, *tensor);
  need_own_memory(op, spans);
}

}  // namespace

StepRows step_rows(const std::string& op, RuleId rule, const StepLists& lists, GroupFlags flags) {
  const size_t n = lists.params.size();
  need_length(op, "grads", lists.grads.size(), n, "one per param");
  need_length(op, "steps", lists.steps.size(), n, "one per param");
  if (!lists.masters.empty()) need_length(op, "masters", lists.masters.size(), n, "one per param, or none at all");
  if (!lists.seeds.empty() && lists.seeds.size() != n)
    fail(op, "seeds has ", lists.seeds.size(), " numbers; expected ", n, ", one per param, or none at all");
  if (!lists.places.empty() && lists.places.size() != 3 * n)
    fail(op, "places has ", lists.places.size(), " numbers; expected ", 3 * n, ", three per param, or none at all");
  double* const squares = squares_of(op, lists);

  const size_t all_lists = lists.states.size() / n, tensor_lists = all_lists - scalar_lists(op);
  if (lists.scales.size() % n != 0 || lists.scales.size() > tensor_lists * n)
    fail(op, "scales has ", lists.scales.size(), " tensors; expected one per 8-bit state, or none at all");
  StepRows table = {std::vector<StepRow>(n), std::vector<void*>(n)};
  std::vector<Span> spans;
  spans.reserve(n * 7);
  for (size_t i = 0; i < n; ++i) {
    const Tensor& param = lists.params[i];
    StepRow& row = table.rows[i];
    const Name name = at("params", i);
    need_device(op, name, param, at("params", 0), lists.params[0]);
    row.param_dtype = dtype_of(op, name, param);
    row.param = data_of(op, name, param);
    row.numel = param.numel();
    row.maximize = flags.maximize;
    row.stochastic = flags.stochastic;
    row.seed = lists.seeds.empty() ? static_cast<int64_t>(i) : lists.seeds[i];
    if (!lists.places.empty()) row.place = place_at(op, lists.places.data() + 3 * i, i, row.numel);
    if (squares) row.squares = squares + kMaxNorms * i;

    row.grad_dtype = dtype_of(op, at("grads", i), lists.grads[i]);
    table.grads[i] = data_like(op, "grads", i, lists.grads[i], param);
    if (row.grad_dtype == DType::f64 && row.param_dtype != DType::f64)
      fail(op, at("grads", i), " is float64; expected at most float32, because ", name, " is ", dtype_name(param),
           ". Cast the gradient");

    add_span(spans, true, name, param, row.param, size_of(row.param_dtype));
    add_span(spans, false, at("grads", i), lists.grads[i], table.grads[i], size_of(row.grad_dtype));
    row.master_dtype = DType::f32;
    if (!lists.masters.empty()) {
      if (!is_16bit(row.param_dtype))
        fail(op, name, " is ", dtype_name(param),
             " and has a master; expected float16 or bfloat16. Step it in a call of ", "its own, without masters");
      row.master_dtype = master_dtype(op, at("masters", i), lists.masters[i], name, param);
      row.master = data_like(op, "masters", i, lists.masters[i], param);
      add_span(spans, true, at("masters", i), lists.masters[i], row.master, size_of(row.master_dtype));
    }
    row.state_dtype = row.param_dtype == DType::f64 ? DType::f64 : DType::f32;
    for (size_t j = 0; j < tensor_lists; ++j) {
      const size_t k = j * n + i;
      const Tensor& state = lists.states[k];
      const DType found = state_dtype(op, at("states", k), state, never_negative(rule, j), name, param);
      if (j > 0 && found != row.state_dtype)
        fail(op, at("states", k), " is ", dtype_name(state), " beside ", at("states", i), ", which is ",
             dtype_name(lists.states[i]), "; expected one storage format for all states of ", name);
      row.state_dtype = found;
      row.states[j] = data_like(op, "states", k, state, param);
      add_span(spans, true, at("states", k), state, row.states[j], size_of(found));
      if (found != DType::i8) {
        if (k < lists.scales.size() && lists.scales[k].numel() != 0)
          fail(op, at("scales", k), " has shape ", list_text(lists.scales[k].sizes()), "; expected none, or an empty ",
               "tensor, as ", at("states", k), " is ", dtype_name(state), ". Pass scales of 8-bit states only");
        continue;
      }
      if (k >= lists.scales.size())
        fail(op, at("states", k), " is ", dtype_name(state), " without scales; expected one float32 for each ",
             kScaleBlock, " of its elements. Pass scales");
      row.scales[j] = scales_at(op, k, lists.scales[k], param);
      add_span(spans, true, at("scales", k), lists.scales[k], row.scales[j], sizeof(float));
    }
    for (size_t j = tensor_lists; j < all_lists; ++j)
      row.states[j] = one_element<double>(op, at("states", j * n + i), lists.states[j * n + i], param,
                                          ScalarType::Double, "float64");
    row.step = one_element<float>(op, at("steps", i), lists.steps[i], param, ScalarType::Float, "float32");
    for (size_t j = tensor_lists; j < all_lists; ++j)
      add_span(spans, true, at("states", j * n + i), lists.states[j * n + i], row.states[j], sizeof(double));
    add_span(spans, true, at("steps", i), lists.steps[i], row.step, sizeof(float));
  }
  if (lists.updates) add_span(spans, true, {"updates"}, *lists.updates);
  if (lists.due) add_span(spans, false, {"due"}, *lists.due);
  need_own_memory(op, spans);
  return table;
}

std::vector<GradRow> grad_rows(const std::string& op, const Tensors& grads, bool written) {
  std::vector<GradRow> rows(grads.size());
  std::vector<Span> spans;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Name name = at("grads", i);
    need_device(op, name, grads[i], at("grads", 0), grads[0]);
    rows[i].dtype = dtype_of(op, name, grads[i]);
    rows[i].grad = data_of(op, name, grads[i]);
    rows[i].numel = grads[i].numel();
    if (written) add_span(spans, true, name, grads[i], rows[i].grad, size_of(rows[i].dtype));
  }
  need_own_memory(op, spans);
  return rows;
}

Numerics numerics_of(const std::string& op, const std::vector<GradRow>& rows, const Tensor& like,
                     const Tensor& extremes, const Tensor& histogram, const Tensor& due, const Reads& reads) {
  const auto n = static_cast<int64_t>(rows.size());
  const auto table = [&](const char* name, const Tensor& t, ScalarType dtype, int64_t columns) {
    need_device(op, {name}, t, {"the tensors of the call"}, like);
    const auto shape = t.sizes();
    if (t.scalar_type() != dtype || shape.size() != 2 || shape[0] != n || shape[1] != columns || !t.is_contiguous())
      fail(op, name, " is ", dtype_name(t), " of shape ", list_text(shape), ", strides ", list_text(t.strides()),
           "; expected contiguous ", dtype_name(dtype), " [", n, ", ", columns, "], a row per gradient");
    return data_of(op, {name}, t);
  };
  const Numerics numerics = {static_cast<double*>(table("extremes", extremes, ScalarType::Double, 3)),
                             static_cast<int64_t*>(table("histogram", histogram, ScalarType::Long, kBins)),
                             int_scalar_at(op, "due", due, like), false, false};
  std::vector<Span> spans;
  add_span(spans, true, {"extremes"}, extremes, numerics.extremes, sizeof(double));
  add_span(spans, true, {"histogram"}, histogram, numerics.histogram, sizeof(int64_t));
  add_span(spans, false, {"due"}, due, numerics.due, sizeof(int32_t));
  for (const auto& [name, t] : reads)
    if (t) add_span(spans, false, {name}, *t, t->data_ptr(), t->element_size());
  const std::vector<Span> written(spans.begin(), spans.begin() + (n > 0 ? 2 : 0));
  for (int64_t i = 0; i < n; ++i) {  // only those in question are sorted
    const auto* begin = static_cast<const char*>(rows[i].grad);
    const auto* end = begin + rows[i].numel * size_of(rows[i].dtype);
    for (const Span& span : written)
      if (begin < span.end && span.begin < end) spans.push_back({begin, end, false, {"grads", i}, nullptr});
  }
  need_own_memory(op, spans);
  return numerics;
}

void need_counts(const std::string& op, const StepRow* rows, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float count = *rows[i].step;
    const bool in_range = count >= 0.0f && count <= kMostSteps;
    if (!in_range || static_cast<float>(static_cast<int64_t>(count)) != count)
      fail(op, Name{"steps", i}, " is ", count,
           "; expected a whole number from 0 to 2^62. Set it to the number of steps ", "that the parameter has taken");
  }
}

float* scalar_at(const std::string& op, const char* name, const OptionalTensor& scalar, const Tensor& like) {
  return one_element<float>(op, {name}, scalar, like, ScalarType::Float, "float32");
}

int32_t* int_scalar_at(const std::string& op, const char* name, const OptionalTensor& scalar, const Tensor& like) {
  return one_element<int32_t>(op, {name}, scalar, like, ScalarType::Int, "int32");
}

RuleId rule_for(const std::string& op, size_t params, size_t states) {
  std::string known;
#define FUSEDAMP_RULE(rule_op, Rule)                                         \
  if (op == #rule_op "_") {                                                  \
    constexpr size_t lists = Rule::kStates + Rule::kScalars;                 \
    if (states == params * lists) return k##Rule;                            \
    known += (known.empty() ? "" : " or ") + std::to_string(params * lists); \
  }
#include "../math/optimizers.def"
  if (known.empty()) fail("_rule_of", op, " is no step op; expected one of torch.ops.fusedamp.step_ops()");
  fail(op, "states has ", states, " tensors for ", params, " params; expected ", known);
}

std::string op_of(int32_t rule) {
  static constexpr const char* kOps[] = {
#define FUSEDAMP_RULE(op, Rule) #op "_",
#include "../math/optimizers.def"
  };
  return kOps[rule];
}

std::string hyper_names(std::string op) {
#define FUSEDAMP_OP(rule_op, Hyper, names)                                                                   \
  static_assert(word_count(names) == sizeof(Hyper) / sizeof(double), "a name for each number of " #rule_op); \
  if (op == #rule_op "_") return names;
#include "../math/optimizers.def"
  fail("_hyper_names", op, " is no step op; expected one of torch.ops.fusedamp.step_ops()");
}

StepGroup step_group(const std::string& op, const Tensor& like, double lr, const std::vector<double>& hyper,
                     const OptionalTensor& lr_tensor) {
  StepGroup group = {};
  size_t wanted = 0;
#define FUSEDAMP_OP(rule_op, Hyper, names) \
  if (op == #rule_op "_") wanted = sizeof(Hyper) / sizeof(double);
#include "../math/optimizers.def"
  if (hyper.size() != wanted) fail(op, "hyper has ", hyper.size(), " values; expected ", wanted);
  for (size_t i = 0; i < wanted; ++i) group.hyper[i] = hyper[i];
  group.lr = lr;
  if (lr_tensor) {
    need_device(op, {"lr"}, *lr_tensor, at("params", 0), like);
    group.lr_dtype = dtype_of(op, {"lr"}, *lr_tensor);
    if (lr_tensor->numel() != 1 || is_16bit(group.lr_dtype))
      fail(op, "lr is ", dtype_name(*lr_tensor), " of shape ", list_text(lr_tensor->sizes()),
           "; expected one float32 or float64 element");
    group.lr_tensor = data_of(op, {"lr"}, *lr_tensor);
  }
  return group;
}

StepScalars step_scalars(const std::string& op, const Tensor& like, const OptionalTensor& inv_scale,
                         const OptionalTensor& clip_coef, const OptionalTensor& found_inf) {
  return {scalar_at(op, "inv_scale", inv_scale, like), scalar_at(op, "clip_coef", clip_coef, like),
          scalar_at(op, "found_inf", found_inf, like)};
}

Tally step_tally(const std::string& op, const Tensor& like, int64_t count, const OptionalTensor& updates,
                 const OptionalTensor& due) {
  if (due && !updates) fail(op, "due is given without updates; expected both, or updates alone. Pass updates");
  if (!updates) return {};
  const Name name = {"updates"};
  need_device(op, name, *updates, {"the tensors of the call"}, like);
  const auto sizes = updates->sizes();
  const bool fits = sizes.size() == 2 && sizes[0] == count && sizes[1] == kTallies;
  if (!fits || updates->scalar_type() != ScalarType::Double || !updates->is_contiguous())
    fail(op, name, " is ", dtype_name(*updates), " of shape ", list_text(sizes), " and strides ",
         list_text(updates->strides()), "; expected contiguous float64 [", count, ", ", kTallies, "]");
  return {static_cast<double*>(data_of(op, name, *updates)), int_scalar_at(op, "due", due, like)};
}

CheckedStep checked_step(const std::string& op, const StepLists& lists, double lr, const std::vector<double>& hyper,
                         bool maximize, const OptionalTensor& lr_tensor, const OptionalTensor& inv_scale,
                         const OptionalTensor& clip_coef, const OptionalTensor& found_inf, bool stochastic_rounding) {
  const Tensor& like = lists.params[0];
  const RuleId rule = rule_for(op, lists.params.size(), lists.states.size());
  StepGroup group = step_group(op, like, lr, hyper, lr_tensor);
  const StepScalars scalars = step_scalars(op, like, inv_scale, clip_coef, found_inf);
  group.rule = rule;
  group.count = static_cast<int64_t>(lists.params.size());
  const Tally tally = step_tally(op, like, group.count, lists.updates, lists.due);
  CheckedStep step = {group, scalars, step_rows(op, rule, lists, {maximize, stochastic_rounding}), tally};
  need_own_updates(op, lists,
                   {{"lr", lr_tensor},
                    {"inv_scale", inv_scale},
                    {"clip_coef", clip_coef},
                    {"found_inf", found_inf},
                    {"squares", lists.squares}});
  if (like.is_cpu()) need_counts(op, step.rows.rows.data(), group.count);
  return step;
}

void check_step(Tensors params, Tensors grads, Tensors masters, Tensors states, Tensors steps, Tensors scales,
                std::string op, double lr, std::vector<double> hyper, bool maximize, OptionalTensor lr_tensor,
                OptionalTensor inv_scale, OptionalTensor clip_coef, OptionalTensor found_inf,
                std::vector<int64_t> seeds, bool stochastic_rounding, std::vector<int64_t> places,
                OptionalTensor squares, OptionalTensor updates, OptionalTensor due) {
  if (params.empty()) return;
  const StepLists lists = {params, grads, masters, states, steps, scales, seeds, places, squares, updates, due};
  checked_step(op, lists, lr, hyper, maximize, lr_tensor, inv_scale, clip_coef, found_inf, stochastic_rounding);
}

std::tuple<int64_t, int64_t> find_shared_memory(Tensors tensors, int64_t written) {
  std::vector<Span> spans;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Name name = at("tensors", i);
    const void* data = data_of("_find_shared_memory", name, tensors[i]);
    add_span(spans, static_cast<int64_t>(i) < written, name, tensors[i], data, tensors[i].element_size());
  }
  const auto [one, two] = find_shared(spans);
  return one ? std::tuple{one->name.index, two->name.index} : std::tuple{int64_t{-1}, int64_t{-1}};
}

}  // namespace fusedamp
