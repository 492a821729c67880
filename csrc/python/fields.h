// What the ops need to know of many tensors, read in one call. Asking a tensor for its address, size and type from
// Python costs about 50 ns each; DLPack's C exchange interface tells all of them in one call of about 20 ns.
#pragma once
#include <pybind11/pybind11.h>

#include "tensors.h"

namespace fusedamp {

// A bytearray of int64 [3, n], addresses, numels and dtype codes (csrc/engine/dtype.h), for n plain contiguous
// floating-point tensors with memory on one device, CPU or CUDA; with `stored` also of int8, uint8 and int16, which
// hold states and split masters. None where there are none, or one is anything else.
pybind11::object read_fields(pybind11::list tensors, bool stored);

// Whether read_fields(tensors) would give these fields again.
bool same_fields(pybind11::list tensors, pybind11::bytearray fields);

// The .grad of each, and how many are None; or None where one is no plain tensor or parameter.
pybind11::object grads_of(pybind11::list params);

// Their version counters, as int64.
pybind11::bytes versions(pybind11::list tensors);

// Whether the items of all lists, one after the other, are the very objects in `items`.
bool same_items(pybind11::list lists, pybind11::list items);

// What the dicts `entries` have under each of `columns`, column by column: tuples of a key and, where not None, the
// name of an attribute of the value. None where one is missing, or a dict has not as many items as `sizes` says.
pybind11::object columns_of(pybind11::list entries, pybind11::list columns, pybind11::list sizes);

// The memory of the tensors of lists of fields, sorted: int64 pairs of where each begins and ends.
pybind11::bytes spans(pybind11::list lists);

// Whether the first n tensors of `fields`, FP32 of one element on the host, hold whole numbers from 0 to 2^62.
bool are_counts(pybind11::bytearray fields, Py_ssize_t n);

// Whether a tensor of `fields` shares memory with one of the `sorted` spans, which don't overlap each other.
bool touches(pybind11::bytearray fields, pybind11::bytes sorted);

}  // namespace fusedamp
