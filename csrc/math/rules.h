// All update rules, with an id for each.
#pragma once
#include "adagrad.h"
#include "adam.h"
#include "lamb.h"
#include "lars.h"
#include "lion.h"
#include "nadam.h"
#include "novograd.h"
#include "radam.h"
#include "rmsprop.h"
#include "sgd.h"

namespace fusedamp {

enum RuleId : int {
#define FUSEDAMP_RULE(op, Rule) k##Rule,
#include "optimizers.def"
  kRuleCount
};

}  // namespace fusedamp
