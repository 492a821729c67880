"""The energy counters of NVIDIA GPUs: NVML, which comes with the driver, called by ctypes.

Source: NVML's API reference, device queries. The counter has millijoules since the driver was loaded.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

from .counter import Counter, EnergyError

NOT_SUPPORTED, NOT_FOUND, INSUFFICIENT_SIZE = 3, 6, 7
CORE = 0  # the sensor of nvmlDeviceGetTemperature


class Process(ctypes.Structure):
    """nvmlProcessInfo_t of nvmlDeviceGetComputeRunningProcesses_v3."""

    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used_memory", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class Library:
    """NVML, loaded and initialized. It stays so until the process ends."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise EnergyError(
                f"[energy] NVML cannot be loaded ({error}); expected {path}, which comes with NVIDIA's "
                "driver. Install the driver, or set FUSEDAMP_NVML to the library's path"
            ) from None
        self.need("nvmlInit_v2")

    def ask(self, name: str, *arguments: object) -> int:
        """Call a function of NVML; returns its code, 0 for success."""
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise EnergyError(
                f"[energy] {self.path} has no function {name}; expected NVML of driver 525 or later. Update "
                "NVIDIA's driver"
            ) from None
        return int(function(*arguments))

    def need(self, name: str, *arguments: object) -> None:
        """Call a function of NVML; raises `EnergyError` unless it succeeds."""
        code = self.ask(name, *arguments)
        if code:
            raise EnergyError(
                f"[energy] {name} failed: {self.text(code)}; expected an answer of the driver. See whether "
                "nvidia-smi works"
            )

    def text(self, code: int) -> str:
        """Return NVML's text of an error code."""
        describe = self._library.nvmlErrorString
        describe.restype = ctypes.c_char_p
        return f"{(describe(code) or b'').decode(errors='replace')} ({code})"


@cache
def _library(path: str) -> Library:
    return Library(path)


class GpuCounter(Counter):
    """The counter of a whole GPU.

    Args:
        name: of the device, in results and messages.
        uuid: as NVML writes it, "GPU-...".
    """

    def __init__(self, name: str, uuid: str) -> None:
        self.name, self.uuid = name, uuid
        self._nvml = _library(os.environ.get("FUSEDAMP_NVML") or "libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        code = self._find(uuid)
        if uuid.startswith("MIG-") or self._in_mig_mode(code):
            raise EnergyError(
                f"[energy] {name} is a MIG instance, or a GPU in MIG mode; expected a whole GPU, as the "
                "energy counter is that of all instances together. Measure on a GPU without MIG"
            )
        if code:
            raise EnergyError(
                f"[energy] NVML does not find {name}, {uuid}: {self._nvml.text(code)}; expected a GPU of "
                "this machine. `nvidia-smi -L` lists their UUIDs"
            )
        self.joules()  # whether it has a counter

    def joules(self) -> float:
        energy = ctypes.c_ulonglong()
        what = "nvmlDeviceGetTotalEnergyConsumption"
        code = self._nvml.ask(what, self._handle, ctypes.byref(energy))
        if code == NOT_SUPPORTED:
            raise EnergyError(
                f"[energy] {self.name} has no energy counter ({self._nvml.text(code)}); expected a GPU of "
                "Volta or a later architecture that is not a vGPU. Measure on such a GPU"
            )
        if code:
            raise EnergyError(
                f"[energy] the energy counter of {self.name} cannot be read: {self._nvml.text(code)}; "
                "expected millijoules. See whether nvidia-smi works"
            )
        return energy.value / 1000

    def temperature(self) -> float | None:
        celsius = ctypes.c_uint()
        if self._nvml.ask("nvmlDeviceGetTemperature", self._handle, CORE, ctypes.byref(celsius)):
            return None
        return float(celsius.value)

    def others(self) -> int | None:
        """Count the other processes that use the GPU; None if the driver lists none, or not this one.

        In a container the driver may list process ids of the host, or none. A process that uses the GPU is
        one of those listed, whatever its id there.
        """
        pids = self._pids()
        if pids is None:
            return None
        used = in_use()
        mine = bool(used) and self.uuid in [uuids()[i] for i in used]
        if os.getpid() in pids or (pids and mine):
            return len(pids) - 1
        return None if mine else len(pids)

    def _pids(self) -> set[int] | None:
        room = 64
        while True:
            count, processes = ctypes.c_uint(room), (Process * room)()
            what = "nvmlDeviceGetComputeRunningProcesses_v3"
            code = self._nvml.ask(what, self._handle, ctypes.byref(count), processes)
            if code != INSUFFICIENT_SIZE:
                break
            room = 2 * max(room, count.value)
        return None if code else {process.pid for process in processes[: count.value]}

    def _find(self, uuid: str) -> int:
        return self._nvml.ask("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(self._handle))

    def _in_mig_mode(self, code: int) -> bool:
        """True if the GPU is in MIG mode, or if NVML knows torch's UUID as that of a MIG instance."""
        if code:
            return code == NOT_FOUND and self._find(self.uuid.replace("GPU-", "MIG-", 1)) == 0
        now, later = ctypes.c_uint(), ctypes.c_uint()
        code = self._nvml.ask("nvmlDeviceGetMigMode", self._handle, ctypes.byref(now), ctypes.byref(later))
        return code == 0 and now.value == 1


def uuids() -> list[str]:
    """Return the UUIDs of the GPUs that torch sees, in its order; initializes torch.cuda if there are any."""
    return [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]


def in_use() -> list[int]:
    """Return torch's indices of the GPUs that this process uses already; asking creates no CUDA context."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return [i for i in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(i)]  # type: ignore[attr-defined]
