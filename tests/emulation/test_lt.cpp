// csrc/engine/cuda/lt_gemm.cpp and lt_library.cpp with the emulated library, which lies next to this program.
// usage: test_lt [rounds]
#include <sys/wait.h>
#include <unistd.h>

#include <stdexcept>
#include <thread>

#include "../../csrc/engine/cuda/lt_library.h"
#include "plan_tests.h"

namespace {

using namespace gemms;

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
      for (int64_t& alignment : g.alignment) alignment = int64_t{1} << (1 + below(random, 9));
      for (int i : {3, 4}) g.alignment[i] = std::max(g.alignment[i], int64_t{16});
      const Device device;
      Case c(kind, g, random);
      run_right(device, c);
    }
  }
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
    broken(none, "a matrix is null", [=](Gemm& x) { x.*list = nullptr; });
  }
  broken(none, "a matrix is null", [](Gemm& x) { x.d = nullptr; });
  for (const Epilogue e : {Epilogue::gelu_aux, Epilogue::gelu_aux_bias, Epilogue::dgelu, Epilogue::dgelu_bias_grad}) {
    broken(e, "GELU cannot be fused with accumulation", [](Gemm& x) { x.accumulate = true; });
    const char* bad_aux = "the input of GELU is null or not aligned to 16 bytes";
    broken(e, bad_aux, [](Gemm& x) { x.aux = nullptr; });
    broken(e, bad_aux, [](Gemm& x) { x.aux = static_cast<char*>(x.aux) + 8; });
    const char* bad_ld = "the leading dimension of the input of GELU is smaller than its column or not a multiple of 8";
    broken(e, bad_ld, [](Gemm& x) { x.ldaux -= 8; });
    broken(e, bad_ld, [](Gemm& x) { x.ldaux += 4; });
    broken(e, bad_ld, [=](Gemm& x) { x.ldaux = large; });
  }
  for (const Epilogue e : {Epilogue::bias_grad, Epilogue::gelu_aux_bias, Epilogue::dgelu_bias_grad}) {
    const char* bad_bias = "the bias or its gradient is null or not aligned to 16 bytes";
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
  struct Refusal {
    Place place;
    int status;
    std::string why;
  };
  const std::string ask = "cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_";
  const Refusal refusals[] = {
      {kHeuristic, kNotSupported, ask + "NOT_SUPPORTED"},
      {kHeuristic, kInvalidValue, ask + "INVALID_VALUE"},
      {kNothingFound, 0, ask + "NOT_SUPPORTED"},
      {kState, kArchMismatch, ask + "ARCH_MISMATCH"},
      {kProduct, kNotSupported, "cublasLtMatmul: CUBLAS_STATUS_NOT_SUPPORTED"},
  };
  Geometry g = {9, 20, 11};
  for (const auto& [place, status, why] : refusals) {
    now_testing = "refusal at place " + std::to_string(place);
    ++g.rows;
    Device device;
    Case c(kind, g, random);
    refuse(place, kBgradB, status);
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

// Threads with the same products; each third product is refused.
void test_threads() {
  now_testing = "threads";
  refuse(kProduct, kBgradB, kNotSupported);
  std::vector<std::string> wrong(4);
  std::vector<std::thread> threads;
  for (std::string& message : wrong) {
    threads.emplace_back([&message] {
      Random random(7);
      for (int64_t i = 0; i < 300 && message.empty(); ++i) {
        const Epilogue epilogue = i % 3 ? Epilogue::none : Epilogue::bias_grad;
        const Device device(100);
        Case c({Op::weight_grad, epilogue, DType::bf16, DType::f32, false}, {3 + i / 10, 5, 4 + i % 2}, random);
        const char* refused = run_gemm(device, c.gemm);
        if (!refused != (epilogue == Epilogue::none)) message = refused ? refused : "is not refused";
        if (!refused && std::abs(c.product(1, 2).value - c.result.at(1, 2)) > 1e-4) message = "a wrong result";
        if (fusedamp::cuda::gemm_uses().empty()) message = "no uses";
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  refuse(kNowhere, 0, 0);
  for (const std::string& message : wrong) expect(message.empty(), "%s", message.c_str());
}

void test_texts(Random& random) {
  now_testing = "texts";
  const Kind kind = {Op::weight_grad, Epilogue::bias_grad, DType::bf16, DType::f32, true};
  Case c(kind, {3, 5, 7}, random);
  const std::string text = name_of(c);
  expect(text == "m 5, n 7, k 3, bf16 to f32 (accumulating), epilogue bias_grad, cuBLASLt 13.10.0", "%s", text.c_str());
  const auto run = [&](int device, Epilogue epilogue, DType inputs, DType output, bool accumulate, int calls) {
    Case other({Op::weight_grad, epilogue, inputs, output, accumulate}, {3, 5, 7}, random);
    for (int i = 0; i < calls; ++i) run_gemm(Device(device), other.gemm);
  };
  const DType f16 = DType::f16, bf16 = DType::bf16, f32 = DType::f32;
  run(42, Epilogue::bias_grad, bf16, f32, true, 3);
  run(43, Epilogue::bias_grad, bf16, f32, true, 1);
  run(42, Epilogue::none, bf16, f32, true, 2);
  run(42, Epilogue::none, bf16, f32, false, 7);
  run(42, Epilogue::bias_grad, f16, f32, true, 4);
  run(42, Epilogue::bias_grad, bf16, bf16, true, 5);
  refuse(kProduct, kBgradB, kNotSupported);
  run(42, Epilogue::bias_grad, bf16, f32, false, 6);
  refuse(kNowhere, 0, 0);
  const std::string uses = fusedamp::cuda::gemm_uses(),
                    wanted =
                        "42\tbias_grad\tbf16\tf32\t1\t3\t\n"
                        "43\tbias_grad\tbf16\tf32\t1\t1\t\n"
                        "42\tnone\tbf16\tf32\t1\t2\t\n"
                        "42\tnone\tbf16\tf32\t0\t7\t\n"
                        "42\tbias_grad\tf16\tf32\t1\t4\t\n"
                        "42\tbias_grad\tbf16\tbf16\t1\t5\t\n"
                        "42\tbias_grad\tbf16\tf32\t0\t6\tcublasLtMatmul: CUBLAS_STATUS_NOT_SUPPORTED\n";
  expect(uses == wanted, "the uses are\n%s", uses.c_str());
}

// The library is searched once in a process, so these run in others.
template <class Test>
void in_child(Test test) {
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    test();
    fflush(stdout);
    _exit(world::failures != 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  expect(status == 0, "a child has status %d", status);
}

void test_search(const std::string& folder, Random& random) {
  now_testing = "no library";
  in_child([&] {
    Case c({Op::forward, Epilogue::none, DType::bf16, DType::f32, false}, {2, 2, 2}, random);
    expect_refused(Device(), c,
                   "cuBLASLt was not found in this process; looked for libtorch_cuda.so (not loaded), "
                   "libcublasLt.so.13 (not loaded), libcublasLt.so.12 (not loaded)");
  });
  now_testing = "a library without functions";
  in_child([&] {
    load(folder + "libtorch.so");
    const std::string& missing = fusedamp::cuda::lt_library().missing;
    expect(missing.find("libtorch_cuda.so (without cublasLtGetVersion), ") != std::string::npos, "%s", missing.c_str());
  });
  const auto expect_version = [](const char* version) {
    expect(fusedamp::cuda::lt_library().version == version, "%s", fusedamp::cuda::lt_library().version.c_str());
  };
  now_testing = "version 12";
  in_child([&] {
    load(folder + "libcublasLt.so.12");
    expect_version("12.9.2");
  });
  now_testing = "two versions; torch is linked to 12";
  in_child([&] {
    load(folder + "libcublasLt.so.13");
    load(folder + "libtorch_cuda.so");
    expect_version("12.9.2");
  });
}

}  // namespace

int main(int arguments, char** argument) {
  const std::string program = argument[0], folder = program.substr(0, program.rfind('/') + 1);
  Random random(1);
  test_search(folder, random);
  void* library = load(folder + "libcublasLt.so.13");
  count = reinterpret_cast<int64_t (*)(int)>(dlsym(library, "emulated_lt_count"));
  refuse = reinterpret_cast<void (*)(int, unsigned, int)>(dlsym(library, "emulated_lt_refuse"));
  reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasLtCreate"))(&Device::the_handle);
  test_texts(random);
  test_rules(random);
  test_refusals(random);
  expect(count(kBrokenRules) == 0, "the library was asked for what it does not do");
  test_failures(random);
  test_plans(random);
  test_workspaces(random);
  test_all_products(arguments > 1 ? std::stoi(argument[1]) : 10, random);
  test_threads();
  now_testing = "end";
  const int64_t without_handle = 1;
  expect(count(kBrokenRules) == without_handle, "%ld rules were broken", static_cast<long>(count(kBrokenRules)));
  expect(count(kObjects) == 0, "%ld descriptors are left", static_cast<long>(count(kObjects)));
  printf("%ld checks, %ld failures\n", world::checks, world::failures);
  return world::failures != 0;
}
