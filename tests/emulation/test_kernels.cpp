// Every kernel of the CUDA object against the CPU engine over random lists of tensors; reads in read_tests.h.
// usage: test_kernels [rounds] [elements of the largest tensor]
#include "../../csrc/engine/cuda/step.cuh"
#include "group_tests.h"
#include "read_tests.h"
#include "recode_tests.h"
#include "record_tests.h"
#include "step_tests.h"

const fusedamp::cpu::Kernels& fusedamp::cpu::kernels() { return kKernels_baseline; }

namespace {

using namespace fusedamp;
using namespace world;

// The last chunk of a tensor with more than 2^32 elements; only that chunk has memory.
void test_beyond_32_bits(Random& random) {
  now_testing = "2^32 elements";
  const int64_t chunk = (int64_t{1} << 32) / cuda::kChunk + 1, first = chunk * cuda::kChunk;
  const int count = static_cast<int>(cuda::kChunk) - 3;
  Twins grad(DType::f16, count, 0), param(DType::f32, count, 0), buffer(DType::f32, count, 0);
  for (Twins* t : {&grad, &param, &buffer}) t->fill(random, 1.0);
  float steps[2] = {5.0f, 5.0f};
  StepRow row = {};
  row.param = param.cpu();
  row.states[0] = buffer.cpu();
  row.step = &steps[0];
  row.numel = count;
  row.grad_dtype = DType::f16;
  row.param_dtype = row.master_dtype = row.state_dtype = DType::f32;
  StepGroup group = {};
  const double hyper[] = {0.9, 0.0, 0.01, 0.0};
  std::copy_n(hyper, 4, group.hyper);
  group.lr = 0.1;
  group.count = 1;
  group.rule = kSgdMomentum;
  void* grads = grad.cpu();
  cpu::step({&row, &grads, 1}, {&group, 1}, {}, {}, {}, one_thread);

  auto long_before = [&](const Twins& t) {
    return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(t.cuda()) -
                                   static_cast<uintptr_t>(first * size_of(t.dtype())));
  };
  grads = long_before(grad);
  row.param = long_before(param);
  row.states[0] = long_before(buffer);
  row.step = &steps[1];
  row.numel = first + count;
  const cuda::Placed<StepRow> placed = {row, -chunk};
  const SgdCoeffs<double> exact = SgdMomentum::coeffs({0.9, 0.0, 0.01, 0.0}, 0.1, 6);
  const SgdCoeffs<float> coeffs = round_coeffs<SgdCoeffs, float>(exact);
  cuda::launch("step", &cuda::step_kernel<SgdMomentum, cuda::Kind::kSingle>, 1, cuda::kBlock, nullptr,
               cuda::StepRows{{&placed, 1, 1}, &grads}, StepScalars{}, &coeffs, nullptr);
  for (const Twins* t : {&grad, &param, &buffer}) t->expect_equal("tensor", 0);
}

// The same for 8-bit states, on either engine: scales and random numbers depend on the index, and the second
// kKeyElements have other keys. The expected values are computed here.
void test_compressed_beyond_32_bits(Random& random, bool emulated) {
  now_testing = "2^34 elements, 8-bit states";
  const int64_t chunk = kKeyElements / cuda::kChunk + 1, first = chunk * cuda::kChunk;
  const int block = static_cast<int>(kScaleBlock), count = block + 3;
  Twins grad(DType::f16, count, 0), param(DType::f32, count, 0), codes(DType::i8, count, 0), scales(DType::f32, 2, 0);
  for (Twins* t : {&grad, &param}) t->fill(random, 1.0);
  for (int i = 0; i < count; ++i) codes.set(i, double(below(random, 255) - 127));
  for (int b = 0; b < 2; ++b) scales.set(b, 0.5 + b);
  float steps = 5.0f;
  StepRow row = {};
  row.step = &steps;
  row.seed = 7;
  row.numel = first + count;
  row.grad_dtype = DType::f16;
  row.param_dtype = row.master_dtype = DType::f32;
  row.state_dtype = DType::i8;
  void* grads = static_cast<char*>(grad.cuda()) - first * 2;
  row.param = static_cast<char*>(param.cuda()) - first * 4;
  row.states[0] = static_cast<char*>(codes.cuda()) - first;
  row.scales[0] = static_cast<float*>(scales.cuda()) - first / block;
  StepGroup group = {};
  set_hyper(kLion, false, group.hyper);
  group.lr = 0.1;
  const auto coeffs = cuda::coeffs_for<Lion, float>(row, group, nullptr);

  const RandomKey key = random_key(random_stream(row.seed, 6), 0, first);
  expect(key.outer != random_key(random_stream(row.seed, 6), 0, kKeyElements - 1).outer,
         "key of another 2^34 elements");
  for (int b = 0; b < 2; ++b) {
    const int end = std::min((b + 1) * block, count);
    std::vector<float> momenta;
    uint32_t largest = 0;
    for (int i = b * block; i < end; ++i) {
      float weight = static_cast<float>(get(param.cpu(), DType::f32, i));
      const int code = static_cast<int>(get(codes.cpu(), DType::i8, i));
      float state[1] = {Codes<false>::value<0>(static_cast<uint32_t>(code), 0.5f + static_cast<float>(b))};
      lane<Lion, float>(coeffs, 1.0f, static_cast<float>(get(grad.cpu(), DType::f16, i)), weight, state);
      put(param.cpu(), DType::f32, i, weight);
      momenta.push_back(state[0]);
      largest = std::max(largest, bits_of(state[0]) & 0x7fffffffu);
    }
    const float scale = Codes<false>::scale(largest), inverse = Codes<false>::inverse(scale);
    put(scales.cpu(), DType::f32, b, scale);
    for (int i = b * block; i < end; ++i) {
      const uint32_t word = random_word(key, static_cast<uint32_t>((first + i) / kQuad));
      const uint32_t code = Codes<false>::code(momenta[i - b * block], inverse, random_part(word, i % kQuad, 0));
      put(codes.cpu(), DType::i8, i, static_cast<int32_t>(code));
    }
  }
  if (emulated) {
    steps = 6.0f;  // counted by another launch
    const cuda::Placed<StepRow> placed = {row, -chunk};
    cuda::launch("step", &cuda::step_kernel<Lion, cuda::Kind::kCompressed>, 1, cuda::kBlock, nullptr,
                 cuda::StepRows{{&placed, 1, 1}, &grads}, StepScalars{}, &coeffs, nullptr);
  } else {
    const cpu::Chunk last = {0, first, count};
    cpu::kernels().step[kLion]({{&row, &grads, 1}, &group, {}}, &last, 1, nullptr);
  }
  for (const Twins* t : {&param, &codes, &scales}) t->expect_equal("tensor", 0);
}

void test_update_scale(Random& random) {
  now_testing = "update_scale_";
  for (int i = 0; i < 200; ++i) {
    const LossScaleRule rule = {2.0,
                                0.5,
                                below(random, 2) ? 1.0 : 0.0,
                                below(random, 2) ? 1e6 : kInf,
                                1 + below(random, 3),
                                1 + below(random, 3),
                                below(random, 2) == 1};
    LossScaleState state = {std::ldexp(1.0f, static_cast<int>(below(random, 24))), int32_t(below(random, 3)),
                            int32_t(below(random, 4))};
    const bool with_budget = below(random, 2);
    if (!with_budget) state.budget = 1;
    const float founds[] = {0.0f, 1.0f, 2.0f, std::numeric_limits<float>::quiet_NaN()};
    const float found_inf = founds[below(random, 4)];
    const LossScaleState wanted = next_loss_scale(rule, state, !(found_inf == 0.0f));
    cuda::update_scale(*EmulatedDevice(1), rule, &state.scale, &state.growth_tracker,
                       with_budget ? &state.budget : nullptr, &found_inf);
    expect(state.scale == wanted.scale && state.growth_tracker == wanted.growth_tracker &&
               (!with_budget || state.budget == wanted.budget),
           "scale %g, wanted %g", double(state.scale), double(wanted.scale));
  }
}

// A whole training, so that the ring wraps. The rule itself is tested by tests/ops/test_ops_headroom.py.
void test_update_scale_headroom(Random& random) {
  now_testing = "update_scale_headroom_";
  const float founds[] = {1.0f, 2.0f, std::numeric_limits<float>::quiet_NaN(), -1e-40f};
  const double unknown[] = {0.0, kInf, std::numeric_limits<double>::quiet_NaN(), -1.0, 5e-324};
  for (int run = 0; run < 4; ++run) {
    const HeadroomRule rule =
        headroom_rule(below(random, 15), 1 + below(random, 200), run < 2 ? 0.0 : 3.0, run % 2 ? kInf : 5e5);
    HeadroomState states[2] = {};
    float scales[2] = {65535.0f, 65535.0f};
    for (int i = 0; i < 1500; ++i) {
      const bool overflow = below(random, 40) == 0;
      const float found_inf = overflow ? founds[below(random, 4)] : 0.0f;
      const double largest = below(random, 40) == 0 ? unknown[below(random, 5)]
                                                    : std::ldexp(1.0 + below(random, 4) / 4.0, below(random, 80) - 45);
      scales[0] = next_headroom_scale(rule, scales[0], states[0], overflow, largest);
      cuda::update_scale_headroom(*EmulatedDevice(1), rule, &scales[1], &states[1], &found_inf, &largest);
      expect(scales[0] == scales[1] && std::memcmp(&states[0], &states[1], sizeof states[0]) == 0,
             "step %d: scale %g, wanted %g", i, double(scales[1]), double(scales[0]));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 4;
  const int64_t largest = argc > 2 ? atoll(argv[2]) : 5000;
  for (int round = 0; round < rounds; ++round) {
    Random random(1000 + round);
    emulation::set_schedule(round);
    for (int r = 0; r < kRuleCount; ++r) {
      const auto rule = static_cast<RuleId>(r);
      const auto alignment = static_cast<Alignment>((round + r) % 3);
      test_step(random, rule, random_sizes(random, largest), alignment, false);
      const auto telling = static_cast<Telling>(1 + (round + r) % 3);  // as often as not: in every format
      test_step(random, rule, random_sizes(random, largest / 8), alignment, false, Telling::kDue);
      test_step(random, rule, {0, 1, 7, 300, cuda::kChunk + 1, 65}, alignment, false, telling);
      test_step(random, rule, {0, 1, 7, 300, cuda::kChunk + 1, 65}, alignment, true, static_cast<Telling>(round % 4));
    }
    for (int repeat = 0; repeat < 4; ++repeat)
      test_step(random, kAdamW, {0, 0, 0}, Alignment::kAll, repeat == 3, static_cast<Telling>(repeat));
    test_reads(random, largest);
    test_recodings(random, largest);
    for (const int64_t tensors : {0, 1, 5, 70}) test_record(random, tensors);
  }
  Random random(1);
  test_beyond_32_bits(random);
  for (const bool emulated : {true, false}) test_compressed_beyond_32_bits(random, emulated);
  for (int repeat = 0; repeat < 3; ++repeat) test_rules_in_turn(random, repeat == 2);
  test_launches(random);
  test_resident_tables(random);
  test_more_chunks_than_threads(random);
  test_every_position(random);
  test_update_scale(random);
  test_update_scale_headroom(random);
  emulation::print_launched(reinterpret_cast<const void*>(&main));  // a symbol table makes names of it
  printf("%ld checks, %ld failures, blocks of %d, chunks of %d\n", checks, failures, cuda::kBlock, int(cuda::kChunk));
  return failures != 0;
}
