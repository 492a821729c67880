"""The Python blocks of docs/ run: the blocks of a page share a namespace, and assert what the text says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()]
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not PAGES, reason="not a source checkout"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page):
    text = page.read_text()
    names = {}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)
