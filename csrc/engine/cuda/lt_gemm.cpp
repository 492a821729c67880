#include "lt_gemm.h"

#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "content_cache.h"
#include "lt_library.h"

namespace fusedamp::cuda {
namespace {

constexpr int64_t kWorkspaceAlignment = 256;
constexpr size_t kMostPlans = 4096;
constexpr const char* kEpilogues[] = {"none", "bias_grad", "gelu_aux", "gelu_aux_bias", "dgelu", "dgelu_bias_grad"};

// ---- what the library needs. It would refuse some of the rest, and fail or be wrong at other parts of it.

bool fits(int64_t size) { return size >= 1 && size <= INT32_MAX; }

bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

const char* unsupported(const Gemm& g) {
  if (!is_16bit(g.inputs)) return "inputs are neither FP16 nor BF16";
  if (g.output != g.inputs && g.output != DType::f32) return "the output has neither the inputs' type nor FP32";
  if (!fits(g.m) || !fits(g.n) || !fits(g.k)) return "a size is 0 or above 2^31 - 1";
  if (!fits(g.lda) || !fits(g.ldb) || !fits(g.ldd)) return "a leading dimension is 0 or above 2^31 - 1";
  if (g.lda < (g.transpose_a ? g.k : g.m) || g.ldb < (g.transpose_b ? g.n : g.k) || g.ldd < g.m) {
    return "a leading dimension is smaller than its column";
  }
  if (!g.a || !g.b || !g.d) return "a matrix is null";
  if (g.accumulate && g.epilogue >= Epilogue::gelu_aux) return "GELU cannot be fused with accumulation";
  // Where one of these is 1, versions before 12.3.4 have no such epilogues, and others access memory outside.
  if (g.epilogue == Epilogue::bias_grad && (g.m == 1 || g.n == 1 || g.k == 1)) return "bias_grad of a single row";
  if (g.epilogue >= Epilogue::dgelu && g.k == 1) return "dgelu of a single column";
  // The library's preferences do not cover these addresses.
  if (has_vector(g.epilogue) && (!g.vector || !on_16_bytes(g.vector)))
    return "the bias or its gradient is null or not aligned to 16 bytes";
  if (has_aux(g.epilogue)) {
    if (!g.aux || !on_16_bytes(g.aux)) return "the input of GELU is null or not aligned to 16 bytes";
    if (!fits(g.ldaux) || g.ldaux < g.m || g.ldaux % 8 != 0) {
      return "the leading dimension of the input of GELU is smaller than its column or not a multiple of 8";
    }
  }
  return nullptr;
}

// ---- descriptors

[[noreturn]] void fail(const Gemm& gemm, const char* function, lt::Status status) {
  throw std::runtime_error(std::string("fusedamp: ") + function + " failed with " +
                           lt_library().functions.GetStatusName(status) + " (" + std::to_string(status) + ") for " +
                           describe(gemm));
}

template <class T>
using Owned = std::unique_ptr<T, lt::Status (*)(T*)>;

lt::DataType type_of(DType dtype) {
  return dtype == DType::f32 ? lt::kR32F : dtype == DType::f16 ? lt::kR16F : lt::kR16BF;
}

lt::EpilogueValue value_of(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::bias_grad: return lt::kBgradB;
    case Epilogue::gelu_aux: return lt::kGeluAux;
    case Epilogue::gelu_aux_bias: return lt::kGeluAuxBias;
    case Epilogue::dgelu: return lt::kDgelu;
    case Epilogue::dgelu_bias_grad: return lt::kDgeluBgrad;
    default: return lt::kDefault;
  }
}

// The library's view of one product. Other attributes have the right defaults: host pointers to alpha and beta, and D's
// type for bias and aux.
struct Descriptors {
  explicit Descriptors(const Gemm& g)
      : gemm(g),
        matmul(nullptr, f.MatmulDescDestroy),
        a(layout(g.inputs, g.transpose_a ? g.k : g.m, g.transpose_a ? g.m : g.k, g.lda)),
        b(layout(g.inputs, g.transpose_b ? g.n : g.k, g.transpose_b ? g.k : g.n, g.ldb)),
        d(layout(g.output, g.m, g.n, g.ldd)) {
    lt::MatmulDesc* made = nullptr;
    check("cublasLtMatmulDescCreate", f.MatmulDescCreate(&made, lt::kCompute32F, lt::kR32F));
    matmul.reset(made);
    set(lt::kTransA, g.transpose_a ? lt::kOpT : lt::kOpN);
    set(lt::kTransB, g.transpose_b ? lt::kOpT : lt::kOpN);
    set(lt::kEpilogue, value_of(g.epilogue));
    if (has_vector(g.epilogue)) set(lt::kBiasPointer, g.vector);
    if (has_aux(g.epilogue)) {
      set(lt::kAuxPointer, g.aux);
      set(lt::kAuxLd, g.ldaux);
    }
  }

  void check(const char* function, lt::Status status) const {
    if (status != lt::kSuccess) fail(gemm, function, status);
  }
  Owned<lt::MatrixLayout> layout(DType dtype, int64_t rows, int64_t columns, int64_t ld) const {
    lt::MatrixLayout* made = nullptr;
    check("cublasLtMatrixLayoutCreate",
          f.MatrixLayoutCreate(&made, type_of(dtype), static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), ld));
    return {made, f.MatrixLayoutDestroy};
  }
  template <class T>
  void set(lt::DescAttribute attribute, T value) const {
    check("cublasLtMatmulDescSetAttribute", f.MatmulDescSetAttribute(matmul.get(), attribute, &value, sizeof value));
  }

  const lt::Functions& f = lt_library().functions;
  const Gemm& gemm;
  Owned<lt::MatmulDesc> matmul;
  Owned<lt::MatrixLayout> a, b, d;
};

// ---- plans

// All that an algorithm depends on, except the device.
struct Key {
  int32_t m, n, k, lda, ldb, ldd, ldaux;
  uint16_t a, b, d, vector, aux;  // alignments in bytes
  DType inputs, output;
  Epilogue epilogue;
  bool transpose_a, transpose_b, accumulate;
};
static_assert(std::is_trivially_copyable_v<Key> && sizeof(Key) == 44, "the cache compares bytes, so no padding");

// The largest power of two up to 256 that divides the address; 256 is the library's default.
uint16_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | 256;
  return static_cast<uint16_t>(address & ~(address - 1));
}

Key key_of(const Gemm& g) {
  const auto narrow = [](int64_t size) { return static_cast<int32_t>(size); };
  const bool vector = has_vector(g.epilogue), aux = has_aux(g.epilogue);
  return {narrow(g.m),
          narrow(g.n),
          narrow(g.k),
          narrow(g.lda),
          narrow(g.ldb),
          narrow(g.ldd),
          aux ? narrow(g.ldaux) : 0,
          alignment_of(g.a),
          alignment_of(g.b),
          alignment_of(g.d),
          vector ? alignment_of(g.vector) : uint16_t{0},
          aux ? alignment_of(g.aux) : uint16_t{0},
          g.inputs,
          g.output,
          g.epilogue,
          g.transpose_a,
          g.transpose_b,
          g.accumulate};
}

struct Plan {
  lt::Algo algo = {};
  size_t workspace = 0;
  const char* refused = nullptr;  // guarded by the mutex
};

struct Use {
  int device;
  Epilogue epilogue;
  DType inputs, output;
  bool accumulate;
  const char* refused;
  int64_t calls;
};

struct Plans {
  std::mutex mutex;
  ContentCache<std::shared_ptr<Plan>> cache{kMostPlans * sizeof(Key)};
  std::set<std::string> reasons;  // of the library: a few functions and statuses
  std::vector<Use> uses;          // few, because a reason has no sizes

  const char* reason(const char* function, lt::Status status) {
    return reasons.insert(std::string(function) + ": " + lt_library().functions.GetStatusName(status)).first->c_str();
  }
  void count(int device, const Gemm& g, const char* refused, int64_t calls) {
    for (Use& use : uses) {
      if (use.device == device && use.epilogue == g.epilogue && use.inputs == g.inputs && use.output == g.output &&
          use.accumulate == g.accumulate && use.refused == refused) {
        use.calls += calls;
        return;
      }
    }
    uses.push_back({device, g.epilogue, g.inputs, g.output, g.accumulate, refused, calls});
  }
};

Plans& plans() {
  static auto& only = *new Plans;  // never destroyed: reasons are never freed
  return only;
}

// These say that the product is not supported; others, that the library or the device fails.
bool is_refusal(lt::Status status) {
  return status == lt::kInvalidValue || status == lt::kArchMismatch || status == lt::kNotSupported;
}

Plan ask_library(const LtDevice& device, const Gemm& gemm, const Key& key) {
  const Descriptors descriptors(gemm);
  const lt::Functions& f = descriptors.f;
  lt::Preference* made = nullptr;
  descriptors.check("cublasLtMatmulPreferenceCreate", f.MatmulPreferenceCreate(&made));
  const Owned<lt::Preference> preference(made, f.MatmulPreferenceDestroy);
  const auto set = [&](lt::PreferenceAttribute attribute, auto value) {
    descriptors.check("cublasLtMatmulPreferenceSetAttribute",
                      f.MatmulPreferenceSetAttribute(made, attribute, &value, sizeof value));
  };
  // The sizes that the library's documentation recommends.
  set(lt::kMaxWorkspaceBytes, uint64_t{device.capability >= 90 ? 32u << 20 : 4u << 20});
  // Partial sums are FP32: in the workspace, or in an FP32 output.
  set(lt::kReductionSchemeMask,
      uint32_t{lt::kReduceComputeType} | (gemm.output == DType::f32 ? uint32_t{lt::kReduceInPlace} : 0u));
  set(lt::kMinAlignmentA, uint32_t{key.a});
  set(lt::kMinAlignmentB, uint32_t{key.b});
  set(lt::kMinAlignmentC, uint32_t{key.d});
  set(lt::kMinAlignmentD, uint32_t{key.d});

  lt::HeuristicResult result = {};
  int found = 0;
  lt::Status status =
      f.MatmulAlgoGetHeuristic(device.handle, descriptors.matmul.get(), descriptors.a.get(), descriptors.b.get(),
                               descriptors.d.get(), descriptors.d.get(), made, 1, &result, &found);
  if (status == lt::kSuccess) status = found > 0 ? result.state : lt::kNotSupported;
  Plan plan = {result.algo, result.workspace_size};
  if (is_refusal(status)) {
    plan.refused = plans().reason("cublasLtMatmulAlgoGetHeuristic", status);
  } else {
    descriptors.check("cublasLtMatmulAlgoGetHeuristic", status);
  }
  return plan;
}

void* aligned(void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) + kWorkspaceAlignment - 1;
  return reinterpret_cast<void*>(address - address % kWorkspaceAlignment);
}

const char* name_of(DType dtype) { return dtype == DType::f32 ? "f32" : dtype == DType::f16 ? "f16" : "bf16"; }

}  // namespace

const char* run_gemm(const LtDevice& device, const Gemm& gemm) {
  Plans& shared = plans();
  const LtLibrary& library = lt_library();
  const char* refused = library.missing.empty() ? unsupported(gemm) : library.missing.c_str();
  std::shared_ptr<Plan> plan;
  {
    const std::lock_guard<std::mutex> lock(shared.mutex);
    if (!refused) {
      const Key key = key_of(gemm);
      const std::string_view content(reinterpret_cast<const char*>(&key), sizeof key);
      plan = shared.cache.get(nullptr, device.index, content,
                              [&] { return std::make_shared<Plan>(ask_library(device, gemm, key)); });
      refused = plan->refused;
    }
    shared.count(device.index, gemm, refused, 1);
  }
  if (refused) return refused;

  const Descriptors d(gemm);
  void* workspace = nullptr;
  if (plan->workspace > 0) {
    workspace = aligned(device.scratch(static_cast<int64_t>(plan->workspace) + kWorkspaceAlignment - 1));
  }
  const float alpha = 1, beta = gemm.accumulate ? 1 : 0;
  const lt::Status status = library.functions.Matmul(device.handle, d.matmul.get(), &alpha, gemm.a, d.a.get(), gemm.b,
                                                     d.b.get(), &beta, gemm.d, d.d.get(), gemm.d, d.d.get(),
                                                     &plan->algo, workspace, plan->workspace, device.stream);
  if (status == lt::kSuccess) return nullptr;
  if (is_refusal(status)) {
    const std::lock_guard<std::mutex> lock(shared.mutex);
    plan->refused = refused = shared.reason("cublasLtMatmul", status);
    shared.count(device.index, gemm, nullptr, -1);
    shared.count(device.index, gemm, refused, 1);
  }
  // The documentation does not say what a failed product has written.
  if (!refused || gemm.accumulate) fail(gemm, "cublasLtMatmul", status);
  return refused;
}

std::string describe(const Gemm& g) {
  return "m " + std::to_string(g.m) + ", n " + std::to_string(g.n) + ", k " + std::to_string(g.k) + ", " +
         name_of(g.inputs) + " to " + name_of(g.output) + (g.accumulate ? " (accumulating)" : "") + ", epilogue " +
         kEpilogues[static_cast<int>(g.epilogue)] + ", cuBLASLt " +
         (lt_library().missing.empty() ? lt_library().version : "missing");
}

std::string gemm_uses() {
  Plans& shared = plans();
  const std::lock_guard<std::mutex> lock(shared.mutex);
  std::string text;
  for (const Use& use : shared.uses) {
    if (use.calls == 0) continue;
    for (const std::string& field :
         {std::to_string(use.device), std::string(kEpilogues[static_cast<int>(use.epilogue)]),
          std::string(name_of(use.inputs)), std::string(name_of(use.output)), std::to_string(use.accumulate),
          std::to_string(use.calls)}) {
      text += field + '\t';
    }
    text += std::string(use.refused ? use.refused : "") + '\n';
  }
  return text;
}

}  // namespace fusedamp::cuda
