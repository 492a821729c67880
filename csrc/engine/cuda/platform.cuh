// The only file here that knows whether nvcc compiles the kernels for a GPU or a host compiler for the emulation that
// tests run on a CPU; tests/emulation/README.md has the rules that keep both possible.
#pragma once
#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define FUSEDAMP_SHARED(T, name, count) __shared__ T name[count]

namespace fusedamp::cuda {

constexpr int kBlock = 256;        // threads of a block
constexpr int64_t kChunk = 16384;  // elements that a block takes at a time
// What one launch carries in its parameters, in words of 8 bytes: up to 32,764 bytes from CUDA 12.1 on. A small table
// goes in a small packet.
constexpr int kPacketWords = 4000, kSmallPacketWords = 480;

// An address that was read from memory, of which the compiler does not know that it lies in global memory.
template <class T>
__device__ __forceinline__ T* in_global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// The largest of a warp's numbers; every lane calls it and gets it.
__device__ __forceinline__ uint32_t warp_max(uint32_t x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, x);
#else
  for (int distance = 16; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
#endif
}

// How many blocks of kBlock threads a multiprocessor runs at the same time. 0 where that is an error: so is the launch.
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
                             " could not be launched: " + cudaGetErrorString(error));
}

}  // namespace fusedamp::cuda

#else
#include "cuda_emulation.h"
#endif
