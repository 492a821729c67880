// When the library is asked for a plan, and for how large a workspace.
#pragma once
#include "emulated_lt.h"

namespace gemms {

inline void test_plans(Random& random) {
  const Kind kind = {Op::weight_grad, Epilogue::bias_grad, DType::bf16, DType::bf16, false};
  const Geometry g = {6, 5, 4};
  const auto questions = [&](const Kind& k, const Geometry& geometry, int index = 0) {
    const int64_t asked = count(kHeuristics);
    const Device device(index);
    Case c(k, geometry, random);
    run_right(device, c);
    return count(kHeuristics) - asked;
  };
  expect(questions(kind, g) == 1, "a new product has a plan");
  expect(questions(kind, g) == 0, "the same product has no plan yet");
  expect(questions(kind, g, 1) == 1, "another device shares a plan");
  for (int i = 0; i < 5; ++i) {
    Kind k = kind;
    if (i == 3) k = {Op::input_grad, Epilogue::dgelu, DType::bf16, DType::bf16, false};
    questions(k, g);
    Geometry other = g;
    other.alignment[i] = i < 3 ? 2 : 16;
    expect(questions(k, other) == 1, "list %d of another alignment shares a plan", i);
    other = g;
    if (i < 4) {
      other.gap[i] = 8;
      expect(questions(k, other) == 1, "matrix %d with another leading dimension shares a plan", i);
    }
  }
  // Sizes change without the leading dimensions.
  Geometry small = g, large = g;
  small.gap[0] = small.gap[1] = small.gap[2] = 1;
  questions(kind, small);
  ++large.in;
  large.gap[0] = 1;
  expect(questions(kind, large) == 1, "another m shares a plan");
  large = small;
  ++large.out;
  large.gap[0] = 0;
  expect(questions(kind, large) == 1, "another n shares a plan");
  large = small;
  ++large.rows;
  expect(questions(kind, large) == 1, "another k shares a plan");
  const DType f16 = DType::f16, bf16 = DType::bf16, f32 = DType::f32;
  const Epilogue grad = Epilogue::bias_grad;
  for (const Kind& other : {Kind{Op::weight_grad, grad, bf16, f32, false}, Kind{Op::weight_grad, grad, f16, f32, false},
                            Kind{Op::weight_grad, grad, f16, f16, false}, Kind{Op::weight_grad, grad, bf16, bf16, true},
                            Kind{Op::weight_grad, Epilogue::none, bf16, bf16, false}}) {
    expect(questions(other, g) == 1, "another kind shares a plan");
  }
  for (const Op op : {Op::forward, Op::input_grad, Op::weight_grad}) {
    expect(questions({op, Epilogue::none, f16, f16, false}, {40, 40, 40}) == 1, "another operation shares a plan");
  }
  Case c({Op::forward, Epilogue::gelu_aux, f16, f16, false}, g, random);
  run_gemm(Device(), c.gemm);
  c.gemm.epilogue = Epilogue::dgelu;
  const int64_t asked = count(kHeuristics);
  run_gemm(Device(), c.gemm);
  expect(count(kHeuristics) == asked + 1, "another epilogue shares a plan");

  // The 4096 plans that were used last are kept.
  now_testing = "plans";
  const Kind plain = {Op::forward, Epilogue::none, DType::f16, DType::f32, false};
  const auto numbered = [&](int64_t i) { return questions(plain, {1, i, 1}); };
  for (int64_t i = 1; i <= 4096; ++i) numbered(i);
  expect(numbered(1) == 0, "fewer than 4096 plans are kept");
  numbered(4097);
  expect(numbered(1) == 0, "a plan that was used again is dropped");
  expect(numbered(2) == 1, "more than 4096 plans are kept");
}

// The emulated library's workspace: 8 bytes per output, where the sum of the sizes is 2 modulo 3.
inline void test_workspaces(Random& random) {
  now_testing = "workspaces";
  constexpr int64_t kNone = -1;
  const auto asked = [&](int64_t rows, int64_t out, int capability, DType output = DType::bf16) {
    Device device(capability, capability);
    const Kind kind = {Op::forward, Epilogue::none, DType::bf16, output, false};
    Case c(kind, {rows, 2, out, {}, {256, 256, 256, 256, 256}}, random);
    const char* refused = run_gemm(device, c.gemm);
    expect(!refused, "is refused");
    return device.asked.empty() ? kNone : device.asked[0] - 255;
  };
  expect(asked(3, 4, 90) == kNone, "a workspace that no algorithm needs");
  expect(asked(3, 3, 90) == 8 * 9, "not the size that the algorithm needs");
  expect(asked(3, 2, 90) == 8 * 6, "partial sums in a 16-bit output");
  expect(asked(3, 2, 90, DType::f32) == kNone, "no partial sums in an FP32 output");
  const int64_t megabyte = 1 << 17;  // in outputs
  expect(asked(1024, 4 * megabyte / 1024, 80) == 4 << 20, "4 MiB on 8.0 are not used");
  expect(asked(1024, 4 * megabyte / 1024 + 3, 80) == kNone, "more than 4 MiB on 8.0");
  expect(asked(1024, 32 * megabyte / 1024, 89) == kNone, "more than 4 MiB on 8.9");
  expect(asked(1024, 32 * megabyte / 1024, 90) == 32 << 20, "32 MiB on 9.0 are not used");
  expect(asked(1024, 32 * megabyte / 1024 + 3, 90) == kNone, "more than 32 MiB on 9.0");
}

}  // namespace gemms
