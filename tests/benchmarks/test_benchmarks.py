"""The benchmark measures what it says: right sides, right bytes, equal results, honest about lost time."""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for extra in ("matplotlib", "numpy", "rich"):
    pytest.importorskip(extra, reason=f"{extra} is not installed (extra: bench)")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are not part of the package

from benchmarks import (  # noqa: E402
    chart,
    cliffs,
    contenders,
    duel,
    linear,
    linear_rows,
    offload,
    report,
    results,
    run,
    scaling,
    small,
    stream,
    timing,
)
from benchmarks.machine import this_machine  # noqa: E402
from benchmarks.rows import RIVALS, ROWS, Row  # noqa: E402
from benchmarks.timing import Limits, Sample, Timing, Triple  # noqa: E402
from benchmarks.workloads import WORKLOADS, numel  # noqa: E402

CLEAN, LOST = 0.0, 0.5


def sample(seconds: float, waited: float = CLEAN) -> Sample:
    return Sample(wall=seconds, cpu=seconds, waited=waited)


def fabricated(row: Row, ours: float, theirs: float, threads: int = 1) -> results.Result:
    """Each of our samples took ``ours`` seconds, each of theirs ``theirs``, the stream 1."""
    measured = Timing(threads, [Triple(sample(ours), sample(theirs), sample(1.0))] * 5, dropped=2)
    shapes = WORKLOADS[row.workload].full
    return results.Result(row, shapes, measured, duel.Agreement(0.0, 1.0), stream_bytes=numel(shapes) * 28)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_tiny_run_from_end_to_end(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "run.py"),
        "--quick",
        "--workload",
        "host",
        "--samples",
        "1",
    ]
    command += ["--rival", "P1", "P3", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    (table,) = tmp_path.glob("*-quick.csv")
    with table.open() as file:
        records = list(csv.DictReader(file))
    assert [(r["rival"], r["dtype"], r["threads"], r["clock"]) for r in records] == [
        ("P1", "fp32", "1", "cpu"),
        ("P3", "bf16", "1", "cpu"),
    ]
    wanted = "ratio_p50 ratio_p20 ratio_p80 ours_ms_p50 theirs_ms_best floor_bytes our_bytes rival_bytes"
    wanted += " stream_gb_s share_of_stream clean dropped cpu cores flags torch fusedamp commit date"
    for record in records:
        assert set(wanted.split()) <= set(record)
        assert record["quick"] == "1"
        assert int(record["clean"]) + int(record["dropped"]) >= 1
        assert 0 <= float(record["weight_difference"]) <= float(record["tolerance"])
    (text,) = (path.read_text() for path in tmp_path.glob("*-quick.md"))
    assert "A quick run" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "this process may use 1 to"),
        (["--threads", "100000"], "this process may use 1 to"),
        (["--samples", "0"], "expected at least 1"),
        (["--workload", "W9"], "invalid choice: 'W9'"),
        (["--workload", "host", "--rival", "P5"], "no row matches"),
        (["--scaling", "--dtype", "bf16"], "--scaling: has its own workloads"),
        (["--linear", "--rival", "P1"], "--linear: has its own workloads"),
    ],
)
def test_bad_options_get_clear_messages(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_ratio_is_their_time_over_ours():
    faster, slower = fabricated(ROWS[0], ours=0.5, theirs=1.0), fabricated(ROWS[0], ours=1.0, theirs=0.5)
    assert (faster.ratio(), faster.verdict) == (2.0, "faster")
    assert (slower.ratio(), slower.verdict) == (0.5, "slower")
    record = faster.record(this_machine(), quick=False)
    assert (record["ours_ms_p50"], record["theirs_ms_p50"]) == (500, 1000)
    assert (record["clean"], record["dropped"]) == (5, 2)


def test_the_share_of_the_stream_counts_the_floor_only():
    result = fabricated(Row("adamw", "W1", RIVALS["P3"]), ours=2.0, theirs=4.0)
    assert result.share_of_stream == pytest.approx(30 / 2 / 28)


def test_one_thread_is_judged_by_cpu_time_and_more_by_wall_time():
    triple = Triple(Sample(9.0, 1.0, 0.0), Sample(9.0, 4.0, 0.0), None)
    assert Timing(1, [triple]).ratios().tolist() == [4.0]
    assert Timing(2, [triple]).ratios().tolist() == [1.0]


def test_bytes_per_parameter_are_those_of_the_floor_table():
    def counts(optimizer: str, rival: str) -> tuple[int, int, int]:
        row = Row(optimizer, "W1", RIVALS[rival])
        return row.floor_bytes, row.our_bytes, row.rival_bytes

    assert counts("adamw", "P1") == (32, 32, 48)
    assert counts("adamw", "P2") == (32, 32, 100)
    assert counts("adamw", "P4") == (30, 32, 60)
    assert counts("sgd", "P1") == (24, 24, 40)
    assert counts("sgd", "P3") == (22, 24, 52)


def test_the_workloads_are_those_of_the_claim():
    assert len(WORKLOADS["W2"].full) == 148
    assert numel(WORKLOADS["W2"].full) == 124_439_808
    assert len(WORKLOADS["W3"].full) == 2_000
    assert all(1_000 <= size <= 10_000 for (size,) in WORKLOADS["W3"].full)


def test_what_counts_as_disturbed():
    assert not Sample(wall=1.0, cpu=0.99, waited=0.0).disturbed(threads=1)
    assert Sample(wall=1.0, cpu=0.9, waited=0.0).disturbed(threads=1)
    assert not Sample(wall=1.0, cpu=0.9, waited=0.0).disturbed(
        threads=2
    )  # its threads may wait for each other
    assert Sample(wall=1.0, cpu=2.0, waited=0.1).disturbed(threads=2)


def test_disturbed_pairs_are_dropped_and_counted(monkeypatch):
    waits = itertools.cycle([CLEAN, CLEAN, LOST, CLEAN, CLEAN, LOST])  # pairs: clean, lost, lost, clean, ...
    monkeypatch.setattr(timing, "_sample", lambda call: sample(1.0, next(waits)))
    measured = timing.alternate(*[lambda: None] * 3, None, 1, Limits(samples=3, seconds=60))
    assert (len(measured.clean), measured.dropped) == (3, 4)


def test_a_run_ends_in_time_on_a_busy_machine(monkeypatch):
    now = 0.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    budget = timing.Budget(seconds=100, measurements=10, longest=8)
    for _ in range(10):
        now += 2 * budget.share()  # each is disturbed, and takes twice its time
    assert now == pytest.approx(100)
    assert budget.share() == 0


def test_the_sides_take_turns_and_each_gets_fresh_gradients():
    calls: list[str] = []
    ours, theirs, before, roof = (
        lambda name=name: calls.append(name) for name in ("ours", "theirs", "new", "roof")
    )
    timing.alternate(ours, theirs, before, roof, 1, Limits(samples=1, seconds=60, warm_up=0))
    rounds = [tuple(calls[i : i + 5]) for i in range(0, len(calls), 5)]
    orders = itertools.cycle(
        [("new", "ours", "new", "theirs", "roof"), ("new", "theirs", "new", "ours", "roof")]
    )
    assert all(got == wanted for got, wanted in zip(rounds, orders, strict=False))


@pytest.mark.parametrize("row", {(r.optimizer, r.rival.key): r for r in ROWS}.values(), ids=lambda r: r.name)
def test_both_sides_compute_the_same(row):
    agreement = duel.check_small(row, WORKLOADS[row.workload].quick)
    assert agreement.tolerance < 1e-4  # far below what the steps change, so that the check can fail


@pytest.mark.parametrize(("optimizer", "rival"), [("adamw", "P1"), ("adamw", "P4"), ("sgd", "P3")])
def test_a_learning_rate_that_is_off_is_a_wrong_result(monkeypatch, optimizer, rival):
    def off(*args):
        options = contenders.OPTIONS[optimizer]
        monkeypatch.setitem(contenders.OPTIONS, optimizer, {**options, "lr": options["lr"] * 1.01})
        return contenders.torch_side(*args)

    monkeypatch.setattr(duel, "torch_side", off)
    with pytest.raises(duel.WrongResult, match="FP32 weights differ"):
        duel.check_small(Row(optimizer, "W1", RIVALS[rival]), WORKLOADS["W3"].quick)


def test_losses_are_in_the_report_like_wins():
    rows = [Row("adamw", "W1", RIVALS[key]) for key in ("P1", "P2")]
    both = [fabricated(rows[0], 1.0, 0.8), fabricated(rows[1], 1.0, 6.0)]
    text = report.markdown(both, this_machine(), quick=False, no_stream=None)
    assert "1 faster, 1 slower, of 2 rows" in text
    assert "**0.80** (0.80 to 0.80) slower" in text
    assert "2 of 7" in text  # dropped


def test_the_charts_are_drawn(tmp_path):
    rows = [Row("adamw", workload, RIVALS[key]) for workload in ("W1", "W3") for key in ("P1", "P3")]
    chart.draw(
        [fabricated(row, 1.0, 2.0, n) for row in rows for n in (1, 2)],
        this_machine(),
        False,
        tmp_path / "a.png",
    )
    points = [scaling.Point(job, fabricated(rows[0], 1.0, 2.0)) for job in scaling.plan(quick=True, cores=2)]
    scaling.draw(points, this_machine(), True, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_stream_touches_every_element_once(threads):
    try:
        adam_mix = stream.Stream(1_001)
    except stream.NoStream as error:
        pytest.skip(str(error))
    torch.set_num_threads(threads)
    before = [array.clone() for array in adam_mix._arrays]
    adam_mix()
    *written, grads = adam_mix._arrays
    assert torch.equal(grads, before[3])
    for array, old in zip(written, before, strict=False):
        assert torch.equal(array, torch.full_like(array, array[0].item()))
        assert array[0] > old[0]
    assert adam_mix.bytes == 28 * 1_001


def test_without_a_compiler_the_stream_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(stream.NoStream, match="no-such-compiler"):
        stream.Stream(10)


def test_cliffs_have_two_sides_that_run():
    """Every row's work equals its reference's; the row of 100 groups has 100."""
    rows = list(cliffs.pairs(quick=True))
    assert len({(row, dtype, place) for row, dtype, place, _, _ in rows}) == len(rows) == 16
    for _, _, _, elements, (tried, plain) in rows:
        assert elements > 0
        tried()
        plain()


@pytest.mark.parametrize("way", offload.WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("form", offload.FORMATS)
def test_offload_has_the_same_weights_on_both_sides(form, way):
    offload.checked(way.kind, offload.FORMATS[form])
    ours, _ = offload.sides(way.kind, [(1_000,)] * 3, offload.FORMATS[form])
    for _ in range(2):
        offload.before(ours, way)()
        ours.step()


@pytest.mark.parametrize("phase", small.PHASES)
def test_small_steps_are_counted(phase):
    """Guards the numbers of operations in the report: a plain step is one of ours, with a scaler three."""
    ours, theirs = (small.operations(small.phase_of(mine, 4, phase)) for mine in (True, False))
    assert ours == (1 if phase == "plain step" else 3)
    assert theirs >= (1 if phase == "plain step" else 3)


LINEAR = list(linear_rows.rows("cpu", quick=True))


@pytest.mark.parametrize("row", LINEAR, ids=lambda row: row.name)
def test_both_sides_of_a_linear_row_compute_the_same(row):
    linear.checked(row, row.make())
    assert row.flops > 0
    assert 0 < row.our_bytes < 100 * row.rival_bytes


def test_a_linear_row_that_computes_something_else_is_a_wrong_result():
    row = next(row for row in LINEAR if row.what == "forward")
    ours, theirs = row.make()
    with pytest.raises(duel.WrongResult, match="results differ"):
        linear.checked(row, (lambda: ours() * 1.01, theirs))


def test_bytes_of_weight_gradients_are_those_of_their_passes():
    """m n k = 48, 96, 64: 20 bytes per weight for torch, 16 for a product and a sum, 8 for one that adds."""
    weight, rows = 96 * 64, 48 * (96 + 64)
    found = {
        row.rival: row for row in LINEAR if "weight gradient" in row.what and row.dtype is torch.bfloat16
    }
    assert found[linear_rows.AMP].rival_bytes == 20 * weight + 2 * rows
    assert found[linear_rows.PRODUCT].rival_bytes == 16 * weight + 10 * rows
    assert {row.our_bytes for row in found.values()} == {8 * weight + 10 * rows}
    assert {row.flops for row in found.values()} == {2 * 48 * 96 * 64}


def test_accumulation_makes_no_temporary_of_the_weights_shape():
    """48 x 96 and 48 x 64 are upcast; the 96 x 64 of the weight are not made again."""
    row = next(row for row in LINEAR if row.rival == linear_rows.PRODUCT)
    ours, theirs = row.make()
    upcast, weight = 4 * 48 * (96 + 64), 4 * 96 * 64
    ours()
    assert linear.temporary(ours) == upcast
    assert linear.temporary(theirs) == upcast + weight


def test_rivals_on_a_gpu_are_listed():
    rivals = {row.rival for row in linear_rows.rows("cuda", quick=False)}
    assert {linear_rows.MM, linear_rows.ADDMM, linear_rows.AMP, linear_rows.GRAD_DTYPE} <= rivals


def test_slower_linear_rows_are_listed_with_their_reason():
    row = next(row for row in LINEAR if row.why and "weight gradient" in row.what)
    host = next(row for row in LINEAR if row.calls > 1)

    def point(row, theirs):
        measured = Timing(1, [Triple(sample(1.0), sample(theirs), None)] * 5)
        return linear.Point(row, measured, (1e6, 2e6))

    text = linear.report([point(row, 0.5), point(host, 0.6)], this_machine(), quick=False)
    aims, slower = text.split("## Aims")[1].split("## Where fusedamp is slower")
    assert f"{row.name}, 1 thread: **0.50** (0.50 to 0.50). {row.why}" in slower
    assert "**0.60** (0.60 to 0.60) missed" in aims
    assert row.name not in aims  # the results differ by design
    assert "1 / 2" in text
    text = linear.report([point(row, 2.0), point(host, 0.7)], this_machine(), quick=False)
    assert "All are met." in text
