"""The laws of the house: includes, names, file sizes, compiler flags for floats, and consistent lists."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from fusedamp import ops
from fusedamp.ops import library

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("include", "math", "engine", "ops", "python")  # each may include itself and those before it
TABLES = (ROOT / "csrc/include/fusedamp/rows.h",)  # what programs share with the engines, without torch
CPP = {".h", ".cuh", ".cpp", ".cu", ".inc", ".def"}
CODE = CPP | {".py", ".pyi", ".toml", ".cmake", ".md", ".sh", ".yml", ".yaml"}


def files(*folders: str, kinds: set[str] = CODE) -> list[Path]:
    found = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    return sorted(p for p in found if "build" not in p.relative_to(ROOT).parts)


SOURCES = files("csrc", "python", "tests", "benchmarks", "docs")
CSRC = files("csrc", kinds=CODE - {".md"})
pytestmark = pytest.mark.skipif(not CSRC, reason="not a source checkout")


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


@pytest.mark.parametrize("path", CSRC, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_never_point_back(path):
    """math <- engine <- ops <- python. Torch stops at the ops' door; math has no CUDA headers. Headers for
    programs include torch and each other; of them the project includes only tables, and the version."""
    room = path.relative_to(ROOT / "csrc").parts[0]
    for include in includes(path):
        target = (path.parent / include).resolve()
        if target.is_relative_to(ROOT / "csrc") and target.exists():
            other = target.relative_to(ROOT / "csrc").parts[0]
            assert ROOMS.index(other) <= ROOMS.index(room), f"{room} includes {include}"
            assert room != "python" or other in ("python", "include"), "the bindings touch no engine"
            if other == "include" and room != "include":
                assert target in TABLES or path.name == "version.cpp", f"{path.name} includes {include}"
        if room in ("math", "engine") or path in TABLES:
            assert not re.match(r"torch/|ATen/|c10/|pybind11/|Python\.h", include), include
        if room == "math":
            assert not re.match(r"cuda|cub/|thrust/", include), include


def test_kernels_share_no_inline_function():
    """The linker could use a standard function compiled for AVX-512 for all targets."""
    todo, seen = [ROOT / "csrc/engine/cpu/kernels.cpp"], set()
    while todo:
        path = todo.pop()
        seen.add(path)
        for include in includes(path):
            target = (path.parent / include).resolve()
            if target.exists():
                todo += [target] if target not in seen else []
            else:
                assert include in ("stdint.h", "immintrin.h"), f"{path.name} includes <{include}>"


def test_python_reaches_the_ops_through_ops_py_only():
    """Only the modules of fusedamp.ops call torch.ops.fusedamp; other code calls fusedamp.ops."""
    for path in files("python", kinds={".py"}):
        if "torch.ops.fusedamp" in path.read_text():
            assert path.parent == ROOT / "python/fusedamp/ops", path


def test_floats_are_honest():
    """Fast-math deletes isfinite, our product; contraction gives every compiler bits of its own."""
    builds = [ROOT / name for name in ("setup.py", "pyproject.toml", "Makefile")]
    builds += [path for path in sorted((ROOT / ".ci").glob("*")) if path.is_file()]
    builds += files("tests/emulation", "csrc", "benchmarks", kinds=CODE - {".md"})
    forbidden = re.compile(
        r"-f(?:associative|finite|unsafe|reciprocal)-math|-Ofast|-ffast-math|--?use_fast_math|--fmad=true|"
        r"-ffp-contract=(?:fast|on)|#pragma STDC FP_CONTRACT ON"
    )
    for path in builds:
        if path.exists():
            assert not forbidden.search(path.read_text()), path
    setup = (ROOT / "setup.py").read_text()
    assert '"-ffp-contract=off"' in setup
    assert '"--fmad=false"' in setup


def test_names():
    forbidden = re.compile(r"utils?|helpers?|misc|common|.*_v\d|.*_mp|kernel\d|state\d")
    for path in SOURCES:
        assert not any(forbidden.fullmatch(part) for part in (*path.parts[:-1], path.stem)), path
    words = re.compile(r"\b(?:kernel\d|state\d|(?!nvml)\w+_v2|TODO|FIXME|XXX)\b")
    for path in files("csrc", "python"):
        assert not words.search(path.read_text()), path


def test_files_are_short():
    code = [p for p in SOURCES if p.suffix not in (".md", ".toml")]
    assert not {str(p): n for p in code if (n := len(p.read_text().splitlines())) > 400}


def listed() -> list[str]:
    """Ops of the one list of optimizers."""
    text = (ROOT / "csrc/math/optimizers.def").read_text()
    return [f"{op}_" for op in re.findall(r"^FUSEDAMP_OP\((\w+),", text, re.M)]


def test_lists_of_optimizers_agree():
    text = (ROOT / "csrc/math/optimizers.def").read_text()
    rules = re.findall(r"^FUSEDAMP_RULE\((\w+), \w+\)", text, re.M)
    assert {f"{op}_" for op in rules} == set(listed()) == set(library.STEP_OPS)
    assert set(listed()) <= set(ops.__all__)
    assert all(hasattr(torch.ops.fusedamp, op) for op in listed())


@pytest.mark.parametrize("name", [n for n in ops.__all__ if n.islower()])
def test_docstrings_of_ops(name):
    """Each documents shapes, dtypes, mutation, errors, cost and source."""
    doc = getattr(ops, name).__doc__
    for part in ("Args:", "Raises: ValueError", "Cost:", "no host sync"):
        assert part in doc, part
    assert "rewritten" in doc or "read only" in doc
    assert "fp32" in doc
    assert "Source: " in doc or name == "grad_stats"
    for parameter in inspect.signature(getattr(ops, name)).parameters.values():
        assert parameter.name in doc or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD, parameter
