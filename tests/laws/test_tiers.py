"""The tiers of tests: every file belongs to one, and CI runs each in full."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tiers import ONCE, SLOW, TESTS

ROOT = TESTS.parent
FILES = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
# Folders whose files never meet torch, but for those named here.
WITHOUT_TORCH = ("benchmarks", "build", "emulation", "laws")
MEET_TORCH = {
    "build/test_cuda_registration.py": "the CUDA object loads in a torch with CUDA",
    "emulation/test_nvidia_library.py": "cuBLASLt and its header come with a torch with CUDA",
}


def imports_torch(path: Path) -> bool:
    """Whether a file imports torch or fusedamp, anywhere."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return any(name.partition(".")[0] in ("torch", "fusedamp") for name in names)


def test_the_lists_are_complete():
    """A file that never meets torch is listed, and a listed file exists."""
    assert set(ONCE) | set(SLOW) | set(MEET_TORCH) <= FILES
    folders = {name for name in FILES if name.startswith(tuple(f"{f}/" for f in WITHOUT_TORCH))}
    assert folders - set(MEET_TORCH) <= set(ONCE)
    # The documents' blocks import what they use when they run.
    without = (
        {n for n in FILES if not imports_torch(TESTS / n)}
        - {"integration/test_documents.py"}
        - set(MEET_TORCH)
    )
    assert without <= set(ONCE)


def test_pytest_finds_every_folder(pytestconfig):
    """Its list of folders to pass over has common names, such as build."""
    folders = {part for name in FILES for part in Path(name).parts[:-1]}
    skipped = pytestconfig.getini("norecursedirs")
    assert not [name for name in folders if any(fnmatch(name, pattern) for pattern in skipped)]


def test_the_lists_are_sorted():
    assert list(ONCE) == sorted(set(ONCE))
    assert list(SLOW) == sorted(set(SLOW))


@pytest.mark.skipif(not (ROOT / ".ci/run").exists(), reason="not a clone")
def test_ci_leaves_nothing_out():
    """One torch runs all tests; only the second leaves out those of ``ONCE``."""
    text = (ROOT / ".ci/run").read_text()
    assert 'tests=test some="not once"' in text
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("make $tests")]
    assert lines == ['make $tests INSTALL="$wheel"', """make $tests INSTALL="$wheel" ARGS="-m '$some'\""""]


def test_marks_are_set(marks_by_file):
    for name, marks in marks_by_file.items():
        assert ("once" in marks) == (name in ONCE), name


@pytest.fixture
def marks_by_file(request):
    """The marks of the tests of this session, by file."""
    marks: dict[str, set[str]] = {}
    for item in request.session.items:
        if item.path.is_relative_to(TESTS):
            name = item.path.relative_to(TESTS).as_posix()
            marks.setdefault(name, set()).update(mark.name for mark in item.iter_markers())
    return marks
