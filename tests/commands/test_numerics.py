"""``python -m fusedamp numerics``: a run's CSV log as a table and a plot; bad files in one line."""

import sys

import pytest
from fusedamp.commands import cli
from fusedamp.numerics import loggers
from gradient_records import run


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A run's log, in the current folder."""
    monkeypatch.chdir(tmp_path)
    logger = loggers.csv("run.csv")
    for record in run("overflow")[0]:
        loggers.send(logger, record)
    return "run.csv"


def test_table(log, capsys):
    assert cli.main(["numerics", log, "--lines", "3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("12 records, 3 of them skipped\n")
    assert [line.split()[0] for line in out.splitlines() if " to " in line] == ["50", "250", "450"]
    assert "16-bit weights need FP32 master weights" in out


def test_plot(log, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.main(["numerics", log, "--plot", "run.png"]) == 0
    assert capsys.readouterr().out.endswith("\nPlot: run.png\n")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(log, capsys, monkeypatch):
    """The table is there, and what is missing has a name."""
    monkeypatch.setitem(sys.modules, "matplotlib.cm", None)
    monkeypatch.delitem(sys.modules, "fusedamp.numerics.chart", raising=False)
    assert cli.main(["numerics", log, "--plot", "run.png"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("12 records")
    assert 'need matplotlib, which is not installed here: pip install "fusedamp[numerics]"' in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.csv"], "nowhere.csv: No such file or directory"),
        (["."], ".: Is a directory"),
        (["bad.csv"], "bad.csv, line 3: 2 cells; expected 8, as in line 1"),
        (["run.csv", "--lines", "0"], "limit is 0; expected a whole number from 1"),
        (
            ["run.csv", "--plot", "nowhere/run.png"],
            "nowhere/run.png; expected a file in a folder that exists",
        ),
        (["run.csv", "--plot", "run.jpeg2"], "run.jpeg2; expected a suffix such as .png"),
    ],
)
def test_bad_files_and_options(log, arguments, words, capsys, tmp_path):
    """Exit code 2 and one line."""
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    lines = (tmp_path / log).read_text().splitlines()
    (tmp_path / "bad.csv").write_text("\n".join([*lines[:2], "7,8"]) + "\n")
    assert cli.main(["numerics", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fusedamp numerics: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_log_without_records(capsys, tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("step,numerics/scale\n")
    assert cli.main(["numerics", str(path)]) == 0
    assert capsys.readouterr().out == "No records: the file has no line after its first.\n"
