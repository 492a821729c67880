// The part of cuBLASLt's C interface that is used here. A toolkit with nvcc often has no cublasLt.h; a test compares
// these declarations with the real header where one is found. Documentation: https://docs.nvidia.com/cuda/cublas/
#pragma once
#include <stddef.h>
#include <stdint.h>

struct CUstream_st;

namespace fusedamp::cuda::lt {

enum Status : int {
  kSuccess = 0,
  kNotInitialized = 1,
  kInvalidValue = 7,
  kArchMismatch = 8,
  kNotSupported = 15,
};
enum DataType : int { kR32F = 0, kR16F = 2, kR16BF = 14 };
enum ComputeType : int { kCompute32F = 68 };
enum Operation : int { kOpN = 0, kOpT = 1 };
enum DescAttribute : int {
  kTransA = 3,
  kTransB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kAuxPointer = 11,
  kAuxLd = 12,
};
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,
  kReductionSchemeMask = 3,
  kMinAlignmentA = 5,
  kMinAlignmentB = 6,
  kMinAlignmentC = 7,
  kMinAlignmentD = 8,
};
enum ReductionScheme : uint32_t { kReduceInPlace = 1, kReduceComputeType = 2 };
enum EpilogueValue : uint32_t {
  kDefault = 1,
  kGeluAux = 160,
  kGeluAuxBias = 164,
  kDgelu = 192,
  kDgeluBgrad = 208,
  kBgradB = 512,
};

struct MatmulDesc;
struct MatrixLayout;
struct Preference;

struct Algo {
  uint64_t data[8];
};
struct HeuristicResult {
  Algo algo;
  size_t workspace_size;
  Status state;
  float waves;
  int reserved[4];
};

// All functions, for loading and tests: cublasLt<name>.
#define FUSEDAMP_LT_FUNCTIONS(X)  \
  X(GetVersion)                   \
  X(GetStatusName)                \
  X(MatmulDescCreate)             \
  X(MatmulDescDestroy)            \
  X(MatmulDescSetAttribute)       \
  X(MatrixLayoutCreate)           \
  X(MatrixLayoutDestroy)          \
  X(MatmulPreferenceCreate)       \
  X(MatmulPreferenceDestroy)      \
  X(MatmulPreferenceSetAttribute) \
  X(MatmulAlgoGetHeuristic)       \
  X(Matmul)

struct Functions {
  size_t (*GetVersion)();
  const char* (*GetStatusName)(Status);
  Status (*MatmulDescCreate)(MatmulDesc**, ComputeType, DataType scale);
  Status (*MatmulDescDestroy)(MatmulDesc*);
  Status (*MatmulDescSetAttribute)(MatmulDesc*, DescAttribute, const void* value, size_t bytes);
  Status (*MatrixLayoutCreate)(MatrixLayout**, DataType, uint64_t rows, uint64_t columns, int64_t ld);
  Status (*MatrixLayoutDestroy)(MatrixLayout*);
  Status (*MatmulPreferenceCreate)(Preference**);
  Status (*MatmulPreferenceDestroy)(Preference*);
  Status (*MatmulPreferenceSetAttribute)(Preference*, PreferenceAttribute, const void* value, size_t bytes);
  Status (*MatmulAlgoGetHeuristic)(void* handle, MatmulDesc*, MatrixLayout* a, MatrixLayout* b, MatrixLayout* c,
                                   MatrixLayout* d, Preference*, int wanted, HeuristicResult*, int* found);
  Status (*Matmul)(void* handle, MatmulDesc*, const void* alpha, const void* a, MatrixLayout*, const void* b,
                   MatrixLayout*, const void* beta, const void* c, MatrixLayout*, void* d, MatrixLayout*, const Algo*,
                   void* workspace, size_t workspace_bytes, CUstream_st*);
};

}  // namespace fusedamp::cuda::lt
