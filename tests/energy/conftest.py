"""Stand-ins for energy counters: NVML in C++, a folder of RAPL, and a clock that only sleep moves."""

import ctypes
import os
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch
from fusedamp.energy import comparison, counter, nvml, rapl, windows

HERE = Path(__file__).resolve().parent


class Clock:
    """Stands in for the module `time`. Meters count what passes."""

    def __init__(self):
        self.now, self.meters = 1000.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        for meter in self.meters:
            meter.advance(self.now)


class Meter:
    """Shows the energy at the last tick; `show` writes it into a counter."""

    def __init__(self, clock, show, watts=100.0, tick=0.1, joules=50.0):
        self.show, self.watts, self.tick, self.joules = show, watts, tick, joules
        self._at, self._next = clock.now, clock.now + tick / 2
        clock.meters.append(self)
        show(joules)

    def advance(self, now):
        ticks = int((now - self._next) // self.tick) + 1
        if ticks > 0:
            last = self._next + (ticks - 1) * self.tick
            self.show(self.joules + self.watts * (last - self._at))
            self._next = last + self.tick
        self.joules += self.watts * (now - self._at)
        self._at = now


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    for module in (comparison, counter, rapl, windows):
        monkeypatch.setattr(module, "time", fake)
    return fake


class Device(ctypes.Structure):
    _fields_ = [
        ("uuid", ctypes.c_char * 64),
        ("millijoules", ctypes.c_ulonglong),
        ("energy_code", ctypes.c_int),
        ("celsius", ctypes.c_uint),
        ("celsius_code", ctypes.c_int),
        ("mig_mode", ctypes.c_uint),
        ("mig_code", ctypes.c_int),
        ("processes", ctypes.c_uint),
        ("pids", ctypes.c_uint * 256),
        ("processes_code", ctypes.c_int),
    ]

    def show(self, joules):
        self.millijoules = int(joules * 1000)

    def run(self, *pids):
        self.processes = len(pids)
        self.pids[: len(pids)] = pids


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Return a function: the fake NVML, compiled with these flags."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip("needs a C++ compiler")
    folder, made = tmp_path_factory.mktemp("nvml"), {}

    def build(*flags):
        if flags not in made:
            made[flags] = folder / f"libnvidia-ml-{len(made)}.so"
            command = [compiler, "-shared", "-fPIC", *flags, str(HERE / "fake_nvml.cpp"), "-o", made[flags]]
            subprocess.run(command, check=True)
        return made[flags]

    return build


@pytest.fixture
def devices(compiled, monkeypatch):
    """The devices of the fake NVML, two of which exist: GPU-aa and GPU-bb."""
    path = compiled()
    library = ctypes.CDLL(str(path))
    monkeypatch.setenv("FUSEDAMP_NVML", str(path))
    nvml._library.cache_clear()
    ctypes.c_int.in_dll(library, "init_code").value = 0
    found = (Device * 4).in_dll(library, "devices")
    ctypes.memset(found, 0, ctypes.sizeof(found))
    for device, uuid in zip(found, (b"GPU-aa", b"GPU-bb"), strict=False):
        device.uuid, device.celsius = uuid, 60
    yield found
    nvml._library.cache_clear()


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that lets torch see GPUs of these UUIDs; `used`: those with a CUDA context."""

    def see(*uuids, used=(), current=0):
        synchronized = []
        properties = [types.SimpleNamespace(uuid=uuid) for uuid in uuids]
        for name, value in {
            "device_count": lambda: len(uuids),
            "get_device_properties": properties.__getitem__,
            "current_device": lambda: current,
            "is_initialized": lambda: True,
            "is_current_stream_capturing": lambda: False,
            "synchronize": synchronized.append,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda i: i in used, raising=False)
        return synchronized

    return see


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Return a function that adds a zone; the folder is its attribute `root`."""
    monkeypatch.setenv("FUSEDAMP_POWERCAP", str(tmp_path))

    def zone(folder, name, joules=50.0, wraps_at=262_143_328_850):
        path = tmp_path / folder
        path.mkdir()
        (path / "name").write_text(f"{name}\n")
        (path / "max_energy_range_uj").write_text(f"{wraps_at}\n")

        def show(joules):
            (path / "energy_uj").write_text(f"{int(joules * 1e6) % wraps_at}\n")

        show(joules)
        return types.SimpleNamespace(path=path, show=show)

    zone.root = tmp_path
    return zone


@pytest.fixture
def meter(clock):
    """Return a function that makes a `Meter` of a counter."""
    return lambda shown, **options: Meter(clock, shown.show, **options)
