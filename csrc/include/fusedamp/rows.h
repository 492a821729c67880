// What an optimizer and the engines agree on: dtype codes, and the tables of addresses that `_planned_step_` takes.
// Depends on nothing, so the engines, the Python module and C++ programs share it.
#pragma once
#include <stdint.h>

namespace fusedamp {

// The element types of tensors: arithmetic types, and storage types (i8, u8: quantized values of a state with block
// scales; i16: the remainder of a split master).
enum class DType : uint8_t { f16, bf16, f32, f64, i8, u8, i16 };

constexpr bool is_8bit(DType t) { return t == DType::i8 || t == DType::u8; }
constexpr int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : is_8bit(t) ? 1 : 2; }
constexpr bool is_16bit(DType t) { return t == DType::f16 || t == DType::bf16; }

constexpr int kMaxStates = 3, kMaxHyper = 8;
constexpr int64_t kScaleBlock = 128;  // elements of an 8-bit state, in the order of memory, that share a scale

// Where a buffer's elements are in a whole tensor, of which it may be one rank's shard: element i of the buffer is
// element (i / run) * stride + first + i % run of the whole, or first + i if run is 0. Random numbers belong to the
// whole tensor, so they do not depend on the number of ranks.
struct Placement {
  int64_t first, run, stride;
};

// One parameter tensor of a step. All its buffers have `numel` elements in the same order of memory.
struct StepRow {
  void* param;
  void* master;               // null: `param` itself is stepped
  void* states[kMaxStates];   // f64 where param is f64; then the rule's scalars, each one double
  float* scales[kMaxStates];  // of 8-bit states: one for each block of kScaleBlock elements
  float* step;                // one element: this tensor's step count (math/count.h)
  double* squares;            // of a rule with norms: kMaxNorms sums over all ranks; null: those of this buffer
  int64_t numel, seed;        // seed: of the tensor's random numbers
  Placement place;            // of the buffers in the whole tensor
  int32_t group;              // index of its StepGroup
  DType grad_dtype, param_dtype;
  DType master_dtype;      // f32, or i16: the remainder of a split master
  DType state_dtype;       // f32, bf16 (rounded stochastically), f64, or i8: 8-bit values, signed according to the rule
  bool maximize;           // of its group, like the next; stored here, so that element-wise kernels need no group
  bool stochastic;         // rounding of 16-bit weights without masters
  uint8_t unused[6] = {};  // in place of padding, so that equal rows have equal bytes
};
static_assert(sizeof(StepRow) == 17 * 8, "Python also builds rows, in words of 8 bytes");

// Common parameters of the rows of one group. Rows are sorted by group.
struct StepGroup {
  double hyper[kMaxHyper];  // the rule's Hyper
  double lr;
  const void* lr_tensor;  // one element; null: `lr`
  int64_t first, count;   // its rows
  int32_t rule;           // a RuleId
  DType lr_dtype;         // f32 or f64
  uint8_t unused[3] = {};
};
static_assert(sizeof(StepGroup) == 13 * 8, "as for rows");

}  // namespace fusedamp
