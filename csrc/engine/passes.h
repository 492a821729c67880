// Common parts of the engines: which rows share a pass, and the log of steps.
#pragma once
#include "../math/vocab.h"
#include "table.h"

namespace fusedamp {
inline namespace FUSEDAMP_TARGET {

// Calls visit(rule, rows) for each run of consecutive groups with the same rule, with their part of the table.
template <class Visit>
inline void for_each_pass(const StepTable& table, const StepGroups& all, Visit visit) {
  for (int64_t from = 0, to; from < all.count; from = to) {
    const StepGroup& first = all.groups[from];
    int64_t rows = 0;
    for (to = from; to < all.count && all.groups[to].rule == first.rule; ++to) rows += all.groups[to].count;
    if (rows == 0) continue;
    const StepTable part = {table.rows + first.first, table.grads + first.first, rows};
    visit(first.rule, part);
  }
}

// Whether the norms of a pass are known; then all its rows have them.
inline bool are_given(const StepTable& rows) { return rows.count > 0 && rows.rows[0].squares; }

// Updates the StepLog; worker `worker` of `workers` does its share.
FUSEDAMP_FN void keep_log(const StepLog& log, bool skipped, int64_t worker, int64_t workers) {
  if (!log.steps) return;
  if (skipped && log.last_counts)
    for (int64_t w = worker; w < log.words; w += workers) log.last_counts[w] = log.counts[w];
  if (worker > 0) return;
  ++*log.steps;
  if (skipped && log.last_step) *log.last_step = *log.steps;
}

}  // namespace FUSEDAMP_TARGET
}  // namespace fusedamp
