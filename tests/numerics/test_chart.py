"""Plots: what is drawn where, what counts as underflow, files, and what is refused."""

import dataclasses
import importlib
import math
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
from fusedamp.numerics.record import Record
from gradient_records import record, run

pytest.importorskip("matplotlib")
from fusedamp.numerics import chart


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def size(path):
    """Width and height of a PNG, in pixels."""
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.mark.parametrize("kind", ["healthy", "overflow", "underflow", "bf16"])
def test_runs(kind, tmp_path):
    """A file as wide as a README shows it; also of a single step."""
    records, trajectory = run(kind)
    for step in (None, 200):
        chart.draw(records, trajectory, tmp_path / "run.png", step)
        assert size(tmp_path / "run.png")[0] == 900


def test_without_a_trajectory(tmp_path):
    """Records alone; a path may be text, and another format."""
    chart.draw(run("overflow")[0], None, str(tmp_path / "run.svg"))
    assert "<svg" in (tmp_path / "run.svg").read_text()


def test_one_record(tmp_path):
    records, trajectory = run("overflow")
    chart.draw(records[:1], trajectory[:50], tmp_path / "one.png")
    chart.draw(records[:1], trajectory[:1], tmp_path / "one.png")
    chart.draw(records[:1], trajectory[:0], tmp_path / "one.png")


def test_500_parameters(tmp_path):
    records, trajectory = run("overflow", records=4, parameters=500)
    chart.draw(records, trajectory, tmp_path / "all.png")
    chart.draw(records, trajectory, tmp_path / "step.png", step=200)
    assert size(tmp_path / "step.png") == (900, 2180)


ODD = {
    "no parameters": record([]),
    "no elements": record([np.zeros(0)]),
    "zeros": record([np.zeros(3)]),
    "inf": record([[np.inf, np.nan]], skipped=True),
    "scale 0": dataclasses.replace(record([np.zeros(3)]), scale=0.0),
    "tiny scale": record([[1.0]], scale=2.0**-1000, dtype=np.float64),
    "scale that is not a power of two": record([[1.0]], scale=1000.0),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_records(name, tmp_path):
    chart.draw([ODD[name]], None, tmp_path / "odd.png")
    chart.draw([ODD[name]], None, tmp_path / "odd.png", step=1)


def test_odd_records_together(tmp_path):
    steps = [dataclasses.replace(r, step=i + 1) for i, r in enumerate(ODD.values())]
    chart.draw(steps, None, tmp_path / "odd.png")


# Where things are ------------------------------------------------------------


def meshes(axes):
    """(x edges, y edges, values) of each heat map."""
    found = []
    for mesh in axes.collections:
        corners = mesh.get_coordinates()
        found.append(
            (corners[0, :, 0].tolist(), corners[:, 0, 1].tolist(), np.ma.filled(mesh.get_array(), np.nan))
        )
    return found


def test_gradients_are_unscaled():
    """4 / 1024 is drawn at 2^-8, whatever the scale is: a column per record, a row per binade."""
    first = record([[4.0 / 1024, 2.0 / 1024], [0.0, 0.0]], step=10, scale=1024.0)
    second = record([[4.0 / 1024], [1.0]], step=20, scale=1000.0)
    (xs, ys, values), (other_xs, other_ys, other) = meshes(chart._over_steps([first, second], None).axes[0])
    assert xs == [5, 15]
    assert ys == [-9, -8, -7]
    assert values.flatten().tolist() == [25, 25]
    assert other_xs == [15, 25]
    shift = math.log2(1000)
    assert other_ys == pytest.approx([e - shift for e in range(1, 11)], abs=1e-12)
    assert other.flatten()[[0, -1]].tolist() == [50, 50]
    assert np.isnan(other.flatten()[1:-1]).all()


def test_limits_move_with_the_scale():
    records, trajectory = run("underflow")
    lines = chart._over_steps(records, trajectory).axes[0].lines[:3]
    steps, scales = trajectory[:, :2].unbind(1)
    assert steps[0] == 1, "the steps before the first record belong to it"
    for line, limit in zip(lines, (65504.0, 2.0**-14, 2.0**-24), strict=True):
        x, y = line.get_data()
        assert x[1:-1] == pytest.approx(steps.tolist())
        assert y[1:-1] == pytest.approx((limit / scales).log2().tolist(), abs=1e-12)


def test_the_largest_gradient_and_skips():
    records, trajectory = run("overflow")
    top, middle, _ = chart._over_steps(records, trajectory).axes[:3]
    shown = trajectory
    y = top.lines[3].get_ydata()
    expected = (shown[:, 3] / shown[:, 1]).log2()
    assert np.array_equal(np.isnan(y), shown[:, 2] != 0), "nothing is drawn for a skipped step"
    assert np.allclose(y[shown[:, 2] == 0], expected[shown[:, 2] == 0], rtol=0, atol=1e-12)
    assert middle.lines[1].get_xdata() == pytest.approx(shown[shown[:, 2] != 0][:, 0].tolist())


def test_shares():
    records, trajectory = run("overflow")
    lines = chart._over_steps(records, trajectory).axes[2].lines
    names = ("zeros_percent", "subnormal_percent", "lost_updates_percent")
    for line, name in zip(lines, names, strict=True):
        expected = [r.summary().get(name, math.nan) for r in records]
        assert np.array_equal(line.get_ydata(), expected, equal_nan=True)
    without = [
        dataclasses.replace(r, **dict.fromkeys(("moved", "lost", "update_norm", "weight_norm")))
        for r in records
    ]
    assert len(chart._over_steps(without, trajectory).axes[2].lines) == 2


def test_parameters_of_a_step():
    r = record([[1.0, 0.0], [np.inf, 8.0]], scale=4.0, names=["first", "second"], skipped=True)
    axes = chart._one_step(r).axes[0]
    ((xs, ys, values),) = meshes(axes)
    assert xs == list(range(0, 5))
    assert ys == [0, 1, 2]
    assert np.array_equal(
        values, [[50, np.nan, np.nan, np.nan], [np.nan, np.nan, np.nan, 50]], equal_nan=True
    )
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]
    assert axes.get_ylim() == (2, 0), "in the order of the model, from the top"
    crosses = [line.get_ydata() for line in axes.lines if line.get_marker() == "X"]
    assert crosses == [[1.5]]
    assert [line.get_xdata()[0] for line in axes.lines[:3]] == [math.log2(65504) - 2, -16, -26]


# Underflow -------------------------------------------------------------------


def scaled(scale, step, zeros=0, small=100):
    """100 elements near 2^-20 at scale 1, as stored with ``scale``; ``zeros`` of them are 0."""
    values = np.full(1000, 0.5)
    values[:small] = 2.0**-20
    values[:zeros] = 0
    return record([values], step=step, scale=scale)


def test_zeros_that_come_and_go_with_the_scale():
    """2^-20 is an FP16 number at scale 1, and 0 at scale 2^-8."""
    records = [scaled(1.0, 10), scaled(2.0**-8, 20), scaled(2.0**-8, 30), scaled(1.0, 40)]
    assert [(r.step, change) for r, change in chart.jumps(records)] == [(20, 10.0), (40, -10.0)]


def test_a_skipped_step_between_does_not_count():
    between = record([[np.inf]], step=15, scale=1.0, skipped=True)
    found = chart.jumps([scaled(1.0, 10), between, scaled(2.0**-8, 20)])
    assert [(r.step, change) for r, change in found] == [(20, 10.0)]


def below_the_floor(step, zeros):
    """FP32 gradients that FP16 would flush, and zeros among them."""
    return record([[2.0**-30] * (4 - zeros) + [0.0] * zeros], step=step, dtype=np.float32)


@pytest.mark.parametrize(
    "records",
    [
        [below_the_floor(10, zeros=2), below_the_floor(20, zeros=1)],
        [scaled(1.0, 10), scaled(1.0, 20, zeros=50)],  # the scale stays
        [scaled(1.0, 10, zeros=50), scaled(0.5, 20)],  # fewer zeros at a smaller scale
        [scaled(0.5, 10), scaled(1.0, 20, zeros=50)],  # more zeros at a larger one
        [scaled(1.0, 10, small=0), scaled(2.0**-8, 20, small=0, zeros=50)],  # all are far above the floor
        [scaled(1.0, 10), scaled(2.0**-2, 20, zeros=50)],  # 2^-20 is above the floor at both scales
        [dataclasses.replace(scaled(1.0, 10), scale=0.0), scaled(1.0, 20, zeros=50)],
    ],
)
def test_what_is_not_underflow(records):
    assert not chart.jumps(records)


def test_noise_is_not_underflow():
    for seed in range(5):
        assert not chart.jumps(run("overflow", seed=seed)[0])
        assert chart.jumps(run("underflow", seed=seed)[0])[-1][0].step == 600


def test_underflow_is_marked():
    axes = chart._over_steps([scaled(1.0, 10), scaled(2.0**-8, 20)], None).axes[0]
    marks = [line for line in axes.lines if line.get_marker() == "^"]
    assert [line.get_xydata().tolist() for line in marks] == [[[20, -16]]]
    assert any("+10.0 % zeros" in text.get_text() for text in axes.texts)


# Runs in files ---------------------------------------------------------------


def test_runs_in_files(tmp_path):
    rows = [{"step": float(r.step), **r.summary()} for r in run("overflow")[0]]
    for shown in (rows, rows[:1], rows[3:4]):
        chart.draw_run(shown, tmp_path / "run.png")
        assert size(tmp_path / "run.png")[0] == 900


# Refusals --------------------------------------------------------------------

ONE = [record([[1.0]], step=50)]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([], None, "x.png"), {}, "there are no records yet"),
        ((ONE, torch.zeros(3), "x.png"), {}, r"trajectory has shape \[3\]; expected \[m, 4\]"),
        ((ONE, torch.zeros(3, 5), "x.png"), {}, r"trajectory has shape \[3, 5\]"),
        ((ONE, None, "x.png"), {"step": 51}, "step is 51; expected one of 50"),
        ((ONE, None, "nowhere/x.png"), {}, "path is nowhere/x.png; expected a file in a folder that exists"),
        ((ONE, None, "x.gradients"), {}, "path is x.gradients; expected a suffix such as .png"),
        ((ONE, None, "x"), {}, "path is x; expected a suffix"),
    ],
)
def test_refusals(arguments, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"\[plot\] " + words):
        chart.draw(*arguments, **options)
    assert not list(tmp_path.iterdir())


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match="there are no records yet"):
        chart.draw_run([], tmp_path / "x.png")


def test_without_matplotlib(monkeypatch):
    """Records, tables and loggers work; a plot names the package."""
    monkeypatch.setitem(sys.modules, "matplotlib.cm", None)
    monkeypatch.delitem(sys.modules, "fusedamp.numerics.chart")
    with pytest.raises(ImportError, match=r'need matplotlib, .*: pip install "fusedamp\[numerics\]"'):
        importlib.import_module("fusedamp.numerics.chart")


def test_the_plots_of_others_stay(tmp_path):
    """No pyplot: no backend, no style, no figure of the program changes."""
    before = set(sys.modules)
    chart.draw(ONE, None, tmp_path / "x.png")
    assert "matplotlib.pyplot" not in set(sys.modules) - before
    assert isinstance(ONE[0], Record)
