// csrc/engine/cuda/lt_gemm.cpp and lt_library.cpp with the emulated library.
// usage: test_lt FOLDER [rounds]: all products, with FOLDER/libcublasLt.so.13
//        test_lt FOLDER versions: two libraries are loaded; torch is linked to the one with version 12.9.2
//        test_lt FOLDER missing: no library is loaded
#include <dlfcn.h>

#include <stdexcept>
#include <thread>

#include "../../csrc/engine/cuda/lt_library.h"
#include "gemm_tests.h"

namespace {

using namespace gemms;
using fusedamp::cuda::LtDevice;
using fusedamp::cuda::run_gemm;
using world::now_testing;

int64_t (*count)(int) = nullptr;
void (*refuse)(int, unsigned, int) = nullptr;
enum Count { kHeuristics, kProducts, kBrokenRules, kObjects };
enum Place { kNowhere, kHeuristic, kNothingFound, kState, kProduct, kAccumulation };
constexpr unsigned kPlain = 1, kBgradB = 512;
constexpr int kNotInitialized = 1, kInternalError = 14, kNotSupported = 15;

void* load(const std::string& path) {
  void* object = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!object) {
    puts(dlerror());
    exit(2);
  }
  return object;
}

// A device with workspaces of exactly the asked size, on odd addresses.
struct Device : LtDevice {
  explicit Device(int index = 0, int capability = 90) : LtDevice{the_handle, nullptr, index, capability, {}} {
    stream = reinterpret_cast<CUstream_st*>(0x57);
    scratch = [this](int64_t bytes) {
      asked.push_back(bytes);
      kept.push_back(world::allocate(bytes + 1, 0));
      return kept.back().get() + 1;
    };
  }
  Device(const Device&) = delete;
  std::vector<int64_t> asked;
  std::vector<world::Memory> kept;
  static inline void* the_handle = nullptr;
};

std::string name_of(const Case& c) { return fusedamp::cuda::describe(c.gemm); }

void run_right(const LtDevice& device, Case& c) {
  now_testing = name_of(c);
  const char* refused = run_gemm(device, c.gemm);
  expect(!refused, "is refused: %s", refused ? refused : "");
  if (!refused) c.expect_right();
}

void test_all_products(int rounds, Random& random) {
  const int64_t sizes[] = {1, 2, 3, 7, 8, 16, 31, 64, 65, 129, 257};
  const auto pick = [&](int64_t smallest) {
    const int64_t n = below(random, 3) ? sizes[below(random, 7)] : sizes[below(random, 11)];
    return std::max(n, smallest);
  };
  for (int round = 0; round < rounds; ++round) {
    for (const Kind& kind : all_kinds()) {
      const int64_t smallest = kind.epilogue == Epilogue::none ? 1 : 2;
      Geometry g = {pick(smallest), pick(smallest), pick(smallest)};
      for (int64_t& gap : g.gap) gap = below(random, 2) ? 0 : below(random, 9);
      for (int64_t& alignment : g.alignment) alignment = int64_t{1} << (1 + below(random, 8));
      for (int i : {3, 4}) g.alignment[i] = std::max(g.alignment[i], int64_t{16});
      const Device device;
      Case c(kind, g, random);
      run_right(device, c);
    }
  }
}

void expect_refused(const LtDevice& device, const Case& c, const std::string& why) {
  const char* refused = run_gemm(device, c.gemm);
  expect(refused && std::string(refused) == why, "says: %s; expected: %s", refused ? refused : "nothing", why.c_str());
  c.expect_untouched();
}

// Each rule is known before the library is asked.
void test_rules(Random& random) {
  const Kind plain = {Op::forward, Epilogue::none, DType::bf16, DType::f32, false};
  const Geometry g = {4, 8, 16};
  const auto broken = [&](Epilogue epilogue, const char* why, auto change) {
    now_testing = why;
    Kind kind = plain;
    kind.epilogue = epilogue;
    if (epilogue == Epilogue::bias_grad) kind.op = Op::weight_grad;
    if (epilogue >= Epilogue::dgelu) kind.op = Op::input_grad;
    Case c(kind, g, random);
    change(c.gemm);
    const int64_t asked = count(kHeuristics);
    expect_refused(Device(), c, why);
    expect(count(kHeuristics) == asked, "the library was asked");
  };
  const int64_t large = int64_t{1} << 31;
  const Epilogue none = Epilogue::none;
  broken(none, "inputs are neither FP16 nor BF16", [](Gemm& x) { x.inputs = x.output = DType::f32; });
  broken(none, "the output has neither the inputs' type nor FP32", [](Gemm& x) { x.output = DType::f16; });
  for (int64_t Gemm::* size : {&Gemm::m, &Gemm::n, &Gemm::k}) {
    broken(none, "a size is 0 or above 2^31 - 1", [=](Gemm& x) { x.*size = 0; });
    broken(none, "a size is 0 or above 2^31 - 1", [=](Gemm& x) { x.*size = large; });
  }
  for (int64_t Gemm::* ld : {&Gemm::lda, &Gemm::ldb, &Gemm::ldd}) {
    broken(none, "a leading dimension is 0 or above 2^31 - 1", [=](Gemm& x) { x.*ld = large; });
    broken(none, "a leading dimension is smaller than its column", [=](Gemm& x) { --(x.*ld); });
  }
  for (const void* Gemm::* list : {&Gemm::a, &Gemm::b}) {
    broken(none, "a matrix has no address", [=](Gemm& x) { x.*list = nullptr; });
  }
  broken(none, "a matrix has no address", [](Gemm& x) { x.d = nullptr; });
  for (const Epilogue e : {Epilogue::gelu_aux, Epilogue::gelu_aux_bias, Epilogue::dgelu, Epilogue::dgelu_bias_grad}) {
    broken(e, "GELU cannot be fused with accumulation", [](Gemm& x) { x.accumulate = true; });
    const char* bad_aux = "the input of GELU is not aligned to 16 bytes";
    broken(e, bad_aux, [](Gemm& x) { x.aux = nullptr; });
    broken(e, bad_aux, [](Gemm& x) { x.aux = static_cast<char*>(x.aux) + 8; });
    const char* bad_ld = "the leading dimension of the input of GELU is smaller than its column or not a multiple of 8";
    broken(e, bad_ld, [](Gemm& x) { x.ldaux -= 8; });
    broken(e, bad_ld, [](Gemm& x) { x.ldaux += 4; });
    broken(e, bad_ld, [=](Gemm& x) { x.ldaux = large; });
  }
  for (const Epilogue e : {Epilogue::bias_grad, Epilogue::gelu_aux_bias, Epilogue::dgelu_bias_grad}) {
    const char* bad_bias = "a bias is not aligned to 16 bytes";
    broken(e, bad_bias, [](Gemm& x) { x.vector = nullptr; });
    broken(e, bad_bias, [](Gemm& x) { x.vector = static_cast<char*>(x.vector) + 8; });
  }
  for (int64_t Gemm::* size : {&Gemm::m, &Gemm::n, &Gemm::k}) {
    broken(Epilogue::bias_grad, "bias_grad of a single row", [=](Gemm& x) { x.*size = 1; });
  }
  broken(Epilogue::dgelu, "dgelu of a single column", [](Gemm& x) { x.k = 1; });
  broken(Epilogue::dgelu_bias_grad, "dgelu of a single column", [](Gemm& x) { x.k = 1; });
}

// A refusal is remembered. Nothing was written, and no workspace was asked for.
void test_refusals(Random& random) {
  const Kind kind = {Op::weight_grad, Epilogue::bias_grad, DType::bf16, DType::f32, false};
  const std::string ask = "cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_NOT_SUPPORTED";
  const std::pair<Place, std::string> places[] = {{kHeuristic, ask},
                                                  {kNothingFound, ask},
                                                  {kState, ask},
                                                  {kProduct, "cublasLtMatmul: CUBLAS_STATUS_NOT_SUPPORTED"}};
  Geometry g = {9, 20, 11};
  for (const auto& [place, why] : places) {
    now_testing = "refusal at place " + std::to_string(place);
    ++g.rows;
    Device device;
    Case c(kind, g, random);
    refuse(place, kBgradB, kNotSupported);
    expect_refused(device, c, why);
    const int64_t asked = count(kHeuristics);
    refuse(kNowhere, 0, 0);
    const size_t workspaces = device.asked.size();
    expect_refused(device, c, why);
    expect(count(kHeuristics) == asked, "the library was asked again");
    expect(device.asked.size() == workspaces && (place == kProduct || workspaces == 0), "a workspace was asked for");
    Kind unfused = kind;
    unfused.epilogue = Epilogue::none;
    Case other(unfused, g, random);
    run_right(device, other);
  }
}

std::string thrown_by(const LtDevice& device, const Case& c) {
  try {
    run_gemm(device, c.gemm);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "nothing";
}

void expect_throws(const LtDevice& device, const Case& c, const std::string& why) {
  const std::string wanted = "fusedamp: " + why + " for " + fusedamp::cuda::describe(c.gemm);
  const std::string got = thrown_by(device, c);
  expect(got == wanted, "throws %s; expected %s", got.c_str(), wanted.c_str());
}

void test_failures(Random& random) {
  const Kind kind = {Op::weight_grad, Epilogue::bias_grad, DType::f16, DType::f32, true};
  const Geometry g = {30, 20, 10};
  Device device;
  Case c(kind, g, random);
  now_testing = "a refused accumulation may have been added";
  refuse(kAccumulation, kBgradB, kNotSupported);
  expect_throws(device, c, "cublasLtMatmul failed with CUBLAS_STATUS_NOT_SUPPORTED (15)");
  refuse(kNowhere, 0, 0);
  expect_refused(device, c, "cublasLtMatmul: CUBLAS_STATUS_NOT_SUPPORTED");
  Kind once = kind;
  once.accumulate = false;
  Case other(once, g, random);
  run_right(device, other);

  now_testing = "a failing device is not a refusal";
  Kind plain = once;
  plain.epilogue = Epilogue::none;
  Case last(plain, g, random);
  for (const Place place : {kHeuristic, kProduct}) {
    refuse(place, kPlain, kInternalError);
    const std::string function = place == kHeuristic ? "cublasLtMatmulAlgoGetHeuristic" : "cublasLtMatmul";
    expect_throws(device, last, function + " failed with CUBLAS_STATUS_INTERNAL_ERROR (14)");
  }
  refuse(kNowhere, 0, 0);
  run_right(device, last);
  Device no_handle(7);
  no_handle.handle = nullptr;
  expect_throws(no_handle, last, "cublasLtMatmulAlgoGetHeuristic failed with CUBLAS_STATUS_NOT_INITIALIZED (1)");
}

void test_plans(Random& random) {
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
void test_workspaces(Random& random) {
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

void test_threads() {
  std::vector<std::string> wrong(4);
  std::vector<std::thread> threads;
  for (std::string& message : wrong) {
    threads.emplace_back([&message] {
      Random random(7);
      for (int64_t i = 0; i < 200 && message.empty(); ++i) {
        const Kind kind = {Op::weight_grad, i % 2 ? Epilogue::bias_grad : Epilogue::none, DType::bf16, DType::f32,
                           false};
        const Device device(100);
        Case c(kind, {3 + i % 7, 5, 4 + i % 3}, random);
        const char* refused = run_gemm(device, c.gemm);
        if (refused) message = refused;
        const double sum = c.product(1, 2).value;
        if (std::abs(sum - c.result.at(1, 2)) > 1e-5) message = "a wrong result";
        if (fusedamp::cuda::gemm_uses().empty()) message = "no uses";
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& message : wrong) expect(message.empty(), "%s", message.c_str());
}

void test_texts(Random& random) {
  now_testing = "texts";
  const Kind kind = {Op::weight_grad, Epilogue::bias_grad, DType::bf16, DType::f32, true};
  Case c(kind, {3, 5, 7}, random);
  const std::string text = name_of(c);
  expect(text == "m 5, n 7, k 3, bf16 to f32 (accumulating), epilogue bias_grad, cuBLASLt 13.10.0", "%s", text.c_str());
  const Device device(42);
  for (int i = 0; i < 3; ++i) run_gemm(device, c.gemm);
  refuse(kProduct, kBgradB, kNotSupported);
  Kind other = kind;
  other.accumulate = false;
  other.inputs = DType::f16;
  Case refused(other, {3, 5, 7}, random);
  for (int i = 0; i < 2; ++i) run_gemm(device, refused.gemm);
  refuse(kNowhere, 0, 0);
  const std::string uses = '\n' + fusedamp::cuda::gemm_uses();
  for (const char* line : {"\n42\tbias_grad\tbf16\tf32\t1\t3\t\n",
                           "\n42\tbias_grad\tf16\tf32\t0\t2\tcublasLtMatmul: CUBLAS_STATUS_NOT_SUPPORTED\n"}) {
    expect(uses.find(line) != std::string::npos, "no line %s in %s", line, uses.c_str());
  }
  expect(uses.find("\t0\t\n") == std::string::npos, "a line without calls");
}

int finish() {
  printf("%ld checks, %ld failures\n", world::checks, world::failures);
  return world::failures != 0;
}

}  // namespace

int main(int arguments, char** argument) {
  const std::string folder = argument[1], mode = arguments > 2 ? argument[2] : "4";
  Random random(1);
  if (mode == "missing") {
    Case c({Op::forward, Epilogue::none, DType::bf16, DType::f32, false}, {2, 2, 2}, random);
    expect_refused(Device(), c,
                   "cuBLASLt was not found in this process; looked for libtorch_cuda.so (not loaded), "
                   "libcublasLt.so.13 (not loaded), libcublasLt.so.12 (not loaded)");
    return finish();
  }
  void* library = load(folder + "/libcublasLt.so.13");
  if (mode == "versions") {
    load(folder + "/libtorch_cuda.so");
    expect(fusedamp::cuda::lt_library().version == "12.9.2", "torch is linked to another library than %s",
           fusedamp::cuda::lt_library().version.c_str());
    return finish();
  }
  count = reinterpret_cast<int64_t (*)(int)>(dlsym(library, "emulated_lt_count"));
  refuse = reinterpret_cast<void (*)(int, unsigned, int)>(dlsym(library, "emulated_lt_refuse"));
  reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasLtCreate"))(&Device::the_handle);
  test_texts(random);
  test_rules(random);
  test_refusals(random);
  expect(count(kBrokenRules) == 0, "the library was asked for what it does not do");
  test_failures(random);
  expect(count(kBrokenRules) == 1, "the library was asked for what it does not do");  // without a handle
  test_plans(random);
  test_workspaces(random);
  test_all_products(std::stoi(mode), random);
  test_threads();
  now_testing = "end";
  expect(count(kBrokenRules) == 1, "%ld rules were broken", static_cast<long>(count(kBrokenRules)));
  expect(count(kObjects) == 0, "%ld descriptors are left", static_cast<long>(count(kObjects)));
  return finish();
}
