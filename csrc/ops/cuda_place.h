// A call on a CUDA device: the device made current, torch's stream, and memory that lives until the kernels are queued.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "../engine/cuda/old_driver.h"
#include "checks.h"

namespace fusedamp {

class CudaPlace {
 public:
  explicit CudaPlace(const Tensor& like) : like_(like), index_(like.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    check(cudaSetDevice(index_));  // torch's CUDA runtime is another copy than the one in this object
    stream_ = static_cast<cudaStream_t>(stream);
  }
  CudaPlace(const CudaPlace&) = delete;

  const Tensor& like() const { return like_; }
  int32_t index() const { return index_; }
  cudaStream_t stream() const { return stream_; }
  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, index_));
    return value;
  }
  bool is_capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }
  void* scratch(int64_t bytes) { return keep(torch::stable::new_empty(like_, {bytes}, ScalarType::Byte)); }
  void* keep(Tensor memory) {
    kept_.push_back(std::move(memory));
    return kept_.back().data_ptr();
  }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "fusedamp: CUDA error: ", cudaGetErrorString(error), cuda::old_driver());
  }

  Tensor like_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
  Tensors kept_;
};

}  // namespace fusedamp
