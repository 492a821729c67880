// Test data in two copies: the CPU engine works on one, the emulated CUDA kernels on the other, then both must be
// equal. A buffer ends exactly where its allocation ends (AddressSanitizer's red zone follows) and has canaries before
// it.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/engine/cuda/engine.h"
#include "../../csrc/math/rounding.h"

namespace world {

using fusedamp::DType;
using Random = std::mt19937_64;

inline long checks = 0, failures = 0;
inline std::string now_testing;

template <class... Arguments>
void expect(bool good, const char* format, Arguments... arguments) {
  ++checks;
  if (good) return;
  if (++failures > 10) return;
  printf("FAIL %s: ", now_testing.c_str());
  printf(format, arguments...);
  puts("");
}

inline int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }
inline double normal(Random& random, double sigma) { return std::normal_distribution<double>(0.0, sigma)(random); }

struct Free {
  void operator()(void* p) const { free(p); }
};
using Memory = std::unique_ptr<char, Free>;

inline Memory allocate(int64_t bytes, int fill) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes > 0 ? static_cast<size_t>(bytes) : 1)) abort();
  memset(p, fill, static_cast<size_t>(bytes));
  return Memory(static_cast<char*>(p));
}

inline void put(void* list, DType dtype, int64_t i, double x) {
  const auto single = static_cast<float>(x);
  switch (dtype) {
    case DType::f16: static_cast<uint16_t*>(list)[i] = fusedamp::float_to_f16(single); break;
    case DType::bf16: static_cast<uint16_t*>(list)[i] = fusedamp::float_to_bf16(single); break;
    case DType::f32: static_cast<float*>(list)[i] = single; break;
    case DType::f64: static_cast<double*>(list)[i] = x; break;
    case DType::i8: static_cast<int8_t*>(list)[i] = static_cast<int8_t>(x); break;
    case DType::u8: static_cast<uint8_t*>(list)[i] = static_cast<uint8_t>(x); break;
    case DType::i16: static_cast<int16_t*>(list)[i] = static_cast<int16_t>(x);
  }
}
inline double get(const void* list, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f16: return fusedamp::f16_to_float(static_cast<const uint16_t*>(list)[i]);
    case DType::bf16: return fusedamp::bf16_to_float(static_cast<const uint16_t*>(list)[i]);
    case DType::f32: return static_cast<const float*>(list)[i];
    case DType::f64: return static_cast<const double*>(list)[i];
    case DType::i8: return static_cast<const int8_t*>(list)[i];
    case DType::u8: return static_cast<const uint8_t*>(list)[i];
    default: return static_cast<const int16_t*>(list)[i];
  }
}

class Twins {
 public:
  // `offset` elements lie between a 64-byte boundary and the first element.
  Twins(DType dtype, int64_t numel, int64_t offset)
      : dtype_(dtype), numel_(numel), before_(offset * size_of(dtype)), bytes_(before_ + numel * size_of(dtype)) {
    for (Memory& m : memory_) m = allocate(bytes_, 0x5a);
  }
  void* cpu() const { return memory_[0].get() + before_; }
  void* cuda() const { return memory_[1].get() + before_; }
  int64_t numel() const { return numel_; }
  DType dtype() const { return dtype_; }

  void set(int64_t i, double x) {
    put(cpu(), dtype_, i, x);
    put(cuda(), dtype_, i, x);
  }
  void fill(Random& random, double sigma) {
    for (int64_t i = 0; i < numel_; ++i) set(i, normal(random, sigma));
  }

  // Bitwise equal, but NaN equals NaN: payloads differ between devices. FP64 may be off by `doubles_off`, of its
  // magnitude or of 1.
  void expect_equal(const char* what, size_t tensor, double doubles_off = 0.0) const {
    for (int64_t b = 0; b < before_; ++b)
      if (memory_[0].get()[b] != 0x5a || memory_[1].get()[b] != 0x5a)
        return expect(false, "%s[%zu]: byte %ld before its first is overwritten", what, tensor, long(before_ - b));
    if (memcmp(cpu(), cuda(), static_cast<size_t>(bytes_ - before_)) == 0) return expect(true, "");
    const auto size = static_cast<size_t>(size_of(dtype_));
    for (int64_t i = 0; i < numel_; ++i) {
      const double a = get(cpu(), dtype_, i), b = get(cuda(), dtype_, i);
      const auto at = static_cast<size_t>(i) * size;
      if (memcmp(static_cast<char*>(cpu()) + at, static_cast<char*>(cuda()) + at, size) == 0 || (a != a && b != b))
        continue;
      if (dtype_ == DType::f64 && std::fabs(a - b) <= doubles_off * (1.0 + std::fabs(a))) continue;
      return expect(false, "%s[%zu][%ld of %ld]: CPU %.17g, CUDA %.17g", what, tensor, long(i), long(numel_), a, b);
    }
    expect(true, "");
  }

 private:
  DType dtype_;
  int64_t numel_, before_, bytes_;
  Memory memory_[2];
};

// A device for the engine (0 multiprocessors: a grid is one block, which walks over everything): scratch of exactly the
// wanted size, full of NaN; tables that are uploaded each time.
class EmulatedDevice {
 public:
  explicit EmulatedDevice(int multiprocessors) {
    device_.stream = nullptr;
    device_.multiprocessors = multiprocessors;
    device_.scratch = [this](int64_t bytes) { return keep(bytes); };
    device_.resident = [this](const void* table, int64_t bytes) {
      void* copy = keep(bytes);
      fusedamp::cuda::upload(nullptr, copy, table, bytes);
      expect(memcmp(copy, table, static_cast<size_t>(bytes)) == 0, "upload of %ld bytes", long(bytes));
      return copy;
    };
  }
  EmulatedDevice(const EmulatedDevice&) = delete;
  const fusedamp::cuda::Device& operator*() const { return device_; }

 private:
  void* keep(int64_t bytes) {
    kept_.push_back(allocate(bytes, 0xff));
    return kept_.back().get();
  }
  fusedamp::cuda::Device device_;
  std::vector<Memory> kept_;
};

}  // namespace world
