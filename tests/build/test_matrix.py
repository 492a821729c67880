"""The matrix of a release: which cells run, what they are called, and which versions README may name."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci/matrix.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not a clone")
README = "Linux, Python 3.11 to 3.12,\ntorch 2.11 to 2.13. Try it."


@pytest.fixture
def matrix(tmp_path):
    """The script's functions, with a dist/ of their own that has the files of Python 3.11."""
    functions = runpy.run_path(str(SCRIPT), run_name="matrix")
    variables = functions["record"].__globals__
    variables["DIST"] = tmp_path
    version = functions["VERSION"]
    for name in (f"fusedamp-{version}.tar.gz", f"fusedamp-{version}-cp311-cp311-linux.whl"):
        (tmp_path / name).write_text(name)
    return variables


def row(python, torch, tests="712 passed in 9 s"):
    return {"Python": python, "torch": torch, "system": "glibc 2.36", "tests": tests}


def test_cells(matrix, capsys):
    """Each Python with the newest torch, and the oldest Python with each torch."""
    matrix["try_out"] = lambda python, torch: row(python, torch) | {"wheels": matrix["wheels"]()}
    rows = matrix["run_cells"](["3.11", "3.12", "3.13"], ["2.11.0", "2.15.0"])
    cells = [("3.11", "2.11.0"), ("3.11", "2.15.0"), ("3.12", "2.15.0"), ("3.13", "2.15.0")]
    assert [(row["Python"], row["torch"]) for row in rows] == cells
    assert capsys.readouterr().out.count("712 passed") == 4


def test_runs_add_up_and_other_files_are_dropped(matrix, tmp_path):
    def record(*cells):
        return matrix["record"]([row(*cell) | {"wheels": matrix["wheels"]()} for cell in cells])

    record(("3.11", "2.11.0", "FAILED"), ("3.9", "2.11.0"))
    rows = record(("3.11", "2.11.0"), ("3.11", "2.13.0"))
    assert [(row["Python"], row["torch"], row["tests"][:3]) for row in rows] == [
        ("3.9", "2.11.0", "712"),
        ("3.11", "2.11.0", "712"),
        ("3.11", "2.13.0", "712"),
    ]
    (notes,) = tmp_path.glob("notes-*.md")
    assert notes.read_text().endswith("| 3.11 | 2.13.0 | glibc 2.36 | 712 passed in 9 s |\n")
    next(tmp_path.glob("*.whl")).write_text("another build")
    assert len(record(("3.11", "2.15.0"))) == 1
    assert len(json.loads((tmp_path / "matrix.json").read_text())) == 1


@pytest.mark.parametrize(
    ("python", "here", "why"),
    [
        ("3.11", False, "not run: no python3.11 here"),
        ("3.12", True, "not run: dist/ has no wheel for Python 3.12"),
        ("3.11", True, "not run: no torch 2.11.0 for Python 3.11"),
    ],
)
def test_cells_that_cannot_run_are_named(python, here, why, matrix):
    def no_such_torch(*cell):
        raise matrix["Failed"]("ERROR: No matching distribution found for torch==2.11.0")

    matrix["find_python"] = lambda version: f"/usr/bin/python{version}" if here else None
    matrix["try_cell"] = no_such_torch
    assert matrix["try_out"](python, "2.11.0")["tests"] == why


def test_a_failing_cell_is_one(matrix, capsys):
    def fail(*cell):
        raise matrix["Failed"]("make quick failed")

    matrix["find_python"], matrix["try_cell"] = str, fail
    assert matrix["try_out"]("3.11", "2.11.0")["tests"] == "FAILED"
    assert "make quick failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cells", "missing"),
    [
        ([("3.11", "2.11.0"), ("3.11", "2.12.1"), ("3.12", "2.13.0")], ""),
        ([("3.11", "2.11.0"), ("3.12", "2.13.0")], "torch 2.12"),
        ([("3.11", "2.11.0"), ("3.11", "2.12.1"), ("3.12", "2.13.0", "FAILED")], "Python 3.12, torch 2.13"),
        (
            [("3.11", "2.11.0"), ("3.11", "2.12.1"), ("3.12", "2.13.0", "not run: no torch")],
            "Python 3.12, torch 2.13",
        ),
    ],
)
def test_versions_of_readme(cells, missing, matrix):
    """Each that it names has passed in some cell."""
    assert matrix["unproven"](README, [row(*cell) for cell in cells]) == missing


def test_readme_names_both_ends(matrix):
    assert "README has no" in matrix["unproven"]("Python 3.11 or later, torch 2.11 to 2.14", [])


def test_newest_changes(matrix):
    text = "# Changelog\n\n## 0.2.0 (2030-01-02)\n\nMain.\n\n- One.\n\n## 0.1.0\n\n- Old.\n"
    assert matrix["changes"](text) == ("0.2.0 (2030-01-02)", "Main.\n\n- One.")
