"""Runs the tests of linear layers on an emulated cuBLASLt instead of the CPU's ops: `linear_suite.py
LIBRARY OPS REFUSED [pytest's arguments]`.

Prints what the library was asked for. REFUSED is "none", or "all" for a library that runs no product, so
that all are made of torch's.
"""

import ctypes
import sys

import fusedamp  # noqa: F401
import pytest
import torch

HEURISTIC, EVERY, NOT_SUPPORTED = 1, 0xFFFFFFFF, 15  # where, which epilogue, which status (cublaslt.cpp)

if __name__ == "__main__":
    library, ops, refused, *arguments = sys.argv[1:]
    emulated = ctypes.CDLL(library)
    if refused == "all":
        emulated.emulated_lt_refuse(HEURISTIC, ctypes.c_uint(EVERY), NOT_SUPPORTED)
    torch.ops.load_library(ops)
    code = pytest.main(arguments)
    print(torch.ops.fusedamp._product_uses())
    sys.exit(code)
