// The only file here that depends on the compiler: nvcc for a GPU, or a host compiler for the CPU emulation in tests;
// tests/emulation/README.md has the rules for both.
#pragma once
#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "old_driver.h"

#define FUSEDAMP_SHARED(T, name, count) __shared__ T name[count]

namespace fusedamp::cuda {

constexpr int kBlock = 256;        // threads of a block
constexpr int64_t kChunk = 16384;  // elements that a block takes at a time
// Size of one launch's parameters, in words of 8 bytes: up to 32,764 bytes from CUDA 12.1. A small table uses a small
// packet.
constexpr int kPacketWords = 4000, kSmallPacketWords = 480;

// An address read from memory; tells the compiler that it is in global memory.
template <class T>
__device__ __forceinline__ T* in_global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// The maximum over a warp; all lanes must call it.
__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
  for (int distance = 16; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
#endif
}

// Number of blocks of kBlock threads that a multiprocessor runs concurrently. 0 on an error, which the launch repeats.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...)) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kBlock, 0);
  return blocks;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
            const Arguments&... arguments) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fusedamp: CUDA kernel ") + name +
                             " could not be launched: " + cudaGetErrorString(error) + old_driver());
}

}  // namespace fusedamp::cuda

#else
#include "cuda_emulation.h"
#endif
