// Products of a linear layer on host memory, against FP64 sums of their row-major definitions.
#pragma once
#include <algorithm>
#include <cmath>

#include "../../csrc/engine/cuda/lt_gemm.h"
#include "world.h"

namespace gemms {

using fusedamp::DType;
using fusedamp::Epilogue;
using fusedamp::Gemm;
using world::below;
using world::expect;
using world::Random;

// A list of which the address has exactly this alignment (up to 256; more for 512), with a canary before it. It ends
// where its allocation ends.
class List {
 public:
  List(DType dtype, int64_t count, int64_t alignment)
      : dtype_(dtype), count_(count), offset_(std::max(alignment, fusedamp::size_of(dtype))) {
    const auto bytes = static_cast<size_t>(offset_ + count * fusedamp::size_of(dtype));
    void* p = nullptr;
    if (posix_memalign(&p, 512, bytes)) abort();
    memset(p, 0xcc, bytes);
    memory_.reset(static_cast<char*>(p));
  }
  void* data() { return memory_.get() + offset_; }
  double operator[](int64_t i) const { return world::get(memory_.get() + offset_, dtype_, i); }
  void fill(Random& random, double scale) {
    for (int64_t i = 0; i < count_; ++i) {
      world::put(data(), dtype_, i, scale * (static_cast<double>(below(random, 2001)) - 1000) / 1000);
    }
  }
  // Its bytes, with those before it.
  std::string bytes() const {
    return {memory_.get(), static_cast<size_t>(offset_ + count_ * fusedamp::size_of(dtype_))};
  }
  void expect_canary() const {
    bool good = true;
    for (int64_t i = 0; i < offset_; ++i) good &= memory_.get()[i] == static_cast<char>(0xcc);
    expect(good, "memory before a list was written");
  }
  int64_t count() const { return count_; }

 private:
  DType dtype_;
  int64_t count_, offset_;
  world::Memory memory_;
};

// A row-major matrix. `gap`: unused elements after each row but the last.
struct Matrix : List {
  Matrix(DType dtype, int64_t row_count, int64_t column_count, int64_t gap, int64_t alignment)
      : List(dtype, (row_count - 1) * (column_count + gap) + column_count, alignment),
        rows(row_count),
        columns(column_count),
        ld(column_count + gap) {}
  double at(int64_t row, int64_t column) const { return (*this)[row * ld + column]; }
  int64_t rows, columns, ld;
};

// A value and how far off a result may be before it is stored.
struct Expected {
  double value = 0, error = 0;
};

constexpr double kUnit = 0x1p-24;

// n products with FP32 sums in any order: 2 (n + 2) units of the sum of magnitudes.
struct Sum {
  double value = 0, magnitude = 0;
  int64_t n = 0;
  void add(double x) {
    value += x;
    magnitude += std::abs(x);
    ++n;
  }
  Expected expected() const { return {value, 2.0 * static_cast<double>(n + 2) * kUnit * magnitude}; }
};

inline double stored_error(DType dtype, double x) {
  const double unit = dtype == DType::f32 ? kUnit : dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  return std::abs(x) * unit * 1.01 + (dtype == DType::f16 ? 0x1p-25 : 0);
}

inline void expect_near(const Expected& wanted, double got, DType dtype, const char* what, int64_t i, int64_t j) {
  const double bound = wanted.error + stored_error(dtype, std::abs(wanted.value) + wanted.error);
  expect(std::abs(got - wanted.value) <= bound, "%s[%ld, %ld] is %.9g; expected %.9g, at most %.3g off", what,
         static_cast<long>(i), static_cast<long>(j), got, wanted.value, bound);
}

// tanh-GELU, its slope is at most 1.13. Its evaluation has about ten roundings, and 1 - tanh^2 one of 1, times x^3.
constexpr double kSlope = 1.13;
inline double gelu_error(double x) { return 10 * kUnit * (1 + std::abs(x) + std::abs(x * x * x)); }
inline double tanh_of(double x) { return std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)); }
inline double gelu(double x) { return 0.5 * x * (1 + tanh_of(x)); }
inline double gelu_slope(double x) {
  const double t = tanh_of(x);
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

enum class Op { forward, input_grad, weight_grad };

struct Kind {
  Op op;
  Epilogue epilogue;
  DType inputs, output;
  bool accumulate;
};

// All kinds of products that the ops ask for, and FP32 outputs of the others.
inline std::vector<Kind> all_kinds() {
  const std::pair<Op, Epilogue> fused[] = {
      {Op::forward, Epilogue::none},          {Op::forward, Epilogue::gelu_aux},
      {Op::forward, Epilogue::gelu_aux_bias}, {Op::input_grad, Epilogue::none},
      {Op::input_grad, Epilogue::dgelu},      {Op::input_grad, Epilogue::dgelu_bias_grad},
      {Op::weight_grad, Epilogue::none},      {Op::weight_grad, Epilogue::bias_grad},
  };
  std::vector<Kind> kinds;
  for (const auto& [op, epilogue] : fused) {
    for (const DType inputs : {DType::f16, DType::bf16}) {
      for (const DType output : {inputs, DType::f32}) {
        kinds.push_back({op, epilogue, inputs, output, false});
        if (!fusedamp::has_aux(epilogue)) kinds.push_back({op, epilogue, inputs, output, true});
      }
    }
  }
  return kinds;
}

struct Geometry {
  int64_t rows, in, out;
  int64_t gap[4] = {0, 0, 0, 0};                     // of first, second, result, aux: unused elements after each row
  int64_t alignment[5] = {256, 256, 256, 256, 256};  // of these and of vector
};

constexpr int64_t up_to_8(int64_t n) { return (n + 7) / 8 * 8; }

// One product with its memory: `result` from `first` and `second`, in the order of the functions in gemm.h.
struct Case {
  Case(const Kind& k, const Geometry& g, Random& random)
      : kind(k),
        first(k.inputs, g.rows, k.op == Op::forward ? g.in : g.out, g.gap[0], g.alignment[0]),
        second(k.inputs, k.op == Op::weight_grad ? g.rows : g.out, g.in, g.gap[1], g.alignment[1]),
        result(k.output, k.op == Op::weight_grad ? g.out : g.rows, k.op == Op::forward ? g.out : g.in, g.gap[2],
               g.alignment[2]),
        aux(k.output, result.rows, result.columns, up_to_8(result.columns + g.gap[3]) - result.columns, g.alignment[3]),
        vector(k.output, 1, k.epilogue == Epilogue::bias_grad ? result.rows : result.columns, 0, g.alignment[4]) {
    const fusedamp::LinearShape shape = {g.rows, g.in, g.out, k.inputs, k.output};
    const auto make = k.op == Op::forward      ? fusedamp::linear_forward
                      : k.op == Op::input_grad ? fusedamp::linear_input_grad
                                               : fusedamp::linear_weight_grad;
    gemm = make(shape, {first.data(), first.ld}, {second.data(), second.ld}, {result.data(), result.ld});
    gemm.accumulate = k.accumulate;
    gemm.epilogue = k.epilogue;
    if (fusedamp::has_vector(k.epilogue)) gemm.vector = vector.data();
    if (fusedamp::has_aux(k.epilogue)) {
      gemm.aux = aux.data();
      gemm.ldaux = aux.ld;
    }
    first.fill(random, 1);
    second.fill(random, 1);
    if (k.accumulate) result.fill(random, 8);
    if (k.epilogue >= Epilogue::dgelu) aux.fill(random, 3);
    if (k.epilogue == Epilogue::gelu_aux_bias) vector.fill(random, 1);
    for (int64_t i = 0; i < result.count(); ++i) old.push_back(result[i]);
    before = outputs();
  }

  std::string outputs() const { return result.bytes() + aux.bytes() + vector.bytes(); }
  void expect_untouched() const { expect(outputs() == before, "a refused product wrote something"); }

  // The sum of row i and column j by the definition of the operation.
  Sum product(int64_t i, int64_t j) const {
    Sum sum;
    switch (kind.op) {
      case Op::forward:
        for (int64_t k = 0; k < first.columns; ++k) sum.add(first.at(i, k) * second.at(j, k));
        break;
      case Op::input_grad:
        for (int64_t k = 0; k < first.columns; ++k) sum.add(first.at(i, k) * second.at(k, j));
        break;
      case Op::weight_grad:
        for (int64_t k = 0; k < first.rows; ++k) sum.add(first.at(k, i) * second.at(k, j));
    }
    if (kind.accumulate) sum.add(old[static_cast<size_t>(i * result.ld + j)]);
    if (kind.epilogue == Epilogue::gelu_aux_bias) sum.add(vector[j]);
    return sum;
  }

  void expect_right() const {
    std::vector<Expected> column_sums(static_cast<size_t>(result.columns));
    std::vector<double> magnitudes(static_cast<size_t>(result.columns));
    for (int64_t i = 0; i < result.rows; ++i) {
      for (int64_t j = 0; j < result.columns; ++j) {
        Expected x = product(i, j).expected();
        const bool forward = kind.op == Op::forward;
        if (fusedamp::has_aux(kind.epilogue)) {
          const double pre = forward ? x.value : aux.at(i, j);
          if (forward) {
            expect_near(x, aux.at(i, j), kind.output, "aux", i, j);
            x = {gelu(pre), kSlope * x.error + gelu_error(pre)};
          } else {
            x = {x.value * gelu_slope(pre), kSlope * x.error + std::abs(x.value) * gelu_error(pre)};
          }
        }
        expect_near(x, result.at(i, j), kind.output, "result", i, j);
        const auto at = static_cast<size_t>(j);
        column_sums[at].value += x.value;
        column_sums[at].error += x.error;
        magnitudes[at] += std::abs(x.value);
      }
    }
    if (kind.epilogue == Epilogue::dgelu_bias_grad) {
      for (size_t j = 0; j < column_sums.size(); ++j) {
        Expected sum = column_sums[j];
        sum.error += 2.0 * static_cast<double>(result.rows + 2) * kUnit * magnitudes[j];
        expect_near(sum, vector[static_cast<int64_t>(j)], kind.output, "bias gradient", 0, static_cast<int64_t>(j));
      }
    }
    if (kind.epilogue == Epilogue::bias_grad) {
      for (int64_t j = 0; j < first.columns; ++j) {
        Sum sum;
        for (int64_t k = 0; k < first.rows; ++k) sum.add(first.at(k, j));
        expect_near(sum.expected(), vector[j], kind.output, "bias gradient", 0, j);
      }
    }
    for (const Matrix* m : {&result, &aux}) m->expect_canary();
    vector.expect_canary();
    bool good = true;
    for (int64_t i = 0; i + result.ld < result.count(); i += result.ld) {
      for (int64_t j = result.columns; j < result.ld; ++j) {
        good &= result[i + j] == old[static_cast<size_t>(i + j)];
      }
    }
    expect(good, "memory between rows was written");
  }

  Kind kind;
  Matrix first, second, result, aux, vector;
  Gemm gemm = {};
  std::vector<double> old;
  std::string before;
};

}  // namespace gemms
