#include "engine.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "../../math/random.h"

namespace fusedamp::cpu {
namespace {

// Elements; a 16-bit gradient chunk and its states fit the L2 cache.
constexpr int64_t kChunk = 32 * 1024;
static_assert(kKeyElements % kChunk == 0, "elements of a chunk share their random keys");

// units[u] .. units[u + 1] are the chunks that one thread takes at once: about kChunk elements.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<int64_t> units = {0};
  int64_t unit_count() const { return static_cast<int64_t>(units.size()) - 1; }
};

template <class Row>
Plan plan(const std::vector<Row>& rows) {
  Plan p;
  int64_t filled = 0;
  for (int64_t r = 0; r < static_cast<int64_t>(rows.size()); ++r) {
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

// Sums, or the larger; NaN wins.
double combine(Norm norm, double a, double b) {
  if (norm != Norm::kMax) return a + b;
  return a >= b || a != a ? a : b;
}

// kMaxNorms sums of squares for each row; empty where the rule measures nothing.
std::vector<double> measure(RuleId rule, const std::vector<StepRow>& rows, const Plan& p, const StepScalars& scalars,
                            const Parallel& parallel) {
  const auto measure_chunk = kernels().measure[rule];
  if (!measure_chunk) return {};
  std::vector<double> found(kMaxNorms * p.chunks.size()), squares(kMaxNorms * rows.size());
  parallel(p.unit_count(), [&](int64_t u) {
    for (int64_t c = p.units[u]; c < p.units[u + 1]; ++c)
      measure_chunk(rows.data(), p.chunks[c], scalars, &found[kMaxNorms * c]);
  });
  for (size_t c = 0; c < p.chunks.size(); ++c)  // in the order of the chunks, whoever measured them
    for (int j = 0; j < kMaxNorms; ++j) squares[kMaxNorms * p.chunks[c].row + j] += found[kMaxNorms * c + j];
  return squares;
}

}  // namespace

void step(RuleId rule, const std::vector<StepRow>& rows, const StepScalars& scalars, const Parallel& parallel) {
  if (scalars.found_inf && !(*scalars.found_inf == 0.0f)) return;
  const auto step_chunks = kernels().step[rule];
  const Plan p = plan(rows);
  const std::vector<double> measured = measure(rule, rows, p, scalars, parallel);
  const double* squares = measured.empty() ? nullptr : measured.data();
  parallel(p.unit_count(), [&](int64_t u) {
    step_chunks(rows.data(), p.chunks.data() + p.units[u], p.units[u + 1] - p.units[u], scalars, squares);
  });
  kernels().advance[rule](rows.data(), static_cast<int64_t>(rows.size()), scalars, squares);
}

ListStats grad_stats(const std::vector<GradRow>& rows, float inv_scale, double norm_type, double* per_tensor,
                     int64_t* counts, const Parallel& parallel) {
  const StatsJob job = {inv_scale, norm_of(norm_type), norm_type};
  const auto stats = kernels().stats;
  const Plan p = plan(rows);
  std::vector<ChunkStats> found(p.chunks.size());
  parallel(p.unit_count(), [&](int64_t u) {
    for (int64_t c = p.units[u]; c < p.units[u + 1]; ++c) stats(rows.data(), p.chunks[c], job, &found[c]);
  });

  std::fill_n(per_tensor, rows.size(), 0.0);
  std::fill_n(counts, 3 * rows.size(), int64_t{0});
  ListStats all;
  for (size_t c = 0; c < found.size(); ++c) {  // in the order of the chunks, whoever computed them
    const int64_t r = p.chunks[c].row;
    per_tensor[r] = combine(job.norm, per_tensor[r], found[c].power_sum);
    counts[3 * r] += found[c].infs;
    counts[3 * r + 1] += found[c].nans;
    counts[3 * r + 2] += found[c].overflows;
    all.found_inf |= found[c].infs + found[c].nans + found[c].overflows > 0;
  }
  for (size_t r = 0; r < rows.size(); ++r) all.total = combine(job.norm, all.total, per_tensor[r]);
  return all;
}

bool unscale(const std::vector<GradRow>& rows, float inv_scale, const Parallel& parallel) {
  const auto unscale_chunk = kernels().unscale;
  const Plan p = plan(rows);
  std::atomic<bool> bad{false};
  parallel(p.unit_count(), [&](int64_t u) {
    for (int64_t c = p.units[u]; c < p.units[u + 1]; ++c)
      if (unscale_chunk(rows.data(), p.chunks[c], inv_scale)) bad.store(true, std::memory_order_relaxed);
  });
  return bad.load();
}

}  // namespace fusedamp::cpu
