// The gradient check and unscale_, against the CPU engine or sums computed here.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/engine/cpu/engine.h"
#include "../../csrc/math/bins.h"
#include "step_tensors.h"

namespace world {

inline std::vector<GradRow> rows_of(const std::vector<Twins>& grads, void* (Twins::*side)() const) {
  std::vector<GradRow> rows;
  for (const Twins& g : grads) rows.push_back({(g.*side)(), g.numel(), g.dtype()});
  return rows;
}

struct Stats {
  float found_inf = -1.0f;
  double total = -1.0;
  std::vector<double> per_tensor;
  std::vector<int64_t> counts;
};

inline Stats emulated_stats(const std::vector<Twins>& grads, const float* inv_scale, double p, int multiprocessors,
                            const Numerics& numerics = {}) {
  Stats s;
  s.per_tensor.assign(grads.size(), -1.0);
  s.counts.assign(3 * grads.size(), -1);
  cuda::grad_stats(*EmulatedDevice(multiprocessors), rows_of(grads, &Twins::cuda), inv_scale, p,
                   {&s.found_inf, &s.total, s.per_tensor.data(), s.counts.data()}, numerics);
  return s;
}

inline double combine(double p, double a, double b) { return p != kInf ? a + b : a != a || a >= b ? a : b; }

inline void expect_near(const char* what, size_t i, double got, double wanted, double tolerance) {
  const bool same = got == wanted || (got != got && wanted != wanted);
  expect(same || std::fabs(got - wanted) <= tolerance * wanted, "%s[%zu]: %.17g, wanted %.17g", what, i, got, wanted);
}

inline void expect_stats(const Stats& s, const std::vector<Twins>& grads, float inv_scale, double p) {
  // A thread adds at most this many positive floats with one rounding each; 2^-24 per rounding, and one for a square.
  const double additions = double(cuda::kChunk) / cuda::kBlock + 16 + 2;
  const double tolerance = p == kInf ? 0.0 : p == 1.0 || p == 2.0 ? additions * 0x1p-24 : 1e-12;
  double total = 0.0;
  bool bad = false;
  for (size_t t = 0; t < grads.size(); ++t) {
    const Twins& g = grads[t];
    double sum = 0.0;
    int64_t counts[3] = {};
    for (int64_t i = 0; i < g.numel(); ++i) {
      const double element = get(g.cpu(), g.dtype(), i);
      const double x = g.dtype() == DType::f64 ? element * inv_scale : static_cast<float>(element) * inv_scale;
      sum = combine(p, sum, p == kInf ? std::fabs(x) : p == 0.0 ? x != 0.0 : std::pow(std::fabs(x), p));
      if (std::isnan(element)) {
        ++counts[1];
      } else if (std::isinf(element)) {
        ++counts[0];
      } else if (!std::isfinite(x)) {
        ++counts[2];
      }
    }
    for (int c = 0; c < 3; ++c) {
      expect(s.counts[3 * t + c] == counts[c], "counts[%zu][%d]: %ld, wanted %ld", t, c, long(s.counts[3 * t + c]),
             long(counts[c]));
      bad |= counts[c] > 0;
    }
    expect_near("per_tensor", t, s.per_tensor[t], sum, tolerance);
    total = combine(p, total, sum);
  }
  expect_near("total", 0, s.total, total, tolerance + 1e-12);
  expect(s.found_inf == (bad ? 1.0f : 0.0f), "found_inf is %g, wanted %d", double(s.found_inf), int(bad));
}

// What a check counts beside its results, on both sides, with canaries around it.
class Counted {
 public:
  Counted(Random& random, size_t tensors, int32_t due)
      : extremes_(DType::f64, 3 * static_cast<int64_t>(tensors), below(random, 8)),
        histogram_(DType::f64, kBins * static_cast<int64_t>(tensors), below(random, 8)),
        due_(due) {
    for (const Twins* t : {&extremes_, &histogram_})
      for (void* side : {t->cpu(), t->cuda()}) memset(side, 0x5a, 8 * static_cast<size_t>(t->numel()));
  }
  Numerics on(void* (Twins::*side)() const) const {
    return {static_cast<double*>((extremes_.*side)()), static_cast<int64_t*>((histogram_.*side)()), &due_, false,
            false};
  }
  // tests/ops/test_ops_numerics.py compares the CPU's with numpy.
  void expect_equal() const {
    extremes_.expect_equal("extremes", 0);
    histogram_.expect_equal("histogram", 0);
    const auto* counts = static_cast<const int64_t*>(histogram_.cuda());
    for (int64_t i = 0; i < histogram_.numel(); ++i)
      expect((counts[i] == 0x5a5a5a5a5a5a5a5a) == (due_ == 0), "bin %ld of histogram where due is %d", long(i), due_);
  }

 private:
  Twins extremes_, histogram_;
  const int32_t due_;
};

inline int32_t random_due(Random& random) {
  const int32_t dues[] = {0, 1, -1, 0x10000};
  return dues[below(random, 4)];
}

// The results of a check with numerics are those of `plain`, bit for bit.
inline void test_numerics(Random& random, const std::vector<Twins>& grads, float inv_scale, double p,
                          const Stats& plain) {
  const Counted counted(random, grads.size(), random_due(random));
  const Stats s = emulated_stats(grads, &inv_scale, p, static_cast<int>(below(random, 4)), counted.on(&Twins::cuda));
  Stats cpu = s;
  cpu::grad_stats(rows_of(grads, &Twins::cpu), inv_scale, p,
                  {&cpu.found_inf, &cpu.total, cpu.per_tensor.data(), cpu.counts.data()}, counted.on(&Twins::cpu),
                  one_thread);
  counted.expect_equal();
  const auto same = [](const std::vector<double>& a, const std::vector<double>& b) {
    return a.empty() || memcmp(a.data(), b.data(), sizeof(double) * a.size()) == 0;
  };
  expect(s.found_inf == plain.found_inf && same({s.total}, {plain.total}) && same(s.per_tensor, plain.per_tensor) &&
             s.counts == plain.counts,
         "results with numerics");
}

// Results of both engines' checks. tests/ops/test_planned_ops.py compares the CPU's with torch.
struct Check {
  float inv_scale = -1.0f, clip_coef = -1.0f, found_inf = -1.0f;
  double norm = -1.0;
  std::vector<int64_t> counts;

  GradCheck into(GradCheck check) {
    check.inv_scale = &inv_scale;
    check.clip_coef = &clip_coef;
    check.found_inf = &found_inf;
    check.norm = &norm;
    check.counts = counts.data();
    return check;
  }
  double norm_of(const GradCheck& check) const {
    float single;
    memcpy(&single, &norm, sizeof single);
    return check.wide ? norm : single;
  }
};

inline void test_check(Random& random, const std::vector<Twins>& grads, double p) {
  now_testing = "check_grads, p = " + std::to_string(p);
  const float scales[] = {4.0f, 1.0f, 0.3f, 0x1p126f};
  const float scale = scales[below(random, 4)];
  const uint16_t half = 0x3c00;  // 1
  const float single = 2.5f;
  const double wide = 1e-3;
  GradCheck job = {};
  job.scale = &scale;
  job.norm_type = p;
  job.max_norm = 0.5;
  job.wide = below(random, 2);
  const int64_t kind = below(random, 4);
  job.max_norm_tensor = kind == 0   ? nullptr
                        : kind == 1 ? static_cast<const void*>(&half)
                        : kind == 2 ? &single
                                    : static_cast<const void*>(&wide);
  job.max_norm_dtype = kind == 1 ? DType::f16 : kind == 2 ? DType::f32 : DType::f64;
  Check on_cpu, on_cuda;
  for (Check* check : {&on_cpu, &on_cuda}) check->counts.assign(3 * grads.size(), -1);
  const Counted counted(random, grads.size(), random_due(random));
  std::vector<double> cpu_sums(grads.size(), -1.0), cuda_sums = cpu_sums;
  cpu::check_grads(rows_of(grads, &Twins::cpu), on_cpu.into(job), cpu_sums.data(), counted.on(&Twins::cpu), one_thread);
  cuda::check_grads(*EmulatedDevice(static_cast<int>(below(random, 4))), rows_of(grads, &Twins::cuda),
                    on_cuda.into(job), cuda_sums.data(), counted.on(&Twins::cuda));
  counted.expect_equal();
  for (size_t t = 0; t < grads.size(); ++t) expect_near("per_tensor", t, cuda_sums[t], cpu_sums[t], 1e-4);
  Check plain;
  plain.counts.assign(3 * grads.size(), -1);
  cuda::check_grads(*EmulatedDevice(2), rows_of(grads, &Twins::cuda), plain.into(job), nullptr, {});
  expect(plain.inv_scale == on_cuda.inv_scale && plain.found_inf == on_cuda.found_inf &&
             plain.counts == on_cuda.counts && memcmp(&plain.norm, &on_cuda.norm, job.wide ? 8 : 4) == 0 &&
             memcmp(&plain.clip_coef, &on_cuda.clip_coef, sizeof(float)) == 0,
         "a check without numerics");
  expect(on_cpu.inv_scale == on_cuda.inv_scale && on_cuda.inv_scale == static_cast<float>(1.0 / double(scale)),
         "inv_scale %g", double(on_cuda.inv_scale));
  expect(on_cpu.found_inf == on_cuda.found_inf, "found_inf %g", double(on_cuda.found_inf));
  expect(on_cpu.counts == on_cuda.counts, "counts");
  const double tolerance = 1e-4;  // sums in FP32, in another order; to the power of 2 for p = 0.5
  expect_near("norm", 0, on_cuda.norm_of(job), on_cpu.norm_of(job), p == kInf || p == 0.0 ? 0.0 : tolerance);
  expect_near("clip_coef", 0, on_cuda.clip_coef, on_cpu.clip_coef, tolerance);
}

inline std::vector<Twins> random_grads(Random& random, int64_t largest) {
  std::vector<Twins> grads;
  const bool with_bad = below(random, 2);
  for (const int64_t numel : random_sizes(random, largest)) {
    grads.emplace_back(static_cast<DType>(below(random, 4)), numel, below(random, 2) ? 0 : below(random, 8));
    const double sigmas[] = {8.0, 8.0, 1e-25, 0.0};  // squares of 1e-25 underflow in float
    grads.back().fill(random, sigmas[below(random, 4)]);
    for (int64_t i = 0; i < numel && grads.size() % 3 == 0; ++i)  // in every bin
      grads.back().set(i, std::ldexp(normal(random, 1.0), static_cast<int>(below(random, 60)) - 45));
    if (numel == 0 || !with_bad || below(random, 3)) continue;
    const double specials[] = {kInf, -kInf, kNaN, 3e38, 65504.0};
    grads.back().set(below(random, 2) ? numel - 1 : below(random, numel), specials[below(random, 5)]);
  }
  return grads;
}

inline void test_reads(Random& random, int64_t largest) {
  const std::vector<Twins> grads = random_grads(random, largest);
  const float scales[] = {0.25f, 1.0f, 1024.0f, 1e-3f};
  const float inv_scale = scales[below(random, 4)];
  for (const double p : {2.0, 1.0, kInf, 0.0, 3.0, 0.5}) {
    now_testing = "grad_stats, p = " + std::to_string(p);
    const bool null_scale = inv_scale == 1.0f && below(random, 2);
    const Stats s = emulated_stats(grads, null_scale ? nullptr : &inv_scale, p, 2);
    expect_stats(s, grads, inv_scale, p);
    emulation::set_schedule(random());
    const Stats again = emulated_stats(grads, &inv_scale, p, 0);  // other blocks, another order: the same bits
    expect(memcmp(&again.total, &s.total, sizeof s.total) == 0 || s.total != s.total, "not reproducible");
    test_numerics(random, grads, inv_scale, p, s);
  }

  for (const double p : {2.0, 1.0, kInf, 0.0, 3.0, 0.5, 7.5}) test_check(random, grads, p);

  now_testing = "unscale_";
  float on_cpu = 0.0f, on_cuda = 0.0f;
  if (cpu::unscale(rows_of(grads, &Twins::cpu), inv_scale, one_thread)) on_cpu = 1.0f;
  cuda::unscale(*EmulatedDevice(static_cast<int>(below(random, 3))), rows_of(grads, &Twins::cuda), &inv_scale,
                &on_cuda);
  expect(on_cpu == on_cuda, "found_inf: CPU %g, CUDA %g", double(on_cpu), double(on_cuda));
  for (size_t t = 0; t < grads.size(); ++t) grads[t].expect_equal("grads", t);
}

// The combining launch loads several records ahead if a tensor has more chunks than a block has threads.
inline void test_more_chunks_than_threads(Random& random) {
  now_testing = "more chunks than threads";
  std::vector<Twins> grads;
  grads.emplace_back(DType::f16, (cuda::kBlock + 2) * cuda::kChunk + 5, 0);
  for (const int64_t i : {int64_t{0}, grads[0].numel() - 1}) {
    const float inv_scale = 1.0f;
    for (const bool bad : {false, true}) {
      if (bad) grads[0].set(i, kInf);
      const Stats s = emulated_stats(grads, &inv_scale, 2.0, 4);
      expect_stats(s, grads, inv_scale, 2.0);
      test_numerics(random, grads, inv_scale, 2.0, s);
    }
  }
}

// Tensor i is not finite at its element i only, for every i of a chunk and beyond.
inline void test_every_position(Random& random) {
  const int64_t length = std::min<int64_t>(cuda::kChunk, 1024) + 9;
  for (const DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    now_testing = std::string("every position, ") + kDTypeNames[int(dtype)];
    std::vector<Twins> grads;
    for (int64_t i = 0; i < length; ++i) {
      grads.emplace_back(dtype, length, below(random, 8));
      grads.back().set(0, 0.0);
      for (int64_t j = 0; j < length; ++j) grads.back().set(j, i == j ? (i % 2 ? kInf : kNaN) : 1.0);
    }
    const float inv_scale = 1.0f;
    const Stats s = emulated_stats(grads, &inv_scale, 2.0, 4);
    for (int64_t i = 0; i < length; ++i)
      expect(s.counts[3 * i] == i % 2 && s.counts[3 * i + 1] == 1 - i % 2 && s.counts[3 * i + 2] == 0, "element %ld",
             long(i));
    for (int64_t i = 0; i < length; i += below(random, 20) + 1) {
      float found_inf = 0.0f;
      const Twins& g = grads[i];
      cuda::unscale(*EmulatedDevice(4), {{g.cuda(), g.numel(), g.dtype()}}, &inv_scale, &found_inf);
      expect(found_inf == 1.0f, "unscale_, element %ld", long(i));
    }
    float found_inf = 0.0f;  // which several blocks set
    std::vector<GradRow> many = rows_of(grads, &Twins::cuda);
    many.resize(64);
    cuda::unscale(*EmulatedDevice(4), many, &inv_scale, &found_inf);
    expect(found_inf == 1.0f, "unscale_ of many");
  }
}

}  // namespace world
