"""``make evidence`` rehearsed: each part runs, notices what is wrong, and all that happens is reported."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from fusedamp import optim

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are not part of the package
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "evidence").is_dir(), reason="not a source checkout"
)

from benchmarks.evidence import part, parts, process, report, run  # noqa: E402
from benchmarks.evidence.borrowed import cases  # noqa: E402
from benchmarks.evidence.parts import (  # noqa: E402
    PARTS,
    bandwidth,
    bitwise,
    counters,
    energy,
    fusions,
    graphs,
    large,
    linear,
    suite,
)
from benchmarks.evidence.place import Place, Skip  # noqa: E402

NOTHING = {"checks": 0, "failures": [], "findings": {}, "seconds": 1.0, "tail": "", "reason": ""}


def rehearsed(name: str) -> dict:
    torch.manual_seed(0)
    return part.perform(name, Place("cpu", rehearse=True, seconds=60))


PARTS_IN_PYTHON = ["bitwise", "graphs", "sync", "large", "bandwidth", "launches", "training", "reduced"]
PARTS_IN_PYTHON += ["linear", "fusions", "offload", "energy", "watch"]


@pytest.mark.parametrize("name", PARTS_IN_PYTHON)
def test_a_rehearsal_runs_the_part(name):
    result = rehearsed(name)
    assert (result["outcome"], result["failures"], result["reason"]) == ("passed", [], "")
    assert result["checks"] > 0
    assert report.markdown({"rehearsal": True}, {name: NOTHING | result} if name in PARTS else {})


def test_from_the_command_line_to_the_files(tmp_path, capfd):
    assert run.main(["--rehearse", "--only", "build", "counters", "--out", str(tmp_path)]) == 0, (
        capfd.readouterr()
    )
    (file,) = tmp_path.glob("rehearsal-*.json")
    found = json.loads(file.read_text())
    assert {name: p["outcome"] for name, p in found["parts"].items()} == {
        "build": "passed",
        "counters": "passed",
    }
    assert {"commit", "date", "torch", "cuda", "nvcc", "gpu"} <= set(found["about"])
    text = file.with_suffix(".md").read_text()
    assert "no evidence" in text
    assert PARTS["counters"].title in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capfd):
    assert run.main(["--out", str(tmp_path)]) != 0
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "no GPU is present" in err
    assert list(tmp_path.iterdir()) == []


def test_bits_that_differ_fail_the_part(monkeypatch):
    """A device that rounds once otherwise is noticed in every optimizer."""
    copies = bitwise.copies

    def off_by_one_ulp(device, misaligned):
        copy = copies(device, misaligned)
        return lambda t: copy(torch.nextafter(t, torch.full_like(t, 9.0)) if t.dtype == torch.float32 else t)

    monkeypatch.setattr(bitwise, "copies", off_by_one_ulp)
    failures = rehearsed("bitwise")["failures"]
    assert all(
        any(f.startswith(v) for f in failures) for v in ("adamw", "adam-amsgrad", "sgd-nesterov", "unscale_")
    )


def test_an_optimizer_that_differs_is_noticed():
    """As if the device's steps had another rate."""
    rates = cycle([1e-2, 1.01e-2])

    def ours(params, **options):
        return optim.AdamW(params, **options | {"lr": next(rates)})

    case = replace(cases.BY_NAME["adamw"], ours=ours)
    with pytest.raises(AssertionError, match="after the last step"):
        bitwise.through_the_scaler(Place("cpu", rehearse=True, seconds=60), case, torch.bfloat16, {})


def test_a_replay_that_differs_fails_the_part(monkeypatch):
    """As if a graph replayed with a stale scale."""

    def stale(place, tail):
        model = tail.__self__
        scale = model.scaler._scale.clone()
        return lambda: (model.scaler._scale.copy_(scale), tail())

    monkeypatch.setattr(graphs, "captured", stale)
    assert len(rehearsed("graphs")["failures"]) >= 10


def test_products_that_round_fail_the_part(monkeypatch):
    """As if the device rounded a weight gradient to 16 bits before it added it up."""
    exact = linear.ops.linear_weight_grad_

    def rounded(acc, grad, x, *, bias_grad):
        sums = exact(fresh := torch.zeros_like(acc), grad, x, bias_grad=bias_grad)
        acc += fresh.to(grad.dtype)
        return sums

    monkeypatch.setattr(linear.ops, "linear_weight_grad_", rounded)
    failures = rehearsed("linear")["failures"]
    assert any("linear_weight_grad_" in failure for failure in failures)
    assert any(failure.startswith("micro-batches") for failure in failures)


def test_energy_without_a_counter_is_skipped(monkeypatch):
    """As on a vGPU or in MIG mode."""

    def none(where, devices):
        raise energy.energy.EnergyError(f"{devices[0]} has no energy counter")

    monkeypatch.setattr(energy, "counters_of", none)
    result = part.perform("energy", Place("cuda", rehearse=False, seconds=60))
    assert (result["outcome"], result["reason"]) == ("skipped", "cuda:0 has no energy counter")


def test_energy_in_other_units_fails_the_part(monkeypatch):
    """As if a counter of microjoules were read as one of joules."""
    joules = energy.Pretended.joules
    monkeypatch.setattr(energy.Pretended, "joules", lambda counter: 1e6 * joules(counter))
    failures = rehearsed("energy")["failures"]
    assert [failure.split(":")[0] for failure in failures] == ["FP32", "TF32", "FP16", "BF16"]


def test_a_fusion_is_a_default_only_if_it_is_faster_everywhere():
    def row(kind, speedup, benchmark=True, refused=False):
        return {"kind": kind, "speedup": speedup, "benchmark": benchmark, "refused": refused}

    found = [row("bias_grad", 1.02), row("bias_grad", 1.1), row("bias_grad", 0.99, benchmark=False)]
    found += [row("gelu", 1.019), row("gelu", 1.5), row("gelu_grad", 1.2)]
    assert fusions.measured(found, (9, 0)) == '    (9, 0): {"bias_grad": 1.02, "gelu_grad": 1.2},'
    found += [row("bias_grad", 0.98, benchmark=False), row("gelu_grad", 1.2, refused=True)]
    assert fusions.measured(found, (9, 0)) == "    (9, 0): {},"


def test_an_element_that_differs_is_found_at_its_place():
    pattern = torch.randn(101)
    tensor = large.repeated(pattern, 1_000, "cpu")
    assert large.first_difference(tensor, pattern) is None
    tensor[977] += 1
    assert large.first_difference(tensor, pattern) == 977


def test_crash_hang_and_exit_code_are_told_apart():
    python = [sys.executable, "-c"]
    crash = process.execute([*python, "import os; print('so far'); os.abort()"], 20)
    assert crash.verdict == "crashed with SIGABRT"
    begin = time.monotonic()
    hang = process.execute([*python, "import time; print('here', flush=True); time.sleep(60)"], 1.5)
    assert hang.timed_out
    assert "killed" in hang.verdict
    assert "here" in hang.tail
    assert time.monotonic() - begin < 20
    assert process.execute([*python, "raise SystemExit(3)"], 20).verdict == "exit code 3"


@pytest.mark.parametrize("code", [-11, 1, 0])
def test_what_a_part_found_before_it_crashed_is_kept(monkeypatch, code):
    def crashing(command, seconds, env):
        place = Place("cuda", False, seconds, Path(command[command.index("--result") + 1]))
        place.note("copy_gb_s", 3000.0)
        place.check("first", False, "wrong")
        return process.Finished(code, 2.0, False, "Segmentation fault")

    monkeypatch.setattr(run, "execute", crashing)
    result = run.perform("bandwidth", 60, False, {})
    assert result["outcome"] == "failed"
    assert result["reason"]
    assert result["findings"] == {"copy_gb_s": 3000.0}
    text = report.markdown({"rehearsal": False, "gpu": "some GPU"}, {"bandwidth": result})
    assert "first: wrong" in text
    assert "Segmentation fault" in text


def test_parts_that_fail_or_are_left_out_are_in_the_report(monkeypatch, tmp_path, capsys):
    """A failed build ends it; so does the time."""
    outcomes = {"probe": {"outcome": "passed", "findings": {"gpu": "X"}}, "build": {"outcome": "failed"}}
    monkeypatch.setattr(run, "perform", lambda name, *_: NOTHING | outcomes[name])
    assert run.main(["--out", str(tmp_path)]) == 1
    text = next(tmp_path.glob("x-*.md")).read_text()
    assert text.count("the build failed") == len(PARTS) - 1
    outcomes["build"] = {"outcome": "passed"}
    assert run.main(["--out", str(tmp_path), "--limit", "3"]) == 0
    assert next(tmp_path.glob("x-*.md")).read_text().count("3 s was reached") == len(PARTS)
    capsys.readouterr()


def test_a_part_that_runs_out_of_time_says_what_it_left_out():
    place = Place("cpu", rehearse=True, seconds=60)
    assert list(place.all_in_time("abc")) == ["a", "b", "c"]
    assert place.failures == []
    place = Place("cpu", rehearse=True, seconds=3)
    assert list(place.all_in_time("abc")) == []
    assert place.failures == ["finished in time: 3 of 3 jobs were left out"]


def test_every_optimizer_and_format_is_proved():
    for part_of in (bitwise, graphs):
        names = {name for case in cases.MAIN for name in part_of.formats(case, torch.bfloat16)}
        assert {"master_weights=auto", "master_weights=none", "split, 8-bit states"} <= names
    assert {type(case.ours([torch.zeros(2, 2)], **case.options)).__name__ for case in cases.CASES} == {
        name for name in optim.__all__ if hasattr(getattr(optim, name), "states")
    }


def test_proofs_may_run_together_and_measurements_alone():
    assert set(run.threads("bitwise").values()) == {"1"}
    assert run.threads("bandwidth") == run.threads("probe") == {}
    together = [[part.name for part in stage] for stage in parts.stages(PARTS)]
    assert [name for stage in together for name in stage] == list(PARTS)
    assert [stage for stage in together if len(stage) > 1] == [[n for n, p in PARTS.items() if p.proves]]
    assert [[p.name for p in stage] for stage in parts.stages(["training", "build", "launches"])] == [
        ["build"],
        ["launches"],
        ["training"],
    ]


def test_floors_of_formats():
    """The bytes of performance tables, by hand: gradient check, gradient, weight, remainder, two states."""
    assert bandwidth.SPLIT.floor == 2 + (2 + 2 + 2 + 4 + 4) + (2 + 2 + 4 + 4)
    assert bandwidth.SPLIT_BF16.floor == 2 + (2 + 2 + 2 + 2 + 2) + (2 + 2 + 2 + 2)
    assert bandwidth.SPLIT_INT8.floor == 2 + (2 + 2 + 2 + 1 + 1) + (2 + 2 + 1 + 1) + 4 * 4 / 128


def test_it_builds_for_the_gpu_that_is_there(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;12.0")
    assert run.environment(False, "9.0")["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_tools_are_found_beside_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert process.find_tool("no-such-tool") is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "no-such-tool").touch(mode=0o755)
    assert process.find_tool("no-such-tool") == str(tmp_path / "bin" / "no-such-tool")


def test_a_part_that_skips_or_raises(monkeypatch):
    def skip(place):
        raise Skip("no tool")

    monkeypatch.setattr(suite, "run", skip)
    assert (rehearsed("suite")["outcome"], rehearsed("suite")["reason"]) == ("skipped", "no tool")
    monkeypatch.setattr(suite, "run", lambda place: 1 / 0)
    assert rehearsed("suite")["outcome"] == "failed"


def test_what_other_tools_write_is_read(tmp_path):
    table = (
        '==PROF== Profiling "step_kernel"\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","step_kernel","gpu__time_duration.sum","us","1,234"\n'
        '"0","step_kernel","dram__bytes_read.sum","Gbyte","2.8"\n'
    )
    assert counters.read(table) == [{"kernel": "step_kernel", "time": "1,234 us", "read": "2.8 Gbyte"}]
    failure = '<failure message="assert {} == 2&#10;more">tests/a.py:7: in b{}\nE  more</failure>'
    cases = [("b[1]", 1, ""), ("b[3]", 3, "\ntests/c.py:9: in d"), ("e", 5, "")]
    written = "".join(
        f'<testcase classname="tests.a" name="{name}">{failure.format(got, deeper)}</testcase>'
        for name, got, deeper in cases
    )
    file = tmp_path / "junit.xml"
    file.write_text(
        f'<testsuites><testsuite tests="5" failures="3" errors="0" skipped="1">{written}<testcase '
        'classname="tests.a" name="good"/></testsuite></testsuites>'
    )
    counts, failing = suite.read(file)
    assert counts == {"tests": 5, "failures": 3, "errors": 0, "skipped": 1}
    assert [(f["test"], f["case"], f["message"], f["place"]) for f in failing] == [
        ("tests.a::b", "[1]", "assert 1 == 2", "tests/a.py:7"),
        ("tests.a::b", "[3]", "assert 3 == 2", "tests/c.py:9"),
        ("tests.a::e", "", "assert 5 == 2", "tests/a.py:7"),
    ]
    assert [(f["test"], f["cases"], f["case"]) for f in suite.grouped(failing)] == [
        ("tests.a::b", 2, "[1]"),
        ("tests.a::e", 1, ""),
    ]


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--limit", "0"]])
def test_bad_options(arguments, capsys):
    with pytest.raises(SystemExit):
        run.parse(arguments)
    assert arguments[0] in capsys.readouterr().err
