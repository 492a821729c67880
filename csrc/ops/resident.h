// Tables that are on the device already. A model's addresses rarely change between steps, so their table is sent once.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/ops.h>

#include <mutex>

#include "../engine/cuda/content_cache.h"
#include "../engine/cuda/engine.h"
#include "rows.h"

namespace fusedamp {

class ResidentTables {
 public:
  // A device copy of `bytes` at `table`, valid for work that is queued on `stream` while the result lives.
  // `like` is any tensor on the device.
  Tensor get(const void* table, int64_t bytes, cudaStream_t stream, const Tensor& like) {
    const auto send = [&] {
      Tensor copy = torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
      cuda::upload(stream, copy.data_ptr(), table, bytes);
      return copy;
    };
    // A graph outlives this store and replays the uploads that it captured: it gets copies of its own.
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const bool capturing =
        cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone;
    if (capturing) return send();

    const std::lock_guard<std::mutex> lock(mutex_);
    const std::string_view content(static_cast<const char*>(table), static_cast<size_t>(bytes));
    return copies_.get(stream, like.get_device_index(), content, send);
  }

 private:
  std::mutex mutex_;
  // About 100 bytes per tensor. Copies are never written again; what is dropped, the allocator reuses in stream order.
  cuda::ContentCache<Tensor> copies_{16 << 20};
};

}  // namespace fusedamp
