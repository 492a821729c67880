"""Windows: ends at ticks, what is refused, nested and in threads; whatever happens, never 0 joules."""

import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from fusedamp import energy
from fusedamp.energy import counter, windows

pytestmark = pytest.mark.host


class Scripted(counter.Counter):
    """Shows what a list says, then its last value."""

    def __init__(self, name, *joules):
        self.name, self.values = name, list(joules)

    def joules(self):
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


class Rising(counter.Counter):
    """Draws ``watts``, without ticks."""

    def __init__(self, clock, name="gpu", watts=100.0):
        self.clock, self.name, self.watts = clock, name, watts

    def joules(self):
        return self.watts * self.clock.now


def window_of(*counters, samples=None, min_seconds=2.0):
    return energy.Window(counters, samples, min_seconds)


def test_results_of_a_window(clock):
    with window_of(Rising(clock), samples=4) as w:
        clock.sleep(2.5)
    assert w.joules == pytest.approx(250.1, abs=0.11)
    assert w.joules_per_sample == w.joules / 4
    assert repr(w) == f"<energy.window: {w.joules:.6g} J in {w.seconds:.6g} s, 100 W (gpu)>"
    with pytest.raises(AttributeError):
        w.joules = 3.0


RESULTS = ("joules", "seconds", "watts", "joules_per_sample", "by_device", "temperatures", "others")


def unreadable(w, why):
    for name in RESULTS:
        with pytest.raises(
            energy.EnergyError, match=f"this window {why}; expected one whose block has ended"
        ):
            getattr(w, name)
    assert repr(w) == f"<energy.window that {why}>"


def test_results_come_after_the_block(clock):
    w = window_of(Rising(clock))
    unreadable(w, "was not entered yet")
    with w:
        clock.sleep(2.0)
        unreadable(w, "is still open")


def test_an_exception_passes_and_nothing_is_measured(clock):
    w = window_of(Rising(clock))
    with pytest.raises(KeyError, match="theirs"), w:
        raise KeyError("theirs")
    unreadable(w, "was not measured, as its block raised an error")
    assert w not in windows._open


def test_a_window_measures_once(clock):
    message = "this window was entered before; expected a window for each block"
    with window_of(Rising(clock)) as w:
        clock.sleep(2.0)
        with pytest.raises(energy.EnergyError, match=message):
            w.__enter__()
    joules = w.joules
    with pytest.raises(energy.EnergyError, match=message):
        w.__enter__()
    assert w.joules == joules


def test_windows_nest(clock):
    with window_of(Rising(clock)) as outer:
        clock.sleep(1.0)
        with window_of(Rising(clock)) as inner:
            clock.sleep(2.0)
        with pytest.raises(ValueError, match="x"), window_of(Rising(clock)):
            raise ValueError("x")
    assert inner.joules == pytest.approx(200.1, abs=0.11)
    assert outer.joules == pytest.approx(300.5, abs=0.11)


def test_a_block_that_is_too_short(clock):
    w = window_of(Rising(clock))
    message = re.escape(
        "the block took 1.99 s; expected at least 2 s, as the counter ticks about every 0.1 s"
    )
    with pytest.raises(energy.EnergyError, match=message), w:
        clock.sleep(1.99)
    unreadable(w, "was not measured, as its end raised an error")
    with window_of(Rising(clock), min_seconds=0.5) as w:
        clock.sleep(0.5)
    assert w.joules > 50


def test_a_counter_that_stands_still_at_the_start(clock):
    begin = clock.now
    w = window_of(Rising(clock), Scripted("idle", 5.0))
    message = re.escape("the energy counter of idle stood still for 0.3 s; expected a tick")
    with pytest.raises(energy.EnergyError, match=message):
        w.__enter__()
    assert clock.now - begin == pytest.approx(0.3, abs=0.002)
    unreadable(w, "was not entered yet")
    assert w not in windows._open


def test_a_counter_that_stands_still_at_the_end(clock):
    w = window_of(Scripted("gpu", 5.0, 6.0))
    with pytest.raises(energy.EnergyError, match="the energy counter of gpu stood still"), w:
        clock.sleep(2.0)
    unreadable(w, "was not measured, as its end raised an error")


def test_zero_joules_are_never_a_result(clock):
    """The least that a window can measure is one step of its counter."""
    with window_of(Scripted("gpu", 5.0, 6.0, 6.0, 6.001)) as w:
        clock.sleep(2.0)
    assert w.joules == pytest.approx(0.001)


@pytest.mark.parametrize("joules", [(5.0, 6.0, 2.0, 3.0), (5.0, 6.0, 7.0, 6.5), (5.0, 4.0)])
def test_a_counter_that_runs_back(clock, joules):
    """Between the ends, at the end, and at the start."""
    w = window_of(Scripted("gpu", *joules))
    message = r"the energy counter of gpu ran back from \d\.\d+ to \d\.\d+ J; expected it to grow"
    with pytest.raises(energy.EnergyError, match=message), w:
        clock.sleep(2.0)


def test_a_tick_may_come_late(clock, devices, meter):
    """One read after the deadline counts: the machine may be busy."""
    meter(devices[0], tick=0.58)
    clock.sleep(0.0)
    w = energy.window(devices=["GPU-aa"])
    with w:
        clock.sleep(2.9 - 0.2)
    assert w.seconds == pytest.approx(2.9, abs=0.002)


def test_samples(clock):
    with window_of(Rising(clock)) as w:
        clock.sleep(2.0)
    with pytest.raises(energy.EnergyError, match="samples is None; expected the number of samples"):
        w.joules_per_sample  # noqa: B018
    w.samples = 2**40
    assert w.joules_per_sample == w.joules / 2**40
    for bad in (0, -1, 1.5, float("nan")):
        with pytest.raises(
            ValueError, match=r"\[energy.window\] samples is .*; expected a whole number from 1"
        ):
            w.samples = bad
        with pytest.raises(ValueError, match="samples is"):
            window_of(samples=bad)
    with pytest.raises(TypeError, match="samples is 'all'; expected a number"):
        w.samples = "all"
    assert w.samples == 2**40


@pytest.mark.parametrize("bad", [-1.0, float("inf"), float("nan")])
def test_min_seconds(devices, bad):
    with pytest.raises(ValueError, match=r"\[energy.window\] min_seconds is .*; expected a finite number"):
        energy.window(devices=["GPU-aa"], min_seconds=bad)


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ("cpu", TypeError, "devices is 'cpu'; expected a list, such as ['cuda:0'] or ['cpu']"),
        ([], ValueError, "devices is empty; expected at least one"),
        ([None], TypeError, "devices[0] is None; expected a torch.device, its name, or the UUID"),
        ([True], TypeError, "devices[0] is True; expected a torch.device"),
        (["cuda:0", "mps"], ValueError, "devices[1] is 'mps'; expected 'cpu', 'cuda:0' or the like"),
        (["gpu"], ValueError, "devices[0] is 'gpu'; expected 'cpu', 'cuda:0' or the like"),
        ([-1], ValueError, "devices[0] is -1; expected 'cpu', 'cuda:0' or the like"),
        ([2], ValueError, "devices[0] is 2; expected one of the 2 GPUs that torch sees"),
        (["cuda:0", "GPU-aa"], ValueError, "devices[1] is 'GPU-aa', which was given before; expected each"),
        (["cpu", "cpu"], ValueError, "devices[1] is 'cpu', which was given before"),
        (["cuda:0", "cpu"], ValueError, "expected GPUs or ['cpu']: their counters include different"),
    ],
)
def test_devices_that_are_refused(devices, gpus, bad, kind, message):
    gpus("aa", "bb")
    for call, where in [(energy.window, "window"), (compared, "compare")]:
        with pytest.raises(kind, match=re.escape(message)) as raised:
            call(devices=bad)
        assert str(raised.value).startswith(f"[energy.{where}] ")


def compared(devices):
    return energy.compare({"a": int, "b": int}, samples=1, devices=devices)


def test_without_a_gpu(gpus):
    gpus()
    with pytest.raises(energy.EnergyError, match=r"torch sees no GPU; .* Pass devices=\['cpu'\]"):
        energy.window()
    with pytest.raises(ValueError, match=r"devices\[0\] is 'cuda'; expected one of the 0 GPUs"):
        energy.window(devices=["cuda"])


def test_both_ends_wait_for_the_gpus_in_use(clock, gpus):
    """A GPU without a CUDA context stays so."""
    waited = gpus("aa", "bb", "cc", used=[0, 2])
    with window_of(Rising(clock)):
        assert waited == [0, 2]
        clock.sleep(2.0)
    assert waited == [0, 2, 0, 2]


def test_the_wait_belongs_to_the_block(clock, gpus, monkeypatch):
    """Work that was queued in the block is measured."""
    gpus("aa", used=[0])
    with window_of(Rising(clock)) as w:
        monkeypatch.setattr(torch.cuda, "synchronize", lambda index: clock.sleep(2.5))
    assert w.joules == pytest.approx(250.1, abs=0.11)


def test_an_unused_torch_is_not_initialized(clock, gpus, monkeypatch):
    waited = gpus("aa", used=[0])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with window_of(Rising(clock)):
        clock.sleep(2.0)
    assert waited == []


def test_the_cpu_and_uuids_leave_torch_uninitialized(clock, devices, powercap, gpus, monkeypatch):
    """A process that has initialized torch.cuda cannot fork workers that use GPUs."""
    gpus("aa")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: 1 / 0)
    powercap("intel-rapl:0", "package-0")
    energy.window(devices=["cpu"])
    (counter,) = energy.window(devices=["GPU-aa"])._counters
    devices[0].run(7)
    assert counter.others() == 1


def test_a_graph_is_being_captured(clock, gpus, monkeypatch):
    waited = gpus("aa", used=[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(energy.EnergyError, match="a CUDA graph is being captured; expected none"):
        window_of(Rising(clock)).__enter__()
    assert waited == []


def in_thread(job):
    errors = []

    def run():
        try:
            job()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_windows_of_two_threads_warn(clock):
    def other(name):
        with window_of(Rising(clock, name)):
            clock.sleep(2.0)

    with window_of(Rising(clock)):
        clock.sleep(2.0)
        message = "another thread has a window on gpu: both include the energy of what the other thread does"
        with pytest.warns(UserWarning, match=message):
            in_thread(lambda: other("gpu"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            in_thread(lambda: other("another"))
            other("gpu")  # nested in one thread


def test_windows_of_two_threads_that_start_together_warn(clock):
    """The second enters while the first waits for its tick."""

    class Slow(Rising):
        def start(self):
            with pytest.warns(UserWarning, match="another thread has a window on gpu"):
                in_thread(lambda: window_of(Rising(clock)).__enter__())

    with window_of(Slow(clock)):
        clock.sleep(2.0)


def test_a_window_may_end_in_another_thread(clock):
    w = window_of(Rising(clock)).__enter__()
    clock.sleep(2.0)
    in_thread(lambda: w.__exit__(None, None, None))
    assert w.joules == pytest.approx(200.1, abs=0.11)


def test_a_warning_that_raises_leaves_nothing_open(clock, devices, meter):
    meter(devices[0])
    devices[0].run(7)
    w = energy.window(devices=["GPU-aa"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="other processes use"):
            w.__enter__()
    assert w not in windows._open
    unreadable(w, "was not entered yet")


def test_import_loads_no_counter():
    """`import fusedamp` offers energy without NVML and without what only comparisons need."""
    code = (
        "import fusedamp\n"
        "assert fusedamp.energy.window and fusedamp.energy.compare\n"
        "assert 'nvidia-ml' not in open('/proc/self/maps').read()\n"
        "assert not hasattr(fusedamp.energy.comparison, 'quantiles')"  # other code may load its module
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
