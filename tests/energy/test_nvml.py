"""NVML's counters: units, which device, what is refused, and who else uses the device."""

import ctypes
import os
import re
import warnings

import pytest
import torch
from fusedamp import energy
from fusedamp.energy import nvml

pytestmark = pytest.mark.host

ME = os.getpid()


def refused(message, **options):
    with pytest.raises(energy.EnergyError, match=re.escape(message)):
        energy.window(**options)


def measured(clock, at_end=lambda: None):
    with energy.window(devices=["GPU-aa"]) as w:
        clock.sleep(3.0)
        at_end()
    return w


def test_millijoules_become_joules(clock, devices, meter):
    meter(devices[0], watts=200.0)
    with energy.window(samples=8, devices=["GPU-aa"]) as w:
        clock.sleep(3.0)
    # Both ends are ticks: 30 of them lie in the block, and the end waits for one more.
    assert w.joules == pytest.approx(200.0 * 3.1, abs=0.5)
    assert w.seconds == pytest.approx(3.1, abs=0.005)
    assert w.watts == pytest.approx(200.0, rel=2e-3)
    assert w.joules_per_sample == w.joules / 8
    assert w.by_device == {"GPU-aa": w.joules}
    assert w.temperatures == {"GPU-aa": 60.0}


def test_idle_time_before_the_first_tick_does_not_count(clock, devices, meter):
    """The device idles until the block begins; its energy until then is not the block's."""
    shown = meter(devices[0], watts=0.5)
    with energy.window(devices=["GPU-aa"]) as w:
        shown.watts = 400.0
        clock.sleep(2.0)
        shown.watts = 0.5
    assert w.joules == pytest.approx(800.0, rel=1e-3)


def test_devices_add_up(clock, devices, meter):
    meter(devices[0], watts=100.0)
    meter(devices[1], watts=300.0, tick=0.02)
    with energy.window(devices=["GPU-aa", "GPU-bb"]) as w:
        clock.sleep(2.0)
    assert list(w.by_device) == ["GPU-aa", "GPU-bb"]
    assert w.joules == sum(w.by_device.values())
    assert w.watts == pytest.approx(400.0, rel=5e-3)
    assert w.by_device["GPU-bb"] == pytest.approx(3 * w.by_device["GPU-aa"], rel=0.06)


@pytest.mark.parametrize(
    ("asked", "name", "joules"),
    [
        (None, "cuda:0", 2),
        (["cuda"], "cuda:0", 2),
        ([0], "cuda:0", 2),
        ([torch.device("cuda", 0)], "cuda:0", 2),
        (("cuda:0",), "cuda:0", 2),
        (["GPU-bb"], "GPU-bb", 2),
        (["GPU-aa"], "GPU-aa", 1),
    ],
)
def test_torchs_devices_are_found_by_uuid(clock, devices, gpus, meter, asked, name, joules):
    """CUDA_VISIBLE_DEVICES=1: torch's GPU 0 is NVML's second."""
    gpus("bb")
    meter(devices[0], watts=100.0)
    meter(devices[1], watts=200.0)
    with energy.window(devices=asked) as w:
        clock.sleep(2.0)
    assert list(w.by_device) == [name]
    assert w.watts == pytest.approx(100.0 * joules, rel=1e-2)


def test_torchs_order_is_not_nvmls(clock, devices, gpus, meter):
    """CUDA_VISIBLE_DEVICES=1,0."""
    gpus("bb", "aa")
    meter(devices[0], watts=100.0)
    meter(devices[1], watts=200.0)
    with energy.window() as w:
        clock.sleep(2.0)
    assert list(w.by_device) == ["cuda:0", "cuda:1"]
    assert w.by_device["cuda:0"] == pytest.approx(2 * w.by_device["cuda:1"], rel=1e-3)


def test_cuda_is_the_current_device(devices, gpus):
    gpus("aa", "bb", current=1)
    assert energy.window(devices=["cuda"])._counters[0].name == "cuda:1"
    assert [counter.name for counter in energy.window()._counters] == ["cuda:0", "cuda:1"]


def test_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSEDAMP_NVML", str(tmp_path / "none.so"))
    refused("NVML cannot be loaded", devices=["GPU-aa"])
    refused("or set FUSEDAMP_NVML to the library's path", devices=["GPU-aa"])


def test_the_drivers_library_is_the_default(monkeypatch):
    asked = []
    monkeypatch.setenv("FUSEDAMP_NVML", "")
    monkeypatch.setattr(nvml, "_library", lambda path: asked.append(path) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        energy.window(devices=["GPU-aa"])
    assert asked == ["libnvidia-ml.so.1"]


def test_the_driver_does_not_run(devices):
    library = ctypes.CDLL(os.environ["FUSEDAMP_NVML"])
    ctypes.c_int.in_dll(library, "init_code").value = 9
    refused("nvmlInit_v2 failed: Driver Not Loaded (9)", devices=["GPU-aa"])


def test_an_old_driver(compiled, devices, monkeypatch, clock, meter):
    path = compiled("-DOLD_DRIVER")
    library = ctypes.CDLL(str(path))
    (type(devices)).in_dll(library, "devices")[0].uuid = b"GPU-aa"
    monkeypatch.setenv("FUSEDAMP_NVML", str(path))
    w = energy.window(devices=["GPU-aa"])
    message = "has no function nvmlDeviceGetComputeRunningProcesses_v3; expected NVML of driver 525 or later"
    with pytest.raises(energy.EnergyError, match=message):
        w.__enter__()


def test_no_counter(devices):
    """vGPUs and GPUs before Volta."""
    devices[0].energy_code = 3
    refused("GPU-aa has no energy counter (Not Supported (3)); expected a GPU of Volta", devices=["GPU-aa"])


def test_a_gpu_in_mig_mode(devices):
    devices[0].mig_mode = 1
    refused("GPU-aa is a MIG instance, or a GPU in MIG mode; expected a whole GPU", devices=["GPU-aa"])
    devices[0].mig_code = 3  # a GPU that has no such mode
    energy.window(devices=["GPU-aa"])


def test_a_mig_instance(devices, gpus):
    devices[1].uuid = b"MIG-cc"
    refused("MIG-cc is a MIG instance", devices=["MIG-cc"])
    refused("MIG-dd is a MIG instance", devices=["MIG-dd"])
    gpus("cc")  # torch knows the instance by its UUID
    refused("cuda:0 is a MIG instance")


def test_an_unknown_uuid(devices):
    refused("NVML does not find GPU-zz, GPU-zz: Not Found (6); expected a GPU of this", devices=["GPU-zz"])


def test_a_counter_that_fails_later(clock, devices, meter):
    meter(devices[0])
    message = r"the energy counter of GPU-aa cannot be read: GPU is lost \(15\)"
    with pytest.raises(energy.EnergyError, match=message):
        measured(clock, lambda: setattr(devices[0], "energy_code", 15))


def test_a_device_without_a_sensor(clock, devices, meter):
    meter(devices[0])
    devices[0].celsius_code = 3
    assert measured(clock).temperatures == {}


@pytest.mark.parametrize(
    ("pids", "used", "others"),
    [
        ([ME], True, 0),
        ([ME, 7], True, 1),
        ([7, ME, 8], True, 2),
        ([], False, 0),
        ([7], False, 1),
        ([7], True, 0),  # a container: this process has another id in the host's list
        ([7, 8], True, 1),
        ([], True, None),  # a container from which processes are hidden
    ],
)
def test_who_else_uses_the_gpu(devices, gpus, pids, used, others):
    gpus("aa", used=[0] if used else [])
    devices[0].run(*pids)
    assert energy.window()._counters[0].others() == others


def test_many_processes(devices):
    devices[0].run(*range(1, 201))
    assert energy.window(devices=["GPU-aa"])._counters[0].others() == 200


def test_a_driver_that_lists_no_processes(clock, devices, meter):
    meter(devices[0])
    devices[0].processes_code = 3
    with warnings.catch_warnings(), energy.window(devices=["GPU-aa"]) as w:
        warnings.simplefilter("error")
        clock.sleep(3.0)
    assert w.others is None


def test_company_warns(clock, devices, meter):
    meter(devices[0])
    devices[0].run(7, 8)
    message = "other processes use GPU-aa, up to 2 on a GPU: their energy is included"
    with pytest.warns(UserWarning, match=message) as seen, energy.window(devices=["GPU-aa"]) as w:
        clock.sleep(3.0)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert w.others == 2


def test_company_that_comes_later_warns(clock, devices, meter):
    meter(devices[0])
    with pytest.warns(UserWarning, match="up to 1 on a GPU"):
        w = measured(clock, lambda: devices[0].run(7))
    assert w.others == 1


def test_company_that_leaves_counts(clock, devices, meter):
    meter(devices[0])
    devices[0].run(7)
    with pytest.warns(UserWarning, match="up to 1 on a GPU"):
        w = measured(clock, lambda: devices[0].run())
    assert w.others == 1
