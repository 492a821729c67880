"""examples/cpp and docs/cpp.md: programs are built as the page says, and do what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cmake_package import CMAKE, CXX, PACKAGE

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE, PAGE = ROOT / "examples/cpp", ROOT / "docs/cpp.md"
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not EXAMPLE.is_dir(), reason="not a source checkout"),
    pytest.mark.skipif(not CMAKE or not CXX, reason="needs CMake and a C++ compiler"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.S | re.M)


def run(folder: Path, *command: object) -> str:
    """Run a command on one thread; return what it printed. Without an installed package CMake must be told
    where torch is."""
    paths = [str(Path(tool).parent) for tool in (sys.executable, CMAKE)] + [os.environ["PATH"]]
    variables = {
        "PATH": ":".join(paths),
        "PYTHONPATH": str(PACKAGE.parent),
        "CMAKE_PREFIX_PATH": torch.utils.cmake_prefix_path,
        "CXX": CXX,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*map(str, command)], cwd=folder, capture_output=True, text=True, env=os.environ | variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_as_on_the_page(folder: Path) -> None:
    """Run the page's commands but for the last, which runs the program."""
    (commands,) = blocks("bash")
    *lines, last = commands.replace("Release", "Debug").splitlines()
    assert last == "./build/train"
    run(folder, "bash", "-ec", "\n".join(lines))


def assert_same(a, b, where="") -> None:
    """All entries of two checkpoints are equal, in all bits."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def test_the_page(tmp_path):
    """All blocks of C++ are one program, which learns."""
    (cmake,), (first, *pieces) = blocks("cmake"), blocks("cpp")
    start, end = first.rstrip().rsplit("}", 1)
    assert not end
    (tmp_path / "CMakeLists.txt").write_text(cmake)
    (tmp_path / "train.cpp").write_text("\n".join([start, *pieces, "}\n"]))
    build_as_on_the_page(tmp_path)
    printed = run(tmp_path, "./build/train")
    loss, scale = re.search(r"^loss (\S+), scale (\S+)$", printed, re.M).groups()
    assert float(loss) < 0.05
    assert 2**12 <= float(scale) <= 2**16
    assert "[AdamW] lr is -1.0; expected a finite number >= 0" in printed
    assert (tmp_path / "training.pt").exists()


def test_train(tmp_path):
    """The example learns and resumes with the same bits; so does Python from its checkpoint, and it from
    Python's."""
    pytest.importorskip("sklearn")
    for source in EXAMPLE.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    assert len((tmp_path / "train.cpp").read_text().splitlines()) < 120
    build_as_on_the_page(tmp_path)

    text = re.sub(r"^// ?", "", (tmp_path / "train.cpp").read_text(), flags=re.M)
    (data,) = re.findall(r'^ *python -c "(.*?)"$', text, re.S | re.M)
    run(tmp_path, sys.executable, "-c", data)

    printed = run(tmp_path, "build/train", 4, "whole.pt")
    pattern = r"epoch (\d+)  loss (\S+)  accuracy (\S+)  scale (\d+)  skipped (\d+)"
    epochs = [tuple(map(float, found)) for found in re.findall(pattern, printed)]
    number, losses, accuracies, scales, skipped = zip(*epochs, strict=True)
    assert number == (1, 2, 3, 4)
    assert losses[0] > 1
    assert losses[-1] < 0.2
    assert accuracies[-1] > 0.85
    assert sum(skipped) > 0  # the scale grew until a step overflowed
    assert scales[-1] > 2**16

    first = run(tmp_path, "build/train", 2, "checkpoint.pt")
    assert printed.startswith(first)
    block = blocks("python")[-1]
    run(tmp_path, sys.executable, "-c", block)
    last = run(tmp_path, "build/train", 1, "checkpoint.pt")
    assert printed.endswith(last)
    assert last.startswith("epoch 4 ")
    whole, pieced = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "checkpoint.pt"))
    for name in ("foreach", "fused", "capturable", "differentiable"):  # without effect, and Python's only
        assert not pieced["optimizer"]["param_groups"][0].pop(name)
    assert_same(whole, pieced)
