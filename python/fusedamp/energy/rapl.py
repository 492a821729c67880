"""The energy counters of CPU packages: RAPL, as Linux shows it in /sys/class/powercap.

Source: Linux's documentation of the power capping framework. A counter has microjoules and wraps around,
at the earliest after a minute under full load.
"""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

from .counter import Counter, EnergyError

# Not a package's parts, nor the platform (psys), which includes packages.
PACKAGE = re.compile(r"package-\d+(-die-\d+)?")
MOST_WATTS = 1_000  # of a package. A counter is read so often that it cannot wrap twice between.
SLACK = 10  # joules by which ticks may be late


def packages() -> list[Counter]:
    """Return the counters of all CPU packages, each package once.

    Raises: EnergyError if there is no package, or one cannot be read.
    """
    root = Path(os.environ.get("FUSEDAMP_POWERCAP") or "/sys/class/powercap")
    zones: dict[str, Path] = {}
    # A package may be there twice, by MSR (intel-rapl:0, also of AMD) and by MMIO (intel-rapl-mmio:0).
    for file in sorted(root.glob("*/name"), key=lambda file: ("mmio" in file.parent.name, file)):
        name = _read(file)
        if PACKAGE.fullmatch(name):
            zones.setdefault(name, file.parent)
    if not zones:
        raise EnergyError(
            f"[energy] {root} has no CPU package; expected a CPU with RAPL counters (Intel, or AMD Zen) and "
            "the kernel's module intel_rapl_msr. Virtual machines and containers often hide them: measure "
            "on the host, or set FUSEDAMP_POWERCAP to the folder"
        )
    return [PackageCounter(name, zones[name]) for name in sorted(zones)]


class PackageCounter(Counter):
    """The counter of one package; ``zone`` is its folder."""

    def __init__(self, name: str, zone: Path) -> None:
        self.name, self._file = name, zone / "energy_uj"
        self._range = _microjoules(zone / "max_energy_range_uj", least=1)
        self.read_every = self._range / 1e6 / MOST_WATTS / 2
        self._lock = threading.Lock()
        self.start()  # whether it can be read

    def start(self) -> None:
        self._last, self._at, self._total = _microjoules(self._file), time.monotonic(), 0

    def joules(self) -> float:
        """Read the counter and add what came since the last read: joules since `start`."""
        with self._lock:
            value, now = _microjoules(self._file), time.monotonic()
            most = MOST_WATTS * (now - self._at) * 1e6
            if most > self._range:
                raise EnergyError(
                    f"[energy] the energy counter of {self.name} was not read for {now - self._at:.0f} s; "
                    f"expected {2 * self.read_every:.0f} s at most, after which it may wrap around twice. "
                    "The process was stopped: measure again"
                )
            more = value - self._last
            if more < 0:
                more += self._range
                if more > most + SLACK * 1e6:
                    raise EnergyError(
                        f"[energy] the energy counter of {self.name} ran back from {self._last} to {value} "
                        f"uJ; expected it to grow, or to wrap around at {self._range} uJ. It was reset: "
                        "measure again"
                    )
            self._last, self._at, self._total = value, now, self._total + more
            return self._total / 1e6


def _microjoules(file: Path, least: int = 0) -> int:
    text = _read(file)
    if not text.isdecimal() or int(text) < least:
        raise EnergyError(
            f"[energy] {file} has {text[:40]!r}; expected microjoules, a whole number >= {least}. Measure on "
            "another machine"
        )
    return int(text)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError:
        raise EnergyError(
            f"[energy] {file} cannot be read by user {os.geteuid()}; expected permission to read it, which "
            f"Linux gives root only. An administrator can allow it until the next boot: chmod a+r {file}"
        ) from None
    except OSError as error:
        raise EnergyError(
            f"[energy] {file} cannot be read ({error.strerror}); expected an energy counter of RAPL. Measure "
            "on another machine"
        ) from None
