"""Builds in place, for this GPU only."""

from __future__ import annotations

import os
import shutil
import sys

from ..place import Place
from ..process import ROOT, execute

IMPORT = """
import fusedamp, json
from fusedamp.ops import library
from fusedamp.commands import cli
assert library.HAS_CUDA_OPS, "built without CUDA kernels"
print(fusedamp.__file__)
"""


def run(place: Place) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    place.note("command", " ".join(["python", *command[1:]]))
    place.note("arch_list", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    place.note("nvcc", shutil.which("nvcc") or "not on the PATH")
    done = execute(
        [*command, *place.sized([], ["--help"])],
        place.seconds_left - 20,
        {"FUSEDAMP_CUDA": place.sized("1", "auto")},
    )
    place.note("build_seconds", round(done.seconds, 1))
    place.check("build", not done.verdict, f"{done.verdict}\n{done.tail}")
    if done.verdict:
        return
    if not place.rehearse:
        objects = sorted((ROOT / "python/fusedamp").glob("*.so"))
        place.note("objects", {path.name: path.stat().st_size for path in objects})
        done = execute([sys.executable, "-c", IMPORT], 60)
        place.check("import", not done.verdict, f"{done.verdict}\n{done.tail}")
        place.check("imported from here", str(ROOT) in done.output, done.tail)
