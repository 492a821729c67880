"""Tables of parameters and of runs: figures, order, names, advice, colors."""

import math
import re
import sys
import warnings

import numpy as np
import pytest
from fusedamp.numerics import table
from gradient_records import record, run


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def terminal(monkeypatch):
    """Sets the width of the terminal."""
    return lambda width: monkeypatch.setenv("COLUMNS", str(width))


def lines_of(text, names):
    """The lines of the table that start with one of ``names``, in order."""
    return [line for line in text.splitlines() if line.split() and line.split()[0] in names]


def test_worst_first(terminal):
    """Inf and NaN by their number, then headroom below 1 bit, then subnormal elements, zeros, headroom."""
    terminal(200)
    small = [2.0**-15] * 3 + [1.0]
    gradients = {
        "fine": [1.0, 1.0, 1.0, 1.0],
        "zeros": [0.0, 1.0, 1.0, 1.0],
        "larger": [1.0, 1.0, 1.0, 8.0],
        "subnormal": small,
        "near": [40000.0, *small[1:]],
        "nearest": [60000.0, 1, 1, 1],
        "nan": [np.nan, 1, 1, 1],
        "infinite": [np.inf, np.nan, 1, 1],
    }
    text = table.render([record(list(gradients.values()), names=list(gradients))])
    order = ["infinite", "nan", "nearest", "near", "subnormal", "zeros", "larger", "fine"]
    assert [line.split()[0] for line in lines_of(text, gradients)] == order


def test_figures_are_of_all_records(terminal):
    """Counts add up, and the least headroom counts."""
    terminal(200)
    first = record([[0.0, 4.0], [1.0]], step=10, scale=4.0, names=["a", "b"], updates=[(2, 1, 3.0, 10.0)] * 2)
    second = record([[0.0, 0.0], [1.0]], step=20, scale=8.0, names=["a", "c"], updates=[(2, 0, 4.0, 0.0)] * 2)
    rows = {row.name: row for row in table.rows_of([first, second])}
    assert list(rows) == ["a", "b", "c"]
    a = rows["a"]
    assert (a.zeros, a.subnormal, a.lost, a.ratio) == (0.75, 0, 0.25, 0.5)
    assert a.headroom == pytest.approx(math.log2(65504 / 16), abs=1e-13)
    assert rows["c"].ratio == math.inf
    text = table.render([first, second])
    assert text.splitlines()[0] == "2 steps from 10 to 20, loss scale 4 to 8. 3 parameters, worst first."
    (line,) = lines_of(text, ["a"])
    assert line.split()[1:6] == ["12.0", "75.0", "0", "25.0", "5.0e-01"]


def test_parameters_with_one_name_share_a_line():
    (row,) = table.rows_of(
        [record([[0.0], [3.0, 5.0, 0.0]], names=["a", "a"], updates=[(1, 1, 3, 6), (3, 0, 4, 8)])]
    )
    assert (row.zeros, row.lost, row.ratio) == (0.5, 0.25, 0.5)
    assert sum(row.histogram) == 4


def test_without_updates(terminal):
    """No columns for unknown figures; a parameter without updates among others has empty cells."""
    terminal(200)
    text = table.render([record([[1.0]])])
    assert "weight" not in text.splitlines()[3]
    both = [record([[1.0]], names=["a"]), record([[1.0]], names=["b"], updates=[(1, 0, 1.0, 2.0)])]
    a, b = lines_of(table.render(both), ["a", "b"])
    assert a.split()[1:4] == ["16.0", "0", "0"]
    assert b.split()[1:6] == ["16.0", "0", "0", "0", "5.0e-01"]
    assert a.index("█") == b.index("█")


def test_blocks():
    """20 columns of two binades from 2^-24; what is outside has marks."""
    (row,) = table.rows_of([record([[2.0**-24, 2.0**-23, 2.0**-14, 40000.0]])])
    text = table.blocks(row.histogram)
    assert len(text) == 22
    assert text == " █    ▄" + " " * 13 + "▄ "
    wide = record([[2.0**-25, 2.0**16]], dtype=np.float32)
    assert table.blocks(table.rows_of([wide])[0].histogram) == "<" + " " * 20 + ">"
    assert (
        table.blocks(table.rows_of([record([[np.nan, 1e-9]], dtype=np.float32)])[0].histogram)[::21] == "<!"
    )
    assert table.blocks(table.rows_of([record([[0.0]])])[0].histogram) == " " * 22
    many = [0] * 64
    many[30], many[40] = 1_000_000, 1
    assert table.blocks(many).split() == ["█", "▁"], "one element among a million is seen"


def test_the_ruler_fits_the_blocks():
    """2^-14, FP16's least normal number, is above the first block of normal numbers."""
    lines = table.render([record([[2.0**-14, 2.0**-24]])]).splitlines()
    ruler = next(line for line in lines if "2^-14" in line and "2^16" in line)
    (line,) = lines_of("\n".join(lines), ["layer0.weight"])
    assert ruler.index("2^-14") == line.rindex("█")
    assert ruler.index("2^-24") + 1 == line.index("█")


def test_names_are_shortened_from_the_left(terminal):
    terminal(80)
    records, _ = run("healthy", parameters=6)
    text = table.render(records)
    names = [line.split()[0] for line in text.splitlines() if line.startswith("…")]
    assert len(set(names)) == 6, "different names stay different"
    assert all(records[0].names[0].startswith("blocks") and name.endswith(".weight") for name in names)
    assert table.shorten("abcdef", 6) == "abcdef"
    assert table.shorten("abcdef", 4) == "…def"
    terminal(200)
    assert "…" not in table.render(records)


def test_limit():
    records, _ = run("healthy", records=1, parameters=50)
    text = table.render(records, limit=3)
    assert sum(".weight " in line for line in text.splitlines()) == 3
    assert "... and 47 more" in text
    assert "more" not in table.render(records, limit=50)


def test_500_parameters():
    records, _ = run("overflow", records=4, parameters=500)
    assert "... and 480 more" in table.render(records)


def test_nothing_to_show():
    assert table.render([]).startswith("No records yet.")
    assert table.render([record([])]) == "Step 1, loss scale 1. No parameter had a gradient."
    text = table.render([record([np.zeros(3), np.zeros(0)], names=["a", "b"])])
    assert "All gradients are 0." in text
    assert lines_of(text, ["a"])[0].split()[1:] == ["all", "0", "100", "0"]
    assert lines_of(text, ["b"])[0].split()[1:] == ["all", "0", "0", "0"]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([record([[1.0]])], "Nothing to do: 16.0 bits of headroom"),
        (
            [record([[np.inf], [np.nan]], skipped=True, names=["a", "b"])],
            "2 parameters overflowed: a, b. A scaler skips such steps",
        ),
        ([record([[np.inf]] * 5, skipped=True)], "layer2.weight and 2 more"),
        ([record([[60000.0]])], "1 parameter with less than 1 bit of headroom: layer0.weight."),
        (
            [record([[2.0**-15, 2.0**-2]])],
            "50.0 % of all elements are subnormal in FP16, with 18.0 bits of headroom. A loss scale 2^15",
        ),
        ([record([[2.0**-15, 2.0**14]])], "No loss scale fits them all; BF16 has the range."),
        ([record([[1.0]], updates=[(100, 93, 1.0, 1.0)])], "Updates lost without masters: 93.0 %."),
    ],
)
def test_what_to_do(records, words):
    assert words in table.render(records)


def test_advice_is_about_the_present_scale():
    """Headroom at the last scale counts: the gradient of step 1 would have 6 bits less at the scale of step
    2."""
    first, second = record([[2.0**4]], step=1, scale=2.0**4), record([[2.0**-25, 1.0]], step=2, scale=2.0**10)
    assert "with 2.0 bits of headroom" not in table.render([first, second])
    assert "No loss scale fits them all" in table.render([first, second])
    zero = record([[1.0]], step=3, scale=1.0)
    object.__setattr__(zero, "scale", 0.0)
    assert "Nothing to do" in table.render([first, zero])


def test_refusals():
    with pytest.raises(ValueError, match=r"\[table\] limit is 0; expected a whole number from 1"):
        table.render([], limit=0)
    with pytest.raises(TypeError, match=r"\[table\] records\[1\] is a str; expected a Record"):
        table.render([record([[1.0]]), "x"])
    with pytest.raises(ValueError, match=r"\[numerics\] limit is 0"):
        table.over_time([], limit=0)


# Runs ------------------------------------------------------------


def rows(kind="overflow", **options):
    return [{"step": float(r.step), **r.summary()} for r in run(kind, **options)[0]]


def test_over_time():
    found = rows()
    text = table.over_time(found, limit=5)
    lines = text.splitlines()
    assert lines[0] == "12 records, 3 of them skipped"
    assert len(lines_of(text, ["50", "200", "350", "500"])) == 4
    last = lines_of(text, ["500"])[0].split()
    taken = [row for row in found[9:] if not row["skipped"]]
    assert last[:5] == ["500", "to", "600", "1", "1"]
    assert last[5] == f"{min(row['headroom_bits'] for row in taken):.1f}"
    assert float(last[8]) == pytest.approx(np.mean([row["lost_updates_percent"] for row in taken]), abs=0.05)
    assert lines[-1].startswith("Updates lost without masters: 85.1 %")
    assert "An overflow is near." in lines[-2]


def test_over_time_of_single_records():
    text = table.over_time(rows("healthy"))
    assert len(lines_of(text, [str(step) for step in range(50, 601, 50)])) == 12
    assert "skipped" in text.splitlines()[3]
    assert "skipped" not in text.splitlines()[0]
    assert table.over_time([]).startswith("No records")


def test_over_time_if_all_were_skipped():
    text = table.over_time([{"step": 5.0, **record([[np.inf]], skipped=True).summary()}])
    assert lines_of(text, ["5"])[0].split() == ["5", "1", "1", "over", "0", "0"]


# Colors ------------------------------------------------------------


def test_plain_without_a_terminal():
    assert "\x1b" not in table.render(run("overflow")[0])


def test_colors():
    pytest.importorskip("rich")
    records, _ = run("overflow")
    colored = table.render(records, color=True)
    assert "\x1b" in colored
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == table.render(records, color=False)


def test_plain_without_rich(monkeypatch):
    found = table.importlib.util.find_spec
    monkeypatch.setattr(
        table.importlib.util, "find_spec", lambda name: None if name == "rich" else found(name)
    )
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "\x1b" not in table.render(run("overflow")[0], color=True)
