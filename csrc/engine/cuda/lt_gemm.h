// Matrix products by cuBLASLt, with their epilogues. Nothing here syncs; a product may be captured in a graph.
#pragma once
#include <functional>
#include <string>

#include "../gemm.h"

struct CUstream_st;

namespace fusedamp::cuda {

// Where a product runs. The device is current.
struct LtDevice {
  void* handle;  // torch's cuBLAS handle, which is a cuBLASLt handle too
  CUstream_st* stream;
  int index;
  int capability;  // as 90 for 9.0
  // Device memory for the kernels that this call queues, of any alignment, not initialized.
  std::function<void*(int64_t bytes)> scratch;
};

// Queues the product and returns null; or returns why there is none, a text that is never freed. Then the caller
// computes it otherwise: outputs that are overwritten may hold anything, others are unchanged. Throws
// std::runtime_error if the library fails for another reason than a product that it does not support, or fails when it
// may have added to D.
const char* run_gemm(const LtDevice& device, const Gemm& gemm);

// The product for an error message: sizes, types, epilogue, version of the library.
std::string describe(const Gemm& gemm);

// What run_gemm was asked for so far. Lines of "device, epilogue, inputs, output, accumulate, calls, why not",
// separated by tabs; the last is empty for calls that ran.
std::string gemm_uses();

}  // namespace fusedamp::cuda
