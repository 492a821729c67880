// Every update rule, and a number for each.
#pragma once
#include "adam.h"
#include "sgd.h"

namespace fusedamp {

enum RuleId : int {
#define FUSEDAMP_RULE(op, Rule) k##Rule,
#include "optimizers.def"
  kRuleCount
};

}  // namespace fusedamp
