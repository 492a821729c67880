"""The checks of `make release` find what they look for; `make release` itself runs them on real files."""

import runpy
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci/release.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not a clone")
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
MODULE = f"fusedamp/_C.cpython-{TAG[2:]}-x86_64-linux-gnu.so"
OBJECTS = (MODULE, "fusedamp/libfusedamp_cpu.so", "fusedamp/libfusedamp_cuda.so")
ORIGIN = b"another constant" + b"0.1.0, sources 0123456789ab\0"


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return runpy.run_path(str(SCRIPT), run_name="release")


def test_an_sdist_has_the_same_bytes_each_time(release, tmp_path):
    made = []
    for n, names in enumerate(["ab", "ba"]):
        (folder := tmp_path / str(n)).mkdir()
        path = folder / "x.tar.gz"
        with tarfile.open(path, "w:gz") as file:
            for name in names:
                (folder / name).write_text(f"content of {name}")
                (folder / name).chmod(0o755 if name == "a" else 0o600 + n * 0o40)
                file.add(folder / name, f"x/{name}")
        release["settle"](path, 10**9)
        made.append(path.read_bytes())
    assert made[0] == made[1]
    with tarfile.open(path) as file:
        assert [(m.name, m.mode, m.mtime) for m in file] == [("x/a", 0o755, 10**9), ("x/b", 0o644, 10**9)]


@pytest.mark.parametrize(
    "name", ["PyList_New", "_Py_Dealloc", "aoti_torch_empty", "torch_abi", "__tls_get_addr"]
)
def test_symbols_without_a_version(name, release):
    assert release["UNVERSIONED"].fullmatch(name)


@pytest.mark.parametrize("name", ["arc4random", "fstat64", "atexit", "_ZN2at4mainEv"])
def test_symbols_of_a_newer_system(name, release):
    assert not release["UNVERSIONED"].fullmatch(name)


@pytest.mark.parametrize("tagged", [True, False])
@pytest.mark.parametrize(
    ("cuda", "architectures", "changed", "complete"),
    [("1", "", "", True), ("0", "", "", False), ("1", "9.0", "", False), ("1", "", " M setup.py", False)],
)
def test_a_tag_needs_what_a_rehearsal_names(
    tagged, cuda, architectures, changed, complete, release, monkeypatch, capsys
):
    """All CUDA architectures; a changed file stops both."""
    said = {"tag": "v1.0" if tagged else "", "status": changed, "log": "1790000000"}
    scope = release["check_commit"].__globals__
    monkeypatch.setitem(scope, "output", lambda *command, **options: said[command[1]])
    monkeypatch.setitem(scope, "VERSION", "1.0")
    monkeypatch.setitem(scope["BUILD"], "FUSEDAMP_CUDA", cuda)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    heading = "1.0 (2030-01-02)" if tagged else "1.0 (unreleased)"
    monkeypatch.setattr(scope["matrix"], "changes", lambda text: (heading, ""))
    if changed or (tagged and not complete):
        with pytest.raises(SystemExit, match="setup.py" if changed else "unset FUSEDAMP_CUDA"):
            release["check_commit"]()
    else:
        assert release["check_commit"]() == (tagged, "1790000000")
        assert ("NOT YET" in capsys.readouterr().out) == (not complete)


CASES = {
    "complete": ({}, ""),
    "a foreign object": ({"fusedamp/libfusedamp_old.so": ORIGIN}, "libfusedamp_old"),
    "another Python": ({"fusedamp/_C.cpython-39-x86_64-linux-gnu.so": ORIGIN}, "cpython-39"),
    "a stale object": ({OBJECTS[2]: ORIGIN.replace(b"ab", b"cd")}, "0123456789cd"),
    "no CUDA object": ({OBJECTS[2]: None}, "libfusedamp_cuda"),
    "a forgotten file": ({"fusedamp/ops/a.py": None}, "fusedamp/ops/a.py"),
    "a removed file": ({"fusedamp/gone.py": b""}, "fusedamp/gone.py"),
    "a forgotten header": ({"fusedamp/include/fusedamp/a.h": None}, "fusedamp/include/fusedamp/a.h"),
    "a forgotten class": (
        {"fusedamp/include/fusedamp/source/a.cpp": None},
        "fusedamp/include/fusedamp/source/a.cpp",
    ),
    "a removed header": ({"fusedamp/include/fusedamp/gone.h": b""}, "fusedamp/include/fusedamp/gone.h"),
    "no CMake package": ({"fusedamp/cmake/a.cmake": None}, "fusedamp/cmake/a.cmake"),
}


@pytest.mark.parametrize("name", CASES)
def test_contents_of_the_wheel(name, release, tmp_path, capsys):
    changed, problem = CASES[name]
    names = (
        "__init__.py",
        "ops/a.py",
        "py.typed",
        "cmake/a.cmake",
        "include/fusedamp/a.h",
        "include/fusedamp/source/a.cpp",
    )
    files = dict.fromkeys((f"fusedamp/{name}" for name in names), b"")
    wheel, sdist = (
        tmp_path / f"fusedamp-0.1.0-{TAG}-{TAG}-linux_x86_64.whl",
        tmp_path / "fusedamp-0.1.0.tar.gz",
    )
    with ZipFile(wheel, "w") as file:
        file.writestr("fusedamp/", b"")  # auditwheel adds folders
        for path, content in (files | dict.fromkeys(OBJECTS, ORIGIN) | changed).items():
            if content is not None:
                file.writestr(path, content)
    with tarfile.open(sdist, "w:gz") as file:
        for path in files:
            source = path.replace("fusedamp", "csrc", 1) if "/include/" in path else f"python/{path}"
            file.addfile(tarfile.TarInfo(f"fusedamp-0.1.0/{source}"))
        file.addfile(tarfile.TarInfo("fusedamp-0.1.0/csrc/ops/ops.h"))  # not for programs
    if not problem:
        release["check_contents"](wheel, sdist, cuda=True)
        return
    with pytest.raises(SystemExit, match=problem):
        release["check_contents"](wheel, sdist, cuda=True)
    assert "FAILED" in capsys.readouterr().out
