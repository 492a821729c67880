// The checks of _record_, and what the engine is given.
#pragma once
#include "../engine/record.h"
#include "checks.h"

namespace fusedamp {

// What _record_ writes.
struct Rings {
  const Tensor &clock, &due, &steps, &numbers, &bins;
  const OptionalTensor& trajectory;
};
// What it reads.
struct Counted {
  const Tensor &extremes, &histogram, &squares;
  const OptionalTensor &updates, &scale, &found_inf;
};

inline StepRecord checked_record(const Rings& rings, const Counted& counted, int64_t every) {
  const char* op = "_record_";
  const Tensor& clock = rings.clock;
  std::vector<Span> spans;
  const auto list = [&](const char* name, const Tensor& t, ScalarType dtype, std::vector<int64_t> shape, bool written) {
    need_device(op, {name}, t, {"clock"}, clock);
    const auto got = t.sizes();
    if (t.scalar_type() != dtype || !t.is_contiguous() ||
        !std::equal(got.begin(), got.end(), shape.begin(), shape.end()))
      fail(op, name, " is ", dtype_name(t), " of shape ", list_text(got), "; expected contiguous ", dtype_name(dtype),
           " ", list_text(shape));
    void* data = t.data_ptr();
    add_span(spans, written, {name}, t, data, t.element_size());
    return data;
  };
  const auto rows = [&](const char* name, const Tensor& t) {
    if (t.dim() == 0) fail(op, name, " has shape []; expected one row per slot, tensor or step");
    return t.size(0);
  };
  StepRecord r = {};
  r.every = every;
  r.history = rows("steps", rings.steps);
  r.count = rows("extremes", counted.extremes);
  if (every < 1 || r.history < 1)
    fail(op, "every is ", every, " and steps has ", r.history, " rows; expected 1 or more");
  r.clock = static_cast<int64_t*>(list("clock", clock, ScalarType::Long, {2}, true));
  r.due = static_cast<int32_t*>(list("due", rings.due, ScalarType::Int, {}, true));
  r.steps = static_cast<double*>(list("steps", rings.steps, ScalarType::Double, {r.history, 4}, true));
  r.numbers =
      static_cast<double*>(list("numbers", rings.numbers, ScalarType::Double, {r.history, r.count, kNumbers}, true));
  r.bins = static_cast<int64_t*>(list("bins", rings.bins, ScalarType::Long, {r.history, r.count, kBins}, true));
  if (rings.trajectory) {
    r.length = rows("trajectory", *rings.trajectory);
    if (r.length < 1) fail(op, "trajectory has no rows; expected 1 or more");
    r.trajectory = static_cast<double*>(list("trajectory", *rings.trajectory, ScalarType::Double, {r.length, 4}, true));
  }
  r.extremes =
      static_cast<double*>(list("extremes", counted.extremes, ScalarType::Double, {r.count, kExtremes}, false));
  r.histogram = static_cast<int64_t*>(list("histogram", counted.histogram, ScalarType::Long, {r.count, kBins}, false));
  r.squares = static_cast<double*>(list("squares", counted.squares, ScalarType::Double, {r.count}, false));
  if (counted.updates)
    r.updates = static_cast<double*>(list("updates", *counted.updates, ScalarType::Double, {r.count, kTallies}, false));
  r.scale = one_element<float>(op, {"scale"}, counted.scale, clock, ScalarType::Float, "float32");
  r.found_inf = one_element<float>(op, {"found_inf"}, counted.found_inf, clock, ScalarType::Float, "float32");
  need_own_memory(op, spans);
  return r;
}

}  // namespace fusedamp
