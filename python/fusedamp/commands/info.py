"""``python -m fusedamp info``: versions, build and devices."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from .. import _C
from ..capabilities import capabilities, driver_cuda_version, old_driver
from ..ops.library import cpu_target
from ..tensors.addresses import how_read


def system_info() -> dict[str, object]:
    """Collect everything that ``python -m fusedamp info`` shows, as plain JSON values."""
    devices = [asdict(capability) for capability in capabilities()]
    for device in devices:
        device["recommended"] = str(device["recommended"]).removeprefix("torch.")
    build, driver = _C.build_info(), driver_cuda_version()
    return {
        "fusedamp": build["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": {
            "torch_built_for": torch.version.cuda,
            "driver_supports": driver,
            "problem": old_driver(driver, build["nvcc"]),
        },
        "build": build,
        "cpu_target": cpu_target(),
        "addresses": how_read(),
        "devices": devices,
    }


def describe(info: dict[str, Any]) -> str:
    """Format ``info`` as text."""
    cuda, build = info["cuda"], info["build"]
    lines = [
        f"fusedamp {info['fusedamp']}, torch {info['torch']}, Python {info['python']}, {info['system']}",
        f"CUDA     torch built for {cuda['torch_built_for'] or 'none'}; driver supports"
        f" {cuda['driver_supports'] or 'none (no NVIDIA driver found)'}",
        *([f"         {cuda['problem']}"] if cuda["problem"] else []),
        "build    " + ", ".join(f"{key} {_listed(value)}" for key, value in build.items()),
        f"CPU code {info['cpu_target']} (FUSEDAMP_CPU_TARGET overrides)",
        f"tensors  read by {info['addresses']}",
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
