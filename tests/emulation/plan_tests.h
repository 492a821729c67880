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
  for (int64_t Geometry::* size : {&Geometry::rows, &Geometry::in, &Geometry::out}) {
    Geometry other = g;
    ++(other.*size);
    expect(questions(kind, other) == 1, "another size shares a plan");
  }
  for (const Kind& other : {Kind{Op::weight_grad, Epilogue::bias_grad, DType::bf16, DType::f32, false},
                            Kind{Op::weight_grad, Epilogue::bias_grad, DType::f16, DType::f16, false},
                            Kind{Op::weight_grad, Epilogue::bias_grad, DType::bf16, DType::bf16, true},
                            Kind{Op::weight_grad, Epilogue::none, DType::bf16, DType::bf16, false}}) {
    expect(questions(other, g) == 1, "another kind shares a plan");
  }
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
  const auto asked = [&](int64_t rows, int64_t out, int capability) {
    Device device(capability, capability);
    const Kind kind = {Op::forward, Epilogue::none, DType::bf16, DType::bf16, false};
    Case c(kind, {rows, 2, out, {}, {256, 256, 256, 256, 256}}, random);
    const char* refused = run_gemm(device, c.gemm);
    expect(!refused, "is refused");
    return device.asked.empty() ? 0 : device.asked[0] - 255;
  };
  expect(asked(3, 4, 90) == 0, "a workspace that no algorithm needs");
  expect(asked(3, 3, 90) == 8 * 9, "not the size that the algorithm needs");
  const int64_t megabyte = 1 << 17;  // in outputs
  expect(asked(1024, 4 * megabyte / 1024, 80) == 4 << 20, "4 MiB on 8.0 are not used");
  expect(asked(1024, 4 * megabyte / 1024 + 3, 80) == 0, "more than 4 MiB on 8.0");
  expect(asked(1024, 32 * megabyte / 1024, 89) == 0, "more than 4 MiB on 8.9");
  expect(asked(1024, 32 * megabyte / 1024, 90) == 32 << 20, "32 MiB on 9.0 are not used");
  expect(asked(1024, 32 * megabyte / 1024 + 3, 90) == 0, "more than 32 MiB on 9.0");
}

}  // namespace gemms
