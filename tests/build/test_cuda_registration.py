"""Every op has its CUDA kernel where torch has CUDA, GPU or not.

Guards: a CUDA object that was silently not built, that doesn't load under this torch, or that forgets an op.
"""

import os
import subprocess
import sys

import fusedamp
import pytest
import torch
from fusedamp.ops import library

needs_cuda_object = pytest.mark.skipif(
    not library.HAS_CUDA_OPS and os.environ.get("FUSEDAMP_CUDA") != "1",
    reason="built without CUDA kernels (no nvcc, or FUSEDAMP_CUDA=0)",
)
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason=f"torch {torch.__version__} has no CUDA half"),
    needs_cuda_object,
]


def ops_of_the_cpu() -> list[str]:
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    return sorted(name for name in names if name.startswith("fusedamp::"))


def test_every_op_is_registered_for_cuda() -> None:
    assert fusedamp.__file__
    assert len(ops_of_the_cpu()) >= 6
    missing = [
        op for op in ops_of_the_cpu() if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
    ]
    assert missing == []


def test_the_cuda_object_needs_no_gpu_and_no_cuda_library_to_load() -> None:
    """In a process that sees no GPU, where nothing of CUDA has been initialized."""
    code = "import fusedamp, torch; assert not torch.cuda.is_initialized(); print('loaded')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.stdout.strip() == "loaded", done.stderr
