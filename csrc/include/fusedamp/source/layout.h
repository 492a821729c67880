// How a tensor lies in memory.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace fusedamp::detail {

// Whether each element has its own address, without gaps, in any order of dimensions.
inline bool is_dense(const at::Tensor& t) { return t.is_non_overlapping_and_dense(); }

// Whether two elements may share an address, as after expand().
inline bool overlaps_itself(const at::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (size <= 1) continue;
    if (stride <= reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

}  // namespace fusedamp::detail
