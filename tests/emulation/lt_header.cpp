// Compares csrc/engine/cuda/lt_abi.h with NVIDIA's cublasLt.h: values, sizes, and how each function is called.
#include <cublasLt.h>

#include <type_traits>

#include "../../csrc/engine/cuda/lt_abi.h"

namespace lt = fusedamp::cuda::lt;

#define SAME(ours, theirs) static_assert(static_cast<long long>(lt::ours) == static_cast<long long>(theirs))

SAME(kSuccess, CUBLAS_STATUS_SUCCESS);
SAME(kInvalidValue, CUBLAS_STATUS_INVALID_VALUE);
SAME(kArchMismatch, CUBLAS_STATUS_ARCH_MISMATCH);
SAME(kNotSupported, CUBLAS_STATUS_NOT_SUPPORTED);
SAME(kR32F, CUDA_R_32F);
SAME(kR16F, CUDA_R_16F);
SAME(kR16BF, CUDA_R_16BF);
SAME(kCompute32F, CUBLAS_COMPUTE_32F);
SAME(kOpN, CUBLAS_OP_N);
SAME(kOpT, CUBLAS_OP_T);
SAME(kTransA, CUBLASLT_MATMUL_DESC_TRANSA);
SAME(kTransB, CUBLASLT_MATMUL_DESC_TRANSB);
SAME(kEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
SAME(kBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
SAME(kAuxPointer, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER);
SAME(kAuxLd, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD);
SAME(kMaxWorkspaceBytes, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
SAME(kReductionSchemeMask, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
SAME(kMinAlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
SAME(kMinAlignmentB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
SAME(kMinAlignmentC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
SAME(kMinAlignmentD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
SAME(kReduceInPlace, CUBLASLT_REDUCTION_SCHEME_INPLACE);
SAME(kReduceComputeType, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
SAME(kDefault, CUBLASLT_EPILOGUE_DEFAULT);
SAME(kGeluAux, CUBLASLT_EPILOGUE_GELU_AUX);
SAME(kGeluAuxBias, CUBLASLT_EPILOGUE_GELU_AUX_BIAS);
SAME(kDgelu, CUBLASLT_EPILOGUE_DGELU);
SAME(kDgeluBgrad, CUBLASLT_EPILOGUE_DGELU_BGRAD);
SAME(kBgradB, CUBLASLT_EPILOGUE_BGRADB);

static_assert(sizeof(lt::Algo) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(lt::HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(lt::HeuristicResult, algo) == offsetof(cublasLtMatmulHeuristicResult_t, algo));
static_assert(offsetof(lt::HeuristicResult, workspace_size) ==
              offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(lt::HeuristicResult, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));

// Both are pointers, or both are integers or enumerations of one size.
template <class A, class B>
constexpr bool kAlike = sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B> &&
                        (std::is_integral_v<A> || std::is_enum_v<A>) == (std::is_integral_v<B> || std::is_enum_v<B>);

template <class A, class B>
struct CalledAlike : std::false_type {};
template <class R, class... A, class S, class... B>
struct CalledAlike<R (*)(A...), S (*)(B...)> {
  static constexpr bool get() {
    if constexpr (sizeof...(A) == sizeof...(B)) {
      return kAlike<R, S> && (kAlike<A, B> && ...);
    }
    return false;
  }
  static constexpr bool value = get();
};

#define CHECK(name) static_assert(CalledAlike<decltype(lt::Functions::name), decltype(&cublasLt##name)>::value, #name);
FUSEDAMP_LT_FUNCTIONS(CHECK)
