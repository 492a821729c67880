// Masters and states from one format into another, against the CPU engine.
#pragma once
#include <cstring>

#include "../../csrc/engine/cpu/engine.h"
#include "../../csrc/math/split.h"
#include "step_tensors.h"

namespace world {

// Random bits: every kind of number, also NaN and infinity.
inline void fill_bits(Random& random, const Twins& t) {
  const auto size = static_cast<size_t>(size_of(t.dtype()));
  for (int64_t i = 0; i < t.numel(); ++i) {
    const uint64_t bits = random();
    for (void* list : {t.cpu(), t.cuda()})
      memcpy(static_cast<char*>(list) + static_cast<size_t>(i) * size, &bits, size);
  }
}

struct Recoded {
  Twins source, target, weight, scales;

  Recoding job(bool with_weight, void* (Twins::*side)() const) const {
    return {(source.*side)(),
            (target.*side)(),
            with_weight ? (weight.*side)() : nullptr,
            with_weight ? nullptr : static_cast<float*>((scales.*side)()),
            source.numel(),
            source.dtype(),
            target.dtype(),
            weight.dtype()};
  }
};

inline void test_recode(Random& random, DType from, DType to, DType half, bool with_weight, int64_t numel) {
  now_testing = std::string("recode, ") + kDTypeNames[int(from)] + " to " + kDTypeNames[int(to)];
  const auto offset = [&] { return below(random, 2) ? 0 : below(random, 8); };
  const int64_t blocks = (numel + kScaleBlock - 1) / kScaleBlock;
  Recoded t = {Twins(from, numel, offset()), Twins(to, numel, offset()), Twins(half, with_weight ? numel : 0, offset()),
               Twins(DType::f32, with_weight ? 0 : blocks, offset())};
  const int64_t bits = below(random, 2);
  if (bits || !(from <= DType::f64)) {
    fill_bits(random, t.source);
  } else {
    t.source.fill(random, 3.0);
    if (to == DType::u8)
      for (int64_t i = 0; i < numel; ++i) t.source.set(i, std::fabs(get(t.source.cpu(), from, i)));
    if (numel > 0 && below(random, 2)) t.source.set(below(random, numel), below(random, 2) ? kNaN : kInf);
  }
  if (is_8bit(from))
    for (int64_t b = 0; b < blocks; ++b) t.scales.set(b, std::ldexp(1.0, static_cast<int>(below(random, 250)) - 125));
  for (int64_t i = 0; with_weight && i < numel; ++i) {  // rounded masters, their neighbors, and any
    t.weight.set(i, get(t.source.cpu(), from, i));
    auto* at = static_cast<uint16_t*>(t.weight.cpu()) + i;
    const int64_t kind = below(random, 4);
    *at = static_cast<uint16_t>(kind < 2 ? *at : kind == 2 ? *at + 1 : random());
    if (from == DType::f32 && below(random, 4) == 0) {  // a tie that was rounded away from zero
      const float tie = float_of(static_cast<uint32_t>(random()) << 16 | 0x8000u);
      t.source.set(i, tie);
      *at = float_to_bf16_away(tie);
    }
    static_cast<uint16_t*>(t.weight.cuda())[i] = *at;
  }
  cpu::recode(t.job(with_weight, &Twins::cpu), one_thread);
  cuda::recode(*EmulatedDevice(static_cast<int>(below(random, 4))), t.job(with_weight, &Twins::cuda));
  t.source.expect_equal("source", 0);
  t.target.expect_equal("target", 0);
  t.weight.expect_equal("weight", 0);
  t.scales.expect_equal("scales", 0);
}

inline void test_recodings(Random& random, int64_t largest) {
  const int64_t sizes[] = {0, 1, 127, 128, 129, 1 + below(random, 1000), largest};
  for (const int64_t numel : sizes) {
    for (const DType half : {DType::f16, DType::bf16}) {
      test_recode(random, DType::f32, DType::f32, half, true, numel);
      test_recode(random, DType::i16, DType::f32, half, true, numel);
      test_recode(random, DType::f32, DType::i16, half, true, numel);
    }
    for (const DType code : {DType::i8, DType::u8}) {
      test_recode(random, code, DType::f32, DType::f16, false, numel);
      for (const DType from : {DType::f16, DType::bf16, DType::f32, DType::f64})
        test_recode(random, from, code, DType::f16, false, numel);
    }
  }
}

}  // namespace world
