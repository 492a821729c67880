"""`fusedamp.capabilities` on known devices, faked if this machine has none."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from fusedamp import _C, capabilities
from fusedamp.capabilities import cpu_capability, gpu_capability, old_driver
from fusedamp.commands import info as commands_info

GPUS = [  # name, compute capability, has (fp16, bf16, tf32, fp8), recommended
    ("Tesla P100-PCIE-16GB", (6, 0), (False, False, False, False), torch.float32),
    ("Tesla V100-SXM2-16GB", (7, 0), (True, False, False, False), torch.float16),
    ("Tesla T4", (7, 5), (True, False, False, False), torch.float16),
    ("NVIDIA GeForce RTX 2080 Ti", (7, 5), (True, False, False, False), torch.float16),
    ("NVIDIA GeForce GTX 1660 Ti", (7, 5), (False, False, False, False), torch.float32),
    ("NVIDIA GeForce MX450", (7, 5), (False, False, False, False), torch.float32),
    ("NVIDIA T1000 8GB", (7, 5), (False, False, False, False), torch.float32),
    ("NVIDIA A100-SXM4-80GB", (8, 0), (True, True, True, False), torch.bfloat16),
    ("NVIDIA GeForce RTX 3090", (8, 6), (True, True, True, False), torch.bfloat16),
    ("Orin", (8, 7), (True, True, True, False), torch.bfloat16),
    ("NVIDIA RTX 6000 Ada Generation", (8, 9), (True, True, True, True), torch.bfloat16),
    ("NVIDIA H100 80GB HBM3", (9, 0), (True, True, True, True), torch.bfloat16),
    ("NVIDIA GeForce RTX 5090", (12, 0), (True, True, True, True), torch.bfloat16),
]


@pytest.mark.parametrize(("name", "version", "units", "choice"), GPUS, ids=[gpu[0] for gpu in GPUS])
def test_gpu_rules(name, version, units, choice):
    """The formats of each generation, and the Turing boards that report 7.5 without having tensor cores."""
    found = gpu_capability(1, name, version)
    assert (found.fp16, found.bf16, found.tf32, found.fp8) == units
    assert found.recommended is choice
    assert found.device == "cuda:1"
    assert found.features == (f"compute capability {version[0]}.{version[1]}",)
    assert found.why


def test_rocm_devices_are_not_judged_by_nvidia_rules(monkeypatch):
    """torch calls an AMD GPU cuda:0 and 9.4, which is not a compute capability."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    found = gpu_capability(0, "AMD Instinct MI300X", (9, 4))
    assert found.recommended is torch.float32
    assert not found.fp16
    assert not found.fp8
    assert "ROCm" in found.why


@pytest.mark.parametrize(
    ("flags", "units", "choice", "reason"),
    [
        ("fpu sse2", (False, False), torch.float32, "unknown"),
        ("avx2 f16c fma", (False, False), torch.float32, "no BF16"),
        ("avx2 avx512f avx512_bf16", (False, False), torch.bfloat16, "avx512_bf16"),
        ("avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16", (False, True), torch.bfloat16, "amx_bf16"),
        ("avx512_fp16 amx_bf16 amx_fp16", (True, True), torch.bfloat16, "amx_bf16"),
        ("fp asimd asimdhp bf16 sve", (False, False), torch.bfloat16, "(bf16)"),
    ],
)
def test_cpu_rules(flags, units, choice, reason):
    """Matrix units are AMX; BF16 is recommended if the CPU multiplies it in hardware."""
    found = cpu_capability(flags.split(), "some CPU")
    assert (found.fp16, found.bf16) == units
    assert found.recommended is choice
    assert reason in found.why


@pytest.mark.parametrize(("driver", "built"), [("12.8", "13.0"), ("13.0", "13.2"), ("9.2", "12.1")])
def test_an_old_driver_is_a_problem(driver, built, monkeypatch):
    """Both versions and the way out, in `capabilities` and in ``info``."""
    module = sys.modules["fusedamp.capabilities"]
    mine = _C.build_info()
    monkeypatch.setattr(module, "driver_cuda_version", lambda: driver)
    monkeypatch.setattr(commands_info, "driver_cuda_version", lambda: driver)
    monkeypatch.setattr(_C, "build_info", lambda: mine | {"nvcc": built})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    problem = (
        f"the driver supports CUDA {driver}, and fusedamp was built with CUDA {built}: update the driver, or "
        f"build fusedamp with CUDA {driver} or earlier"
    )
    assert [device.problem for device in capabilities()] == ["", problem]
    assert problem in commands_info.describe(commands_info.system_info())


@pytest.mark.parametrize(
    ("driver", "built"), [("13.0", "13.0"), ("13.2", "13.0"), ("12.10", "12.9"), (None, "13.0"), ("9.2", "")]
)
def test_other_drivers_are_not(driver, built):
    """Newer ones run what older toolkits built. Without a driver or CUDA kernels, nothing is compared."""
    assert old_driver(driver, built) == ""


def test_the_machine_at_hand():
    """One entry for the CPU, then one per GPU."""
    found = capabilities()
    assert [c.device for c in found] == ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    assert all(c.name and c.why for c in found)
