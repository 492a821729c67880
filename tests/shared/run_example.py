"""Runs a program, such as an example, and ends without cleaning up: gloo sometimes aborts at the end of the
interpreter, where its thread may still hold a tensor.

run_example.py PROGRAM [ARGUMENTS]
"""

import os
import runpy
import sys

import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    os._exit(0)
