"""Makes the files of a release in dist/ and checks them: `make release`. It uploads nothing.

The sdist is made from `git archive`, and the wheel from the sdist, so that nothing of a checkout that was
built before can travel along. One run makes one wheel, for the Python that runs it; run it under every Python
of the release. It stops at the first check that fails. On a commit without the tag of its version it is a
rehearsal: what is missing for a release is named, and is not an error.

Needs git, binutils, and the packages auditwheel, build, torch and twine.
"""

import argparse
import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "manylinux_2_28_x86_64"
TORCH_LIBRARIES = ("libtorch_cpu.so", "libtorch_cuda.so")
# Symbols without a version: of Python, of torch's C interface, of the loader. Others would be of a newer
# system than the platform's, and no audit shows them.
UNVERSIONED = re.compile(r"_?Py[A-Z_]\w*|(aoti_)?torch_\w+|__tls_get_addr")
START = time.monotonic()


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


def changes(changelog: str) -> tuple[str, str]:
    """Return the heading and the text of the newest section."""
    found = re.search(r"^## (.+?)\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    return found[1], found[2].strip()


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


def make_wheel(sdist: Path, folder: Path) -> Path:
    """pip unpacks the sdist into an empty folder."""
    output(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-cache-dir", "-w", folder, sdist)
    (path,) = folder.glob("*.whl")
    return path


def contents_of(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def check_contents(wheel: Path, sdist: Path, cuda: bool) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    module = f"fusedamp/_C.cpython-{tag[2:]}-x86_64-linux-gnu.so"
    wanted = {module, "fusedamp/libfusedamp_cpu.so"} | ({"fusedamp/libfusedamp_cuda.so"} if cuda else set())
    contents = contents_of(wheel)
    objects = {name for name in contents if name.endswith(".so")}
    need(objects == wanted, f"wheel: {len(wanted)} objects", f"found {objects}; expected {wanted}")
    with tarfile.open(sdist) as file:
        inside = {name.partition("/")[2] for name in file.getnames()}
    python = {name for name in contents if name.startswith("fusedamp/") and name not in objects}
    source = {
        n.removeprefix("python/") for n in inside if re.match(r"python/fusedamp/.*(\.py|py\.typed)$", n)
    }
    need(python == source, "wheel: Python files of the sdist", f"these differ: {sorted(python ^ source)}")
    pattern = re.escape(wheel.name.split("-")[1]).encode() + rb", sources [0-9a-f]{12}"
    origins = [set(re.findall(pattern, contents[name])) for name in objects]
    need(
        all(len(found) == 1 for found in origins) and len(set.union(*origins)) == 1,
        "wheel: objects of one source",
        f"found {origins}",
    )
    need(f"-{tag}-{tag}-" in wheel.name, f"wheel: tag of {tag}", f"the wheel is {wheel.name}")


def check_symbols(wheel: Path, folder: Path) -> None:
    with ZipFile(wheel) as file:
        file.extractall(folder)
    for path in sorted(folder.rglob("*.so")):
        exported = [line.split()[1:] for line in output("nm", "-D", "--defined-only", path).splitlines()]
        strong = {name for kind, name in exported if kind not in "WVu"}
        need(strong <= {"PyInit__C"}, f"{path.name.partition('.')[0]}: exports", f"it exports {strong}")
        undefined = [line.split() for line in output("nm", "-D", "--undefined-only", path).splitlines()]
        wild = {n for kind, n in undefined if kind == "U" and "@" not in n and not UNVERSIONED.fullmatch(n)}
        need(not wild, f"{path.name.partition('.')[0]}: imports", f"symbols without a version: {wild}")


def repair(wheel: Path, folder: Path, tagged: bool) -> Path:
    """Return the wheel with the platform's tag; a rehearsal goes on with the wheel as it is."""
    audit = output(sys.executable, "-m", "auditwheel", "show", wheel)
    exclude = [word for library in TORCH_LIBRARIES for word in ("--exclude", library)]
    command = ["-m", "auditwheel", "repair", "--plat", PLATFORM, *exclude, "-w", folder, wheel]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    closest = re.search(r'"(manylinux\w+)"', audit)
    why = f"symbols of {closest[1] if closest else 'no manylinux'}; build in the image of {PLATFORM}"
    need(done.returncode == 0, f"tag {PLATFORM}", why, fatal=tagged)
    return next(folder.glob("*.whl")) if done.returncode == 0 else wheel


def try_out(wheel: Path, sdist: Path, folder: Path, torch: str) -> None:
    """Install the file in a fresh environment, and run info, the demo and the quick tests of the sdist."""
    venv.create(folder / "fresh", with_pip=True)
    python = folder / "fresh/bin/python"
    # make hands its own variables down, such as ARGS.
    mine = ("PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS", "INSTALL", "PYTHON", "TORCH", "VENV")
    clean = {k: v for k, v in os.environ.items() if k not in mine}
    clean |= {"VIRTUAL_ENV": str(folder / "fresh"), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    output(python, "-m", "pip", "install", "-q", torch, cwd=folder, env=clean)
    output(python, "-m", "pip", "install", "-q", "--only-binary", "fusedamp", f"{wheel}[demo]", env=clean)
    say("installed in a fresh environment", torch)
    print(output(python, "-m", "fusedamp", "info", cwd=folder, env=clean))
    demo = ["demo", "--quick", "--task", "digits", "--out", folder / "demo.png"]
    output(python, "-m", "fusedamp", *demo, cwd=folder, env=clean)
    say("demo --quick --task digits")
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    print(output("make", "quick", f"INSTALL={wheel}", cwd=source, env=clean).splitlines()[-1])
    say("make quick, of the sdist, on the wheel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", help="the torch to install for the tests (default: the version here)")
    parser.add_argument("--twice", action="store_true", help="build again, and compare the bytes")
    options = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    heading, notes = changes((ROOT / "CHANGELOG.md").read_text())
    tagged = f"v{version}" in output("git", "tag", "--points-at", "HEAD", cwd=ROOT).split()
    os.environ["SOURCE_DATE_EPOCH"] = epoch = output("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()
    say("tag of the commit", f"v{version}" if tagged else f"none: a rehearsal of v{version}")
    changed = output("git", "status", "--porcelain", cwd=ROOT)
    need(not changed, "clean checkout", f"commit or remove:\n{changed}")
    wanted = (
        rf"{re.escape(version)}( \(unreleased\))?" if not tagged else rf"{re.escape(version)}( \(\d.*\))?"
    )
    need(
        re.fullmatch(wanted, heading), f"newest changes: {version}", f"the changelog's heading is {heading!r}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = make_sdist(folder, int(epoch))
        say("sdist", f"{sdist.stat().st_size / 1e6:.2f} MB")
        cuda = os.environ.get("FUSEDAMP_CUDA", "1")
        os.environ["FUSEDAMP_CUDA"] = cuda
        wheel = make_wheel(sdist, folder / "wheel")
        say(
            "wheel from the sdist",
            f"{wheel.stat().st_size / 1e6:.2f} MB{'' if cuda == '1' else ', CPU only'}",
        )
        if options.twice:
            first, second = contents_of(wheel), contents_of(make_wheel(sdist, folder / "again"))
            different = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
            # nvcc names kernels by their folder, and pip's folder is another each time.
            different -= {name for name in different if "cuda" in name or name.endswith("/RECORD")}
            what = "the same bytes again, but for CUDA" if cuda == "1" else "the same bytes again"
            need(not different, what, f"these differ: {sorted(different)}")
        check_contents(wheel, sdist, cuda == "1")
        check_symbols(wheel, folder / "unpacked")
        wheel = repair(wheel, folder / "repaired", tagged)
        output(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
        say("twine check --strict")
        links = re.findall(r"\]\((?!https?://|#)([^)]*)\)", (ROOT / "README.md").read_text())
        why = f"the package's page would break {len(links)}, such as {links[:1]}"
        need(not links, "README: absolute links", why, fatal=tagged)
        here = metadata.version("torch").partition("+")[0]  # not its local label, such as +cpu
        try_out(wheel, sdist, folder, options.torch or f"torch=={here}")
        (ROOT / "dist").mkdir(exist_ok=True)
        for path in (sdist, wheel):
            shutil.copy(path, ROOT / "dist")
            print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  dist/{path.name}")
        (ROOT / f"dist/notes-{version}.md").write_text(notes + "\n")
    say("release" if tagged else "rehearsal", "complete; nothing was uploaded")


if __name__ == "__main__":
    main()
