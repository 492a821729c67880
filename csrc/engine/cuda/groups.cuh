// The rows of a step on the device, and their groups, which the coefficient kernels need.
#pragma once
#include "chunks.cuh"

namespace fusedamp::cuda {

// grads[i]: the address of row i's gradient, in a separate table. If gradients move, only that table is uploaded.
struct StepRows : Table<StepRow> {
  void* const* grads;
};

// Groups in a kernel's parameters, so a changed learning rate needs no upload. If they do not fit, several launches
// share the rows.
constexpr int kPacketGroups = 32;
struct GroupPacket {
  StepGroup groups[kPacketGroups];
  int32_t first, count;

  // The row's group, or null if it is in another packet.
  __device__ __forceinline__ const StepGroup* of(const StepRow& row) const {
    const int32_t at = row.group - first;
    return at >= 0 && at < count ? groups + at : nullptr;
  }
};

// Calls visit(packet) until every group of `rows` (sorted by group) has been in a packet.
template <class Visit>
void for_each_packet(const std::vector<Placed<StepRow>>& rows, const StepGroups& all, Visit visit) {
  const int32_t end = rows.back().row.group + 1;
  for (int32_t first = rows.front().row.group; first < end; first += kPacketGroups) {
    GroupPacket packet = {};
    packet.first = first;
    packet.count = std::min<int32_t>(kPacketGroups, end - first);
    std::copy_n(all.groups + first, packet.count, packet.groups);
    visit(packet);
  }
}

}  // namespace fusedamp::cuda
