// Reads the fields of many tensors that the ops need in one call. Reading a tensor's address, size or type from Python
// costs about 50 ns each; DLPack's C exchange interface returns all of them in one call of about 20 ns.
#pragma once
#include <pybind11/pybind11.h>

#include "tensors.h"

namespace fusedamp {

// A bytearray of int64 [3, n], addresses, numels and dtype codes (csrc/include/fusedamp/rows.h), for n plain contiguous
// floating-point tensors with memory on one device, CPU or CUDA; with `stored` also of int8, uint8 and int16, which
// hold states and split masters. None if the list is empty or a tensor is of another kind.
pybind11::object read_fields(pybind11::list tensors, bool stored);

// True if read_fields(tensors) would return equal fields.
bool same_fields(pybind11::list tensors, pybind11::bytearray fields);

// The .grad of each, and the number that are None; None if one is not a plain tensor or parameter.
pybind11::object grads_of(pybind11::list params);

// Their version counters, as int64.
pybind11::bytes versions(pybind11::list tensors);

// True if the concatenated lists have the same objects as `items`.
bool same_items(pybind11::list lists, pybind11::list items);

// Values of the dicts `entries` for each of `columns`, column by column. A column is a key and, if not None, the name
// of an attribute of the value. None if one is missing, or if a dict's size differs from `sizes`.
pybind11::object columns_of(pybind11::list entries, pybind11::list columns, pybind11::list sizes);

// The memory ranges of the tensors of lists of fields, sorted: int64 pairs of begin and end.
pybind11::bytes spans(pybind11::list lists);

// True if the first n tensors of `fields` (FP32, one element, on the host) are whole numbers from 0 to 2^62.
bool are_counts(pybind11::bytearray fields, Py_ssize_t n);

// True if a tensor of `fields` shares memory with one of the `sorted` spans, which don't overlap each other.
bool touches(pybind11::bytearray fields, pybind11::bytes sorted);

}  // namespace fusedamp
