// Archives of torch::save that hold one state dict.
#pragma once
#include <torch/serialize/input-archive.h>
#include <torch/serialize/output-archive.h>

#include <string>

#include "text.h"

namespace fusedamp::detail {

// What save() has written.
inline c10::IValue read_state_dict(torch::serialize::InputArchive& archive, const std::string& name) {
  c10::IValue saved;
  if (!archive.try_read("state_dict", saved))
    refuse_value(
        "[" + name +
        ".load] the archive has no state dict; expected what torch::save wrote of a fusedamp object. Optimizers "
        "of torch::optim save in another form: continue without their states, or bring a state_dict() from "
        "Python.");
  return saved;
}

}  // namespace fusedamp::detail
