"""Describes this machine. Needs torch, but not fusedamp."""

from __future__ import annotations

import platform
import subprocess

from ..place import Place, Skip


def driver() -> str:
    """Return the driver's version, clocks and temperature from nvidia-smi; read-only."""
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().split("\n")[0]
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def run(place: Place) -> None:
    import torch

    place.note("torch", torch.__version__)
    place.note("cuda", torch.version.cuda)
    place.note("python", platform.python_version())
    if place.rehearse:
        place.note("gpu", "rehearsal")
        return
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda or '- none -'}"
        raise Skip(f"no GPU is present: {built}, sees none")
    about = torch.cuda.get_device_properties(0)
    place.note("gpu", about.name)
    place.note("arch", f"{about.major}.{about.minor}")
    place.note("multiprocessors", about.multi_processor_count)
    place.note("memory_gb", round(about.total_memory / 1e9, 1))
    place.note("l2_mb", round(about.L2_cache_size / 1e6, 1))
    place.note("driver", driver())
    torch.ones(1, device="cuda").add_(1).item()  # check that it works
