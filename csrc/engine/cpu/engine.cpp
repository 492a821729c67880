#include "engine.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "../../math/bins.h"
#include "../../math/random.h"
#include "../check.h"
#include "../passes.h"
#include "../record.h"

namespace fusedamp::cpu {
namespace {

// Elements; a 16-bit gradient chunk and its states fit the L2 cache.
constexpr int64_t kChunk = 32 * 1024;
static_assert(kKeyElements % kChunk == 0, "elements of a chunk share their random keys");

// Chunks units[u] .. units[u + 1] are one unit of work for a thread: about kChunk elements.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<int64_t> units = {0};
  int64_t unit_count() const { return static_cast<int64_t>(units.size()) - 1; }
};

template <class Row>
Plan plan(const Row* rows, size_t count) {
  Plan p;
  int64_t filled = 0;
  for (int64_t r = 0; r < static_cast<int64_t>(count); ++r) {
    for (int64_t at = 0; at < rows[r].numel; at += kChunk) {
      const int64_t n = std::min(kChunk, rows[r].numel - at);
      p.chunks.push_back({r, at, n});
      filled += n;
      if (filled >= kChunk) {
        p.units.push_back(static_cast<int64_t>(p.chunks.size()));
        filled = 0;
      }
    }
  }
  if (filled > 0) p.units.push_back(static_cast<int64_t>(p.chunks.size()));
  return p;
}

Norm norm_of(double norm_type) {
  if (norm_type == 2.0) return Norm::kTwo;
  if (norm_type == 1.0) return Norm::kOne;
  if (norm_type == std::numeric_limits<double>::infinity()) return Norm::kMax;
  return Norm::kGeneral;
}

// Sum or maximum; propagates NaN.
double combine(Norm norm, double a, double b) {
  if (norm != Norm::kMax) return a + b;
  return a >= b || a != a ? a : b;
}

// Adds a chunk's histogram to its row's. Several threads may have chunks of one row.
void add_histogram(const GradRow* rows, const Chunk& chunk, int64_t* histogram) {
  int64_t bins[kBins] = {};
  kernels().histogram(rows, chunk, bins);
  for (int b = 0; b < kBins; ++b)
    if (bins[b]) __atomic_fetch_add(histogram + b, bins[b], __ATOMIC_RELAXED);
}

// kMaxNorms sums of squares per row.
std::vector<double> squares_of(int32_t rule, const StepPass& pass, const Plan& p, const Parallel& parallel) {
  const auto measure_chunk = kernels().measure[rule];
  std::vector<double> found(kMaxNorms * p.chunks.size()), squares(kMaxNorms * pass.table.count);
  parallel(p.unit_count(), [&](int64_t u) {
    for (int64_t c = p.units[u]; c < p.units[u + 1]; ++c) measure_chunk(pass, p.chunks[c], &found[kMaxNorms * c]);
  });
  for (size_t c = 0; c < p.chunks.size(); ++c)  // in chunk order, for any assignment of chunks to threads
    for (int j = 0; j < kMaxNorms; ++j) squares[kMaxNorms * p.chunks[c].row + j] += found[kMaxNorms * c + j];
  return squares;
}

// Writes the tallies of a pass: kTallies numbers per row.
void sum_up(const std::vector<ChunkTally>& found, const Plan& p, int64_t rows, double* updates) {
  std::fill_n(updates, kTallies * rows, 0.0);
  for (size_t c = 0; c < found.size(); ++c) {  // in chunk order, for any assignment of chunks to threads
    double* of_row = updates + kTallies * p.chunks[c].row;
    of_row[0] += static_cast<double>(found[c].moved);
    of_row[1] += static_cast<double>(found[c].lost);
    of_row[2] += found[c].update;
    of_row[3] += found[c].weight;
  }
}

// `updates`: of the pass's rows; null where there is no tally.
void step_pass(int32_t rule, const StepPass& pass, double* updates, const Parallel& parallel) {
  const Plan p = plan(pass.table.rows, pass.table.count);
  std::vector<double> measured;
  if (kernels().measure[rule] && !are_given(pass.table)) {
    measured = squares_of(rule, pass, p, parallel);
  } else if (kernels().measure[rule]) {
    for (int64_t r = 0; r < pass.table.count; ++r)
      measured.insert(measured.end(), pass.table.rows[r].squares, pass.table.rows[r].squares + kMaxNorms);
  }
  const double* squares = measured.empty() ? nullptr : measured.data();
  std::vector<ChunkTally> found(updates ? p.chunks.size() : 0);
  parallel(p.unit_count(), [&](int64_t u) {
    const int64_t first = p.units[u], count = p.units[u + 1] - first;
    const Chunk* chunks = p.chunks.data() + first;
    if (updates) {
      kernels().tallied_step[rule](pass, chunks, count, squares, found.data() + first);
    } else {
      kernels().step[rule](pass, chunks, count, squares);
    }
  });
  if (updates) sum_up(found, p, pass.table.count, updates);
  kernels().advance[rule](pass, squares);
}

bool overflowed(const StepScalars& scalars) { return scalars.found_inf && !(*scalars.found_inf == 0.0f); }

}  // namespace

void step(const StepTable& table, const StepGroups& groups, const StepScalars& scalars, const StepLog& log,
          const Tally& tally, const Parallel& parallel) {
  const bool skipped = overflowed(scalars);
  keep_log(log, skipped, 0, 1);
  if (skipped) return;
  double* const updates = tally.due && *tally.due == 0 ? nullptr : tally.updates;
  for_each_pass(table, groups, [&](int32_t rule, const StepTable& rows) {
    double* const of_pass = updates ? updates + kTallies * (rows.rows - table.rows) : nullptr;
    step_pass(rule, {rows, groups.groups, scalars}, of_pass, parallel);
  });
}

void measure(const StepTable& table, const StepGroups& groups, const StepScalars& scalars, const Parallel& parallel) {
  for_each_pass(table, groups, [&](int32_t rule, const StepTable& rows) {
    if (overflowed(scalars) || !kernels().measure[rule]) return;
    const StepPass pass = {rows, groups.groups, scalars};
    const std::vector<double> squares = squares_of(rule, pass, plan(rows.rows, rows.count), parallel);
    for (int64_t r = 0; r < rows.count; ++r)
      std::copy_n(squares.data() + kMaxNorms * r, kMaxNorms, rows.rows[r].squares);
  });
}

void grad_stats(const std::vector<GradRow>& rows, float inv_scale, double norm_type, const StatsOutputs& out,
                const Numerics& numerics, const Parallel& parallel) {
  if (numerics.only_due && *numerics.due == 0) return;
  const StatsJob job = {inv_scale, norm_of(norm_type), norm_type};
  const Kernels& run = kernels();
  const Plan p = plan(rows.data(), rows.size());
  std::vector<ChunkStats> found(p.chunks.size());
  std::vector<ChunkExtremes> extremes(numerics.extremes ? p.chunks.size() : 0);
  const bool due = numerics.extremes && *numerics.due != 0;
  if (due) std::fill_n(numerics.histogram, kBins * rows.size(), int64_t{0});
  parallel(p.unit_count(), [&](int64_t u) {
    for (int64_t c = p.units[u]; c < p.units[u + 1]; ++c) {
      const Chunk& chunk = p.chunks[c];
      if (numerics.extremes) {
        run.stats_with_extremes(rows.data(), chunk, job, &found[c], due || !numerics.lean, &extremes[c]);
      } else {
        run.stats(rows.data(), chunk, job, &found[c]);
      }
      if (due) add_histogram(rows.data(), chunk, numerics.histogram + kBins * chunk.row);
    }
  });

  std::fill_n(out.per_tensor, rows.size(), 0.0);
  std::fill_n(out.counts, 3 * rows.size(), int64_t{0});
  bool found_inf = false;
  for (size_t c = 0; c < found.size(); ++c) {  // in chunk order, for any assignment of chunks to threads
    const int64_t r = p.chunks[c].row;
    out.per_tensor[r] = combine(job.norm, out.per_tensor[r], found[c].power_sum);
    out.counts[3 * r] += found[c].infs;
    out.counts[3 * r + 1] += found[c].nans;
    out.counts[3 * r + 2] += found[c].overflows;
    found_inf |= found[c].infs + found[c].nans + found[c].overflows > 0;
  }
  double total = 0.0;
  for (size_t r = 0; r < rows.size(); ++r) total = combine(job.norm, total, out.per_tensor[r]);
  *out.total = total;
  *out.found_inf = found_inf ? 1.0f : 0.0f;

  if (numerics.extremes) std::fill_n(numerics.extremes, 3 * rows.size(), 0.0);
  for (size_t c = 0; c < extremes.size(); ++c) {
    double* of_row = numerics.extremes + 3 * p.chunks[c].row;
    of_row[0] = std::max(of_row[0], extremes[c].largest);
    of_row[1] += static_cast<double>(extremes[c].zeros);
    of_row[2] += static_cast<double>(extremes[c].small);
  }
}

void check_grads(const std::vector<GradRow>& rows, const GradCheck& check, double* per_tensor, const Numerics& numerics,
                 const Parallel& parallel) {
  std::vector<double> unwanted(per_tensor ? 0 : rows.size());
  double total = 0.0;
  grad_stats(rows, reciprocal(*check.scale), check.norm_type,
             {check.found_inf, &total, per_tensor ? per_tensor : unwanted.data(), check.counts}, numerics, parallel);
  conclude(check, total);
}

bool unscale(const std::vector<GradRow>& rows, float inv_scale, const Parallel& parallel) {
  const auto unscale_chunk = kernels().unscale;
  const Plan p = plan(rows.data(), rows.size());
  std::atomic<bool> bad{false};
  parallel(p.unit_count(), [&](int64_t u) {
    for (int64_t c = p.units[u]; c < p.units[u + 1]; ++c)
      if (unscale_chunk(rows.data(), p.chunks[c], inv_scale)) bad.store(true, std::memory_order_relaxed);
  });
  return bad.load();
}

void recode(const Recoding& job, const Parallel& parallel) {
  const auto recode_chunk = kernels().recode;
  parallel((job.numel + kChunk - 1) / kChunk,
           [&](int64_t u) { recode_chunk(job, u * kChunk, std::min(kChunk, job.numel - u * kChunk)); });
}

void record(const StepRecord& record) {
  const RecordedStep step = recorded_step(record);
  record_tensors(record, step, 0, 1);
  double largest = 0.0;
  for (int64_t i = 0; i < record.count; ++i) largest = std::max(largest, record.extremes[kExtremes * i]);
  record_step(record, step, largest);
  advance(record);
}

}  // namespace fusedamp::cpu
