// What the ops need to know of many tensors, read in one call. Asking a tensor for its address, size and type from
// Python costs about 50 ns each; DLPack's C exchange interface tells all of them in one call of about 20 ns.
#pragma once
#include <pybind11/pybind11.h>

namespace fusedamp {

// Call once: torch.Tensor, torch.nn.Parameter, and the capsule torch.Tensor.__dlpack_c_exchange_api__.
// False where its version of DLPack is not one that we know.
bool bind_tensors(pybind11::type tensor, pybind11::type parameter, pybind11::capsule exchange);

// A bytearray of int64 [3, n], addresses, numels and dtype codes (csrc/engine/dtype.h), for n plain contiguous
// floating-point tensors with memory on one device, CPU or CUDA; with `stored` also of int8, uint8 and int16, which
// hold states and split masters. None where there are none, or one is anything else.
pybind11::object read_fields(pybind11::list tensors, bool stored);

// Whether read_fields(tensors) would give these fields again.
bool same_fields(pybind11::list tensors, pybind11::bytearray fields);

// What read_fields gives for the gradients of `params`; None where it gives none, one has none, or read_fields(params)
// would not give `fields` again. One walk, so that each parameter is looked at while it is in the cache.
pybind11::object read_grads(pybind11::list params, pybind11::bytearray fields);

// The .grad of each, and how many are None; or None where one is no plain tensor or parameter.
pybind11::object grads_of(pybind11::list params);

// Their version counters, as int64.
pybind11::bytes versions(pybind11::list tensors);

// Whether the items of all lists, one after the other, are the very objects in `items`.
bool same_items(pybind11::list lists, pybind11::list items);

// Whether the values of all dicts, one after the other, are the very objects in `values`.
bool same_values(pybind11::list dicts, pybind11::list values);

}  // namespace fusedamp
