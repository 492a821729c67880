// The policy "headroom" of a loss scale: its state, and the largest gradients that it follows.
#pragma once
#include "flags.h"
#include "numbers.h"
#include "ops.h"

namespace fusedamp::detail {

// The rule of update_scale_headroom_ (csrc/math/headroom.h) and its state.
class Headroom {
 public:
  static constexpr double kLargestBackoff = 0.0625;

  // bits: how many bits the largest gradients stay below FP16's largest number.
  explicit Headroom(int64_t bits) : bits_(bits) {}

  // The state; the first call makes it on `device`.
  const Tensor& place(c10::Device device) {
    if (!state_.defined()) state_ = unpacked(saved_).to(device);
    return state_;
  }

  void update(const Tensor& scale, const Tensor& found_inf, const Tensor& largest, const ScaleRule& rule) {
    update_scale_headroom_(scale, place(scale.device()), found_inf, largest, bits_, rule);
  }

  // The state as few plain numbers: overflows in a row, good steps in a row, those that waited to grow, patience, and
  // the exponents that are kept, oldest first. Waits for the device.
  std::vector<int64_t> save() const {
    if (!state_.defined()) return saved_.empty() ? std::vector<int64_t>(4) : saved_;
    const Tensor host = state_.cpu();
    const auto* numbers = host.const_data_ptr<int32_t>();
    const auto* ring = numbers + kHead + kCounts;
    const int64_t kept = numbers[4], first = kept == kRing ? numbers[5] : 0;
    std::vector<int64_t> saved(numbers, numbers + 4);
    for (int64_t i = 0; i < kept; ++i) saved.push_back(ring[(first + i) % kRing] + kLeast);
    return saved;
  }

  // Sets the state to what save() returned; empty: a new one.
  void load(std::vector<int64_t> saved) {
    saved_ = std::move(saved);
    if (state_.defined()) state_.copy_(unpacked(saved_));
  }

  // The entry "_headroom" of a state dict; refused unless save() can return it.
  static std::vector<int64_t> checked(const c10::IValue& saved) {
    const std::string where = "[GradScaler] state_dict['_headroom']";
    const auto items = items_of(saved);
    const auto n = items ? static_cast<int64_t>(items->size()) : 0;
    if (!items || !(n == 0 || (4 <= n && n <= 4 + kRing)))
      refuse_value(text(where, " is ", items ? text(n, " numbers") : "a " + kind_of(saved),
                        "; expected a list of 4 to ", 4 + kRing,
                        " whole numbers, or none. Delete the entry to start from scratch."));
    std::vector<int64_t> found;
    for (int64_t i = 0; i < n; ++i) {
      // Counts must not overflow at the next good step.
      const int64_t low = i < 4 ? 0 : kLeast;
      const int64_t high = i == 0 ? 3 : i < 3 ? kInt32Max - 1 : i == 3 ? kInt32Max : kLeast + kCounts - 1;
      if (!(*items)[i].isInt() || (*items)[i].toInt() < low || (*items)[i].toInt() > high)
        refuse_value(text(where, "[", i, "] is ", shown((*items)[i]), "; expected a whole number from ", low, " to ",
                          high, ". Delete the entry to start from scratch."));
      found.push_back((*items)[i].toInt());
    }
    return found;
  }

 private:
  static constexpr int64_t kHead = 8, kCounts = 64, kRing = 512;
  static constexpr int64_t kLeast = -40;  // exponent of the first count

  static Tensor unpacked(const std::vector<int64_t>& saved) {
    Tensor state = at::zeros({kHead + kCounts + kRing}, at::kInt);
    auto* numbers = state.data_ptr<int32_t>();
    const auto n = static_cast<int32_t>(saved.size());
    for (int32_t i = 0; i < std::min(n, 4); ++i) numbers[i] = static_cast<int32_t>(saved[i]);
    const int32_t kept = std::max(n - 4, 0);
    numbers[4] = kept;
    numbers[5] = kept % kRing;
    for (int32_t i = 0; i < kept; ++i) {
      const auto place = static_cast<int32_t>(saved[4 + i] - kLeast);
      numbers[kHead + kCounts + i] = place;
      ++numbers[kHead + place];
    }
    return state;
  }

  int64_t bits_;
  std::vector<int64_t> saved_;
  Tensor state_;  // int32 [584]
};

// The largest |gradient| of one optimizer, as stored, of the latest check of its gradients.
class LargestGradient {
 public:
  // What a check of `n` gradients on `device` fills.
  const Numerics& numerics(c10::Device device, size_t n) {
    Numerics& own = buffers_.of(device);
    const auto rows = static_cast<int64_t>(n);
    if (!own.due.defined() || own.extremes.size(0) != rows)
      own = {at::empty({rows, 3}, options(device, at::kDouble)), at::empty({rows, 64}, options(device, at::kLong)),
             at::zeros({}, options(device, at::kInt))};
    checked_.of(device) = own.extremes;
    return own;
  }

  // The largest gradient on each device: FP64, 0-d; no wait.
  PerDevice take() {
    PerDevice found;
    for (const auto& [device, extremes] : checked_) found.of(device) = extremes.select(1, 0).amax();
    checked_.clear();
    return found;
  }

 private:
  ByDevice<Numerics> buffers_;
  PerDevice checked_;
};

}  // namespace fusedamp::detail
