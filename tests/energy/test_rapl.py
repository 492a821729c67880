"""RAPL's counters: which zones, microjoules, wrapping around, and what is refused."""

import os
import re
import time
from pathlib import Path

import pytest
from fusedamp import energy
from fusedamp.energy import rapl, windows

pytestmark = pytest.mark.host


def refused(message):
    with pytest.raises(energy.EnergyError, match=re.escape(message)):
        energy.window(devices=["cpu"])


def measured(clock, seconds=3.0):
    with energy.window(devices=["cpu"]) as w:
        clock.sleep(seconds)
    return w


def test_packages_count_once(clock, powercap, meter):
    """Each package is read once; its parts and the platform are included in nothing."""
    meter(powercap("intel-rapl:0", "package-0"), watts=50.0, tick=0.001)
    meter(powercap("intel-rapl:1", "package-1"), watts=70.0, tick=0.001)
    for folder, name in [
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
    ]:
        meter(powercap(folder, name), watts=1000.0, tick=0.001)
    (powercap.root / "intel-rapl").mkdir()  # the control type, which has no name
    w = measured(clock)
    assert list(w.by_device) == ["package-0", "package-1"]
    assert w.by_device["package-0"] == pytest.approx(150.0, rel=2e-3)
    assert w.joules == pytest.approx(360.0, rel=2e-3)
    assert w.watts == pytest.approx(120.0, rel=2e-3)
    assert (w.temperatures, w.others) == ({}, None)


def test_packages_of_several_dies(powercap):
    for i, name in enumerate(["package-0-die-0", "package-0-die-1", "package-10", "package-x"]):
        powercap(f"intel-rapl:{i}", name)
    names = [counter.name for counter in rapl.packages()]
    assert names == ["package-0-die-0", "package-0-die-1", "package-10"]


def test_a_package_that_only_mmio_shows(powercap):
    powercap("intel-rapl-mmio:0", "package-0")
    assert [counter.name for counter in rapl.packages()] == ["package-0"]


def test_it_wraps_around(clock, powercap, meter):
    """At 262,143.32885 J: the last read is less than the first."""
    meter(powercap("intel-rapl:0", "package-0"), joules=262_143.0, tick=0.001)
    assert measured(clock).joules == pytest.approx(300.0, rel=2e-3)


def test_a_window_longer_than_the_range(clock, powercap, meter):
    """A range of 2,000 J at 100 W: it wraps every 20 s. The window's thread reads it often enough."""
    meter(powercap("intel-rapl:0", "package-0", wraps_at=2_000_000_000), tick=0.001)
    with energy.window(devices=["cpu"]) as w:
        assert w._keeper._counters == w._counters
        for _ in range(200):
            clock.sleep(0.9)
            w._keeper.read()
    assert w.joules == pytest.approx(18_000.0, rel=1e-3)


def test_it_may_have_wrapped_twice(clock, powercap, meter):
    """262 kJ at 1,000 W last 262 s. The process was stopped longer."""
    meter(powercap("intel-rapl:0", "package-0"), tick=0.1)
    message = r"package-0 was not read for 263 s; expected 262 s at most, after which it may wrap around"
    with pytest.raises(energy.EnergyError, match=message):
        measured(clock, 263.0)


def test_it_was_reset(clock, powercap):
    """A reset from 50 J to 0 is not a wrap: 262 kJ in 3 s would be 87 kW."""
    zone = powercap("intel-rapl:0", "package-0")
    counter = rapl.PackageCounter("package-0", zone.path)
    clock.sleep(3.0)
    zone.show(0.0)
    with pytest.raises(energy.EnergyError, match="package-0 ran back from 50000000 to 0 uJ"):
        counter.joules()


def test_a_window_that_waits_for_its_block(clock, powercap, meter):
    """Only the time in the block counts for wrapping around."""
    meter(powercap("intel-rapl:0", "package-0"), tick=0.1)
    w = energy.window(devices=["cpu"])
    clock.sleep(3_600.0)
    with w:
        clock.sleep(2.0)
    assert w.watts == pytest.approx(100.0, rel=5e-3)


def test_the_thread_reads_and_ends(powercap):
    """In real time: half the range at 1,000 W is 5 ms."""
    zone = powercap("intel-rapl:0", "package-0", joules=1.0, wraps_at=10_000_000)
    counter = rapl.PackageCounter("package-0", zone.path)
    assert counter.read_every == 0.005
    keeper = windows._Keeper([counter])
    zone.show(2.0)
    deadline = time.monotonic() + 30
    while counter._total == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    keeper.stop()
    keeper._thread.join(30)
    assert not keeper._thread.is_alive()
    assert counter._total == 1_000_000


def test_the_thread_survives_an_error(powercap):
    """The last read of the window tells the user."""
    zone = powercap("intel-rapl:0", "package-0", wraps_at=10_000_000)
    keeper = windows._Keeper([rapl.PackageCounter("package-0", zone.path)])
    (zone.path / "energy_uj").unlink()
    time.sleep(0.05)
    assert keeper._thread.is_alive()
    keeper.stop()


def test_permission(powercap, monkeypatch):
    """As for a user other than root, whom the tests may run as."""
    zone = powercap("intel-rapl:0", "package-0")
    allowed = Path.read_text

    def read(path, *args, **kwargs):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    file = zone.path / "energy_uj"
    refused(f"{file} cannot be read by user 1000; expected permission")
    refused(f"chmod a+r {file}")


def test_no_package(powercap):
    refused(f"{powercap.root} has no CPU package; expected a CPU with RAPL counters")
    powercap("intel-rapl:0:0", "dram")
    refused("or set FUSEDAMP_POWERCAP to the folder")


def test_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDAMP_POWERCAP", str(tmp_path / "none"))
    refused("has no CPU package")


def test_the_kernels_folder_is_the_default(monkeypatch):
    asked = []
    monkeypatch.setenv("FUSEDAMP_POWERCAP", "")
    monkeypatch.setattr(Path, "glob", lambda path, _: asked.append(str(path)) or [])
    refused("/sys/class/powercap has no CPU package")
    assert asked == ["/sys/class/powercap"]


def test_an_unreadable_counter(powercap):
    zone = powercap("intel-rapl:0", "package-0")
    (zone.path / "energy_uj").unlink()
    refused("energy_uj cannot be read (No such file or directory); expected an energy counter of RAPL")


@pytest.mark.parametrize("text", ["", "-5", "1.5", "soon"])
def test_no_number(powercap, text):
    zone = powercap("intel-rapl:0", "package-0")
    (zone.path / "energy_uj").write_text(text)
    refused(f"energy_uj has '{text}'; expected microjoules, a whole number")


def test_a_range_of_zero(powercap):
    powercap("intel-rapl:0", "package-0", wraps_at=1)
    (powercap.root / "intel-rapl:0" / "max_energy_range_uj").write_text("0")
    refused("max_energy_range_uj has '0'; expected")
