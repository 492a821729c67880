"""Runs a program, such as an example, without cleaning up at its end. There gloo's thread may still hold a
tensor of Python: it aborts at the end of the interpreter, and waits forever where its group is destroyed.

run_example.py PROGRAM [ARGUMENTS]
"""

import os
import runpy
import sys

import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.destroy_process_group = lambda group=None: None
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    os._exit(0)
