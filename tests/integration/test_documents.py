"""The Python blocks of README.md and docs/ run, and the pages build without a warning.

The blocks of a page share a namespace. `<!-- skip: next "reason" -->` skips the next block, and
`<!-- skip: next if(condition, reason="...") -->` does if the condition holds.
"""

import contextlib
import re
import subprocess
import sys
import unittest
from pathlib import Path

import pytest

sybil = pytest.importorskip("sybil")
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()]
PAGES = [page for page in PAGES if "```python" in page.read_text()]
BLOCKS = sybil.Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT), patterns=["**/*.md"])
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not (ROOT / "docs" / "conf.py").exists(), reason="not a source checkout"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in BLOCKS.parse(page).examples():
        with contextlib.suppress(unittest.SkipTest):
            example.evaluate()  # failures name page and line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_skips_have_a_reason(page):
    for comment in re.findall(r"<!--\s*(skip:.*?)-->", page.read_text()):
        assert re.fullmatch(r'skip: next (?:"\w.*"|if\(.*, reason="\w.*"\)) ', comment), comment


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_fits_its_box(page):
    """The box of the site shows 90 characters."""
    blocks = re.findall(r"^```\w.*?^```", page.read_text(), re.S | re.M)
    assert not [line for block in blocks for line in block.splitlines() if len(line) > 90]


def test_each_optimizer_has_an_api_entry():
    import fusedamp

    text = (ROOT / "docs" / "api" / "optim.rst").read_text()
    entries = re.findall(r"^\.\. auto(?:class|function):: (?:fusedamp\.optim\.)?(\w+)$", text, re.M)
    assert set(entries) == set(fusedamp.optim.__all__)


@pytest.mark.slow
def test_pages_build_without_a_warning(tmp_path):
    for needed in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(needed)
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(tmp_path)]
    made = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "docs" / "index.html").exists()
