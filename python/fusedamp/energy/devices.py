"""Which counters measure the devices that a user names."""

from __future__ import annotations

from typing import Any

import torch

from .counter import Counter, EnergyError
from .nvml import GpuCounter, in_use, uuids
from .rapl import packages

CPU = ("cpu", "")


def counters_of(where: str, devices: Any) -> list[Counter]:
    """Return the counters of ``devices``; ``where`` starts messages about them.

    Raises: TypeError, ValueError unless it is a list of devices of one kind; EnergyError without a counter.
    """
    if devices is None:
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        if not devices:
            raise EnergyError(
                f"{where} torch sees no GPU; expected one whose energy to measure. Pass devices=['cpu'] to "
                "measure the CPU"
            )
    if not isinstance(devices, (list, tuple)):
        raise TypeError(f"{where} devices is {devices!r}; expected a list, such as ['cuda:0'] or ['cpu']")
    if not devices:
        raise ValueError(f"{where} devices is empty; expected at least one, such as ['cuda:0'] or ['cpu']")
    named = [_named(f"{where} devices[{i}]", device) for i, device in enumerate(devices)]
    for i, (_, uuid) in enumerate(named):
        if uuid in [earlier for _, earlier in named[:i]]:
            raise ValueError(
                f"{where} devices[{i}] is {devices[i]!r}, which was given before; expected each device "
                "once. Its energy would count twice"
            )
    if named == [CPU]:
        return packages()
    if CPU in named:
        raise ValueError(
            f"{where} devices is {devices!r}; expected GPUs or ['cpu']: their counters include different "
            "things and are not added up. Use two windows, one inside the other"
        )
    return [GpuCounter(name, uuid) for name, uuid in named]


def _named(where: str, device: Any) -> tuple[str, str]:
    """Return name and UUID of a device. Only for GPUs by torch's names this initializes torch.cuda."""
    if isinstance(device, str) and device.startswith(("GPU-", "MIG-")):
        return device, device
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f"{where} is {device!r}; expected a torch.device, its name, or the UUID of a GPU")
    try:
        exact = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        exact = torch.device("meta")
    if exact.type not in ("cpu", "cuda"):
        raise ValueError(
            f"{where} is {device!r}; expected 'cpu', 'cuda:0' or the like, or a UUID ('GPU-...')"
        )
    if exact.type == "cpu":
        return CPU
    seen = uuids()
    index = torch.cuda.current_device() if exact.index is None and seen else exact.index or 0
    if index >= len(seen):
        raise ValueError(f"{where} is {device!r}; expected one of the {len(seen)} GPUs that torch sees")
    return f"cuda:{index}", seen[index]


def synchronize(where: str) -> None:
    """Wait for all GPUs that this process uses. Uses no others: that would take their memory."""
    used = in_use()
    if used and torch.cuda.is_current_stream_capturing():
        raise EnergyError(
            f"{where} a CUDA graph is being captured; expected none, as a window waits for the device. "
            "Measure replays of the graph instead"
        )
    for index in used:
        torch.cuda.synchronize(index)
