// Detects an overflow at the lowest allowed scale, without a wait and without headers of CUDA.
#pragma once
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "flags.h"
#include "ops.h"

namespace fusedamp::detail {

// Reads the scale only when it may have reached the floor.
//
// One update lowers the scale by at most one backoff factor, so each reading tells how many updates need no further
// one: with the default floor and a scale of 2^16, the next is due after 142 updates. On CUDA a reading is an
// asynchronous copy to pinned memory, used by a later update. There is none during graph capture.
class FloorWatch {
 public:
  // Reads the scale at the next update, because it or its bounds were set by hand.
  void forget() { *this = FloorWatch(); }

  // True if an overflow at the floor was detected; call before each update of the scale.
  bool stuck(const Tensor& scale, const Tensor& found_inf, double floor, double backoff) {
    if (is_capturing(scale)) return false;
    if (pending_) return poll(floor, backoff);
    if (at_least_ > floor) {
      at_least_ *= backoff;
      return false;
    }
    Tensor reading = at::stack({scale, found_inf});
    if (scale.is_cpu()) return judge(reading, floor, backoff);
    Tensor host = at::empty({2}, at::TensorOptions().dtype(at::kFloat).pinned_memory(true));
    host.copy_(reading, /*non_blocking=*/true);
    const auto device = scale.device();
    pending_.emplace(Reading{c10::Event(device.type()), host, backoff});
    pending_->event.record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    return false;
  }

 private:
  struct Reading {
    c10::Event event;
    Tensor host;
    double since;  // the factor by which the scale may have been lowered
  };

  bool poll(double floor, double backoff) {
    pending_->since *= backoff;
    if (!pending_->event.query()) return false;
    const Reading reading = std::move(*pending_);
    pending_.reset();
    return judge(reading.host, floor, reading.since);
  }

  bool judge(const Tensor& reading, double floor, double since) {
    const auto* numbers = reading.const_data_ptr<float>();
    at_least_ = numbers[0] * since;
    return numbers[0] <= floor && numbers[1] != 0;
  }

  double at_least_ = 0.0;
  std::optional<Reading> pending_;
};

}  // namespace fusedamp::detail
