"""Sphinx reads the pages in docs/, and those in other folders to which these link: the source folder is the
checkout.

`make docs` builds into build/docs. The API pages import the package, so build it first.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if any((ROOT / "python" / "fusedamp").glob("_C.*")):  # built in place; otherwise it is installed
    sys.path.insert(0, str(ROOT / "python"))

import fusedamp  # noqa: E402

project = "fusedamp"
author = "The fusedamp authors"
copyright = author
version = release = fusedamp.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
root_doc = "docs/index"
# Results, changelog and guides for contributors are pages too: relative links work here as on GitHub.
include_patterns = [
    "docs/**.md",
    "docs/**.rst",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "csrc/README.md",
    "python/README.md",
]
exclude_patterns = ["build", "**/.*"]

html_theme = "furo"
html_title = f"fusedamp {version}"
html_show_sphinx = False
html_copy_source = False
pygments_style = "tango"  # colors removed and added lines of a diff
pygments_dark_style = "monokai"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures show them
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False  # else "lr, betas: as in torch" is repeated for each


SECTION = re.compile(r"^(Returns|Raises|State|Cost|Source): (.*)")


def _fields(app, what, name, obj, options, lines):
    """Make a field of each section that starts on its heading's line ("Cost: one read of the gradients"):
    napoleon takes these for paragraphs."""
    found: list[str] = []
    inside = False
    for line in lines:
        if match := SECTION.match(line):
            found += [] if inside else [""]
            found.append(f":{match[1]}: {match[2]}")
            inside = True
            continue
        if inside and line and not line.startswith(" "):
            found.append("")
            inside = False
        inside = inside and bool(line)
        found.append(line)
    lines[:] = found


def _to_index(app, exception):
    """The pages are in build/docs/docs: lead there from the top."""
    if exception is None and app.builder.name == "html":
        refresh = '<meta http-equiv="refresh" content="0; url=docs/index.html">'
        page = f'<!doctype html><meta charset="utf-8">{refresh}<a href="docs/index.html">fusedamp</a>\n'
        Path(app.outdir, "index.html").write_text(page)


def setup(app):
    app.connect("autodoc-process-docstring", _fields, priority=100)  # before napoleon
    app.connect("build-finished", _to_index)
    return {"parallel_read_safe": True}
