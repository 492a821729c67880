// Records which parameters overflowed in which step, on the device; read on request only.
#pragma once
#include <c10/util/Type.h>

#include <deque>
#include <typeinfo>

#include "../optimizer.h"
#include "../overflow.h"
#include "gradients.h"

namespace fusedamp::detail {

// "AdamW"
inline std::string class_name(const torch::optim::Optimizer& optimizer) {
  const auto* fusedamps = dynamic_cast<const optim::FusedOptimizer*>(&optimizer);
  if (fusedamps && fusedamps->has_own_step()) return fusedamps->name();
  const std::string name = c10::demangle(typeid(optimizer).name());
  const size_t scope = name.substr(0, name.find('<')).rfind("::");
  return scope == std::string::npos ? name : name.substr(scope + 2);
}

// Where a parameter is in an optimizer, and its shape.
struct Place {
  size_t group, index;
  std::vector<int64_t> shape;
};

inline std::vector<Place> places_of(const torch::optim::Optimizer& optimizer) {
  std::vector<Place> places;
  for (size_t g = 0; g < optimizer.param_groups().size(); ++g) {
    const auto& params = optimizer.param_groups()[g].params();
    for (size_t i = 0; i < params.size(); ++i) places.push_back({g, i, params[i].sizes().vec()});
  }
  return places;
}

// The overflows of one optimizer. Only report() waits for the device.
class OverflowLog {
 public:
  using Positions = std::vector<int64_t>;

  // Element counts of the latest overflow in one set of gradients, rewritten in place (for CUDA graphs).
  struct Record {
    c10::Device device;
    Positions positions;
    std::vector<Place> places;
    Tensor counts, step;
  };

  OverflowLog(const torch::optim::Optimizer& optimizer, c10::Device device)
      : name_(class_name(optimizer)), steps_(at::zeros({}, options(device, at::kLong))) {}

  void next_step() { steps_.add_(1); }
  const Tensor& steps() const { return steps_; }

  // Stores `counts` if this step is an overflow, which the device decides.
  void record(const torch::optim::Optimizer& optimizer, const Positions& positions, const Tensor& counts,
              const Tensor& found_inf) {
    note(record_of(optimizer, positions, counts), counts, found_inf, steps_);
  }

  void record(const torch::optim::Optimizer& optimizer, const Gradients& gradients, const ByDevice<GradStats>& stats,
              const Tensor& found_inf) {
    for (size_t i = 0; i < stats.size(); ++i)
      record(optimizer, gradients.by_device[i].second.positions, stats[i].second.counts, found_inf);
  }

  // Records a step whose gradients were unscaled before; report() counts their elements if they still exist.
  void record_uncounted(const torch::optim::Optimizer& optimizer, const Tensor& found_inf) {
    const Tensors params = params_of(optimizer);
    const Versions versions(Gradients(params).originals);
    uncounted_ = {places_of(optimizer), {}, versions, found_inf.clone(), steps_.clone()};
    for (const Tensor& param : params) uncounted_->params.emplace_back(weak(param), weak(param.grad()));
    record(optimizer, {}, at::zeros({0, 3}, options(found_inf.device(), at::kLong)), found_inf);
  }

  // The record of one set of gradients.
  Record& record_of(const torch::optim::Optimizer& optimizer, const Positions& positions, const Tensor& counts) {
    if (Record* known = find(positions, counts.device())) return *known;
    return make(places_of(optimizer), positions, counts);
  }

  OverflowReport report() {
    count_uncounted();
    OverflowReport report;
    std::vector<int64_t> steps;
    for (const Record& record : records_)
      report.step = std::max(report.step, steps.emplace_back(record.step.item<int64_t>()));
    for (size_t r = 0; r < records_.size() && report.step > 0; ++r) {
      if (steps[r] != report.step) continue;
      const Tensor host = records_[r].counts.cpu();
      const auto* counts = host.const_data_ptr<int64_t>();
      for (size_t i = 0; i < records_[r].positions.size(); ++i, counts += 3) {
        if (!counts[0] && !counts[1] && !counts[2]) continue;
        const Place& at = records_[r].places[i];
        report.overflows.push_back(
            {text(name_, " group ", at.group, " parameter ", at.index), at.shape, counts[0], counts[1], counts[2]});
      }
    }
    return report;
  }

 private:
  // Distinct sets of parameters with gradients; bounds memory if the set changes at every step.
  static constexpr size_t kMaxRecords = 16;

  struct Uncounted {
    std::vector<Place> places;
    std::vector<std::pair<WeakTensor, WeakTensor>> params;  // and their gradients
    Versions versions;
    Tensor found_inf, step;
  };

  static WeakTensor weak(const Tensor& tensor) { return WeakTensor(tensor.getIntrusivePtr()); }

  static void note(Record& record, const Tensor& counts, const Tensor& found_inf, const Tensor& step) {
    const Tensor overflow = on(found_inf, counts.device()) != 0;
    at::where_out(record.counts, overflow, counts, record.counts);
    at::where_out(record.step, overflow, on(step, counts.device()), record.step);
  }

  Record* find(const Positions& positions, c10::Device device) {
    for (Record& record : records_)
      if (record.device == device && record.positions == positions) return &record;
    return nullptr;
  }

  Record& make(const std::vector<Place>& places, const Positions& positions, const Tensor& counts) {
    while (records_.size() >= kMaxRecords) records_.pop_front();
    Record made = {counts.device(), positions, {}, at::zeros_like(counts), at::zeros({}, counts.options())};
    for (const int64_t position : positions) made.places.push_back(places[position]);
    return records_.emplace_back(std::move(made));
  }

  void count_uncounted() {
    if (!uncounted_) return;
    Tensors params;
    for (const auto& [param, grad] : uncounted_->params) {
      params.push_back(Tensor(param.lock()));
      if (!params.back().defined() || !params.back().grad().is_same(Tensor(grad.lock()))) return;
    }
    const Gradients gradients(params);
    if (!uncounted_->versions.match(gradients.originals)) return;
    const auto stats = gradients.stats();
    for (size_t i = 0; i < stats.size(); ++i) {
      const auto& [device, stat] = stats[i];
      const auto& positions = gradients.by_device[i].second.positions;
      Record* known = find(positions, device);
      note(known ? *known : make(uncounted_->places, positions, stat.counts), stat.counts, uncounted_->found_inf,
           uncounted_->step);
    }
  }

  std::string name_;
  Tensor steps_;
  std::deque<Record> records_;
  std::optional<Uncounted> uncounted_;
};

}  // namespace fusedamp::detail
