"""Which number formats this machine multiplies fast, what to choose, and why."""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Turing boards without tensor cores, although they report compute capability 7.5 like those that have them.
_NO_TENSOR_CORES = re.compile(r"GTX 16\d0|\bMX[45]50\b|\bT(4|5|6|10|12)00\b|\bT550\b")
_CPU_FLAGS = (
    "f16c", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_tf32", "amx_fp8",
    "asimdhp", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True)
class Capability:
    """One device.

    ``fp16``, ``bf16``, ``tf32``, ``fp8``: whether it has matrix units for the format, that is tensor cores on
    a GPU and AMX tiles on a CPU. ``features``: compute capability, or the CPU's vector and matrix extensions.
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


def capabilities() -> list[Capability]:
    """The CPU and every GPU that torch sees here, GPUs last.

    GPUs are judged by compute capability, as in NVIDIA's CUDA C++ Programming Guide and PTX ISA: FP16 tensor
    cores from 7.0 (Volta), BF16 and TF32 from 8.0 (Ampere), FP8 from 8.9 (Ada); CPUs by Linux's flags.
    """
    found = [cpu_capability(_cpu_flags(), _cpu_name())]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(gpu_capability(index, properties.name, (properties.major, properties.minor)))
    return found


def gpu_capability(index: int, name: str, compute_capability: tuple[int, int]) -> Capability:
    """The rules for one GPU; see `capabilities`."""
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
            "FP16 has tensor cores, BF16 has none; use GradScaler, for FP16's range is short",
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
    """The rules for a CPU with these Linux flags (x86: avx512_bf16, amx_bf16; Arm: bf16, asimdhp)."""
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


def system_info() -> dict[str, object]:
    """Everything that ``python -m fusedamp info`` shows, as plain JSON values."""
    import fusedamp
    import fusedamp._C as _C
    from fusedamp._library import cpu_target

    devices = [asdict(capability) for capability in capabilities()]
    for device in devices:
        device["recommended"] = str(device["recommended"]).removeprefix("torch.")
    return {
        "fusedamp": fusedamp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": {"torch_built_for": torch.version.cuda, "driver_supports": _driver_cuda_version()},
        "build": _C.build_info(),
        "cpu_target": cpu_target(),
        "devices": devices,
    }


def describe(info: dict) -> str:
    """``info`` as text."""
    cuda, build = info["cuda"], info["build"]
    lines = [
        f"fusedamp {info['fusedamp']}, torch {info['torch']}, Python {info['python']}, {info['system']}",
        f"CUDA     torch built for {cuda['torch_built_for'] or 'none'}; driver supports"
        f" {cuda['driver_supports'] or 'none (no NVIDIA driver found)'}",
        "build    " + ", ".join(f"{key} {_listed(value)}" for key, value in build.items()),
        f"CPU code {info['cpu_target']} (FUSEDAMP_CPU_TARGET overrides)",
    ]
    for device in info["devices"]:
        units = "AMX tiles" if device["device"] == "cpu" else "tensor cores"
        flags = ", ".join(
            f"{f.upper()} {'yes' if device[f] else 'no'}" for f in ("fp16", "bf16", "tf32", "fp8")
        )
        lines += [
            "",
            f"{device['device']:8} {device['name']} ({', '.join(device['features']) or 'features unknown'})",
            f"         {units}: {flags}",
            f"         choose {device['recommended']}: {device['why']}",
        ]
    return "\n".join(lines)


def _listed(value: object) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value)) or "none"


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_flags() -> frozenset[str]:
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _driver_cuda_version() -> str | None:
    """The newest CUDA that the installed driver supports, as libcuda says."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
