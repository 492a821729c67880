"""Reports which number formats this machine multiplies fast, and recommends one."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import _C

# Turing boards without tensor cores, although they report compute capability 7.5 like those that have them.
_NO_TENSOR_CORES = re.compile(r"GTX 16\d0|\bMX[45]50\b|\bT(4|5|6|10|12)00\b|\bT550\b")
_CPU_FLAGS = (
    "f16c", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_tf32", "amx_fp8",
    "asimdhp", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True)
class Capability:
    """One device.

    ``fp16``, ``bf16``, ``tf32``, ``fp8``: whether it has matrix units for the format (tensor cores on a GPU,
    AMX tiles on a CPU). ``features``: compute capability, or the CPU's vector and matrix extensions.
    ``problem``: why ops may fail there, such as an old driver; empty if nothing is known.
    """

    device: str
    name: str
    features: tuple[str, ...]
    fp16: bool
    bf16: bool
    tf32: bool
    fp8: bool
    recommended: torch.dtype
    why: str
    problem: str = ""


def capabilities() -> list[Capability]:
    """List the CPU and every GPU that torch sees, GPUs last.

    GPU formats follow from the compute capability, as in NVIDIA's CUDA C++ Programming Guide and PTX ISA:
    FP16 tensor cores from 7.0 (Volta), BF16 and TF32 from 8.0 (Ampere), FP8 from 8.9 (Ada). CPU formats
    follow from Linux's CPU flags. A driver older than the CUDA runtime that fusedamp was built with is a
    ``problem``, with both versions.
    """
    found = [cpu_capability(_cpu_flags(), _cpu_name())]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpu = gpu_capability(index, properties.name, (properties.major, properties.minor))
        found.append(replace(gpu, problem=old_driver(driver_cuda_version(), _C.build_info()["nvcc"])))
    return found


def driver_cuda_version() -> str | None:
    """Return the newest CUDA version that the installed driver supports, according to libcuda."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def old_driver(driver: str | None, built_with: str) -> str:
    """Compare CUDA versions such as "12.8"; return "" if the driver is not older, or if one is unknown."""
    if not driver or not built_with or _numbers(driver) >= _numbers(built_with):
        return ""
    return (
        f"the driver supports CUDA {driver}, and fusedamp was built with CUDA {built_with}: update the "
        f"driver, or build fusedamp with CUDA {driver} or earlier"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def gpu_capability(index: int, name: str, compute_capability: tuple[int, int]) -> Capability:
    """Describe one GPU; see `capabilities`."""
    if torch.version.hip is not None:
        why = "a ROCm device; fusedamp has kernels for CUDA and CPUs only"
        return Capability(f"cuda:{index}", name, ("ROCm",), False, False, False, False, torch.float32, why)
    tensor_cores = compute_capability >= (7, 0) and not _NO_TENSOR_CORES.search(name)
    newer = compute_capability >= (8, 0)
    if newer:
        choice, why = (
            torch.bfloat16,
            (
                "BF16 has tensor cores and FP32's range, so no loss scaling; FP16 with GradScaler is as fast"
                " and keeps three more bits of precision"
            ),
        )
    elif tensor_cores:
        choice, why = (
            torch.float16,
            "FP16 has tensor cores, BF16 has none; use GradScaler, because FP16's range is short",
        )
    else:
        choice, why = torch.float32, "no tensor cores: 16-bit formats save memory here, but little time"
    return Capability(
        device=f"cuda:{index}",
        name=name,
        features=("compute capability {}.{}".format(*compute_capability),),
        fp16=tensor_cores,
        bf16=newer,
        tf32=newer,
        fp8=compute_capability >= (8, 9),
        recommended=choice,
        why=why,
    )


def cpu_capability(flags: Iterable[str], name: str) -> Capability:
    """Describe a CPU with these Linux flags (x86: avx512_bf16, amx_bf16; Arm: bf16, asimdhp)."""
    have = tuple(flag for flag in _CPU_FLAGS if flag in set(flags))
    bf16_by = next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in have), None)
    if bf16_by:
        choice, why = torch.bfloat16, f"BF16 products in hardware ({bf16_by}); no loss scaling needed"
    elif have:
        choice, why = torch.float32, "no BF16 instructions: 16-bit formats save memory here, not time"
    else:
        choice, why = torch.float32, "instruction sets unknown (no /proc/cpuinfo here); FP32 is safe"
    return Capability(
        device="cpu",
        name=name,
        features=have,
        fp16="amx_fp16" in have,
        bf16="amx_bf16" in have,
        tf32="amx_tf32" in have,
        fp8="amx_fp8" in have,
        recommended=choice,
        why=why,
    )


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_flags() -> frozenset[str]:
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()
