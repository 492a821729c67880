"""The sdist has all that is tracked but CI; the newest version of the changelog is that of the package."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import fusedamp
import pytest

ROOT = Path(__file__).resolve().parents[2]
CI = (".ci/", ".github/")
MADE = ("PKG-INFO", "setup.cfg", "python/fusedamp.egg-info/")


def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).exists()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_the_sdist_has_what_is_tracked(tmp_path):
    for name in tracked():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", "dist"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (path,) = (tmp_path / "dist").iterdir()
    assert path.name == f"fusedamp-{fusedamp.__version__}.tar.gz"
    with tarfile.open(path) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    assert {n for n in names if not n.startswith(MADE)} == {n for n in tracked() if not n.startswith(CI)}


@pytest.mark.skipif(not (ROOT / "CHANGELOG.md").exists(), reason="not a source checkout")
def test_the_changelog_has_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == fusedamp.__version__
