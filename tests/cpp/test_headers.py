"""Each file of the C++ API compiles alone, and all in each standard by each compiler, without a warning."""

import re
import shutil

import pytest
from cmake_package import CXX, HEADERS
from cpp_program import CLASSES, STANDARD, compile_

NAMES = sorted(str(path.relative_to(HEADERS)) for path in HEADERS.rglob("*.*"))
COMPILERS = [name for name in ("g++", "clang++", "clang++-14", "clang++-19") if shutil.which(name)]
pytestmark = pytest.mark.skipif(not CXX, reason="needs a C++ compiler")  # 10 s each


def complaint(tmp_path, text, **options):
    """What a compiler says of a program."""
    (tmp_path / "program.cpp").write_text(text)
    return compile_("-fsyntax-only", tmp_path / "program.cpp", **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_alone(name, tmp_path):
    """It includes what it uses."""
    assert complaint(tmp_path, f"#include <{name}>\n") == ""


@pytest.mark.parametrize("standard", [standard for standard in (17, 20) if standard >= STANDARD])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compilers(compiler, standard, tmp_path):
    text = "".join(f"#include <{name}>\n" for name in ("fusedamp/fusedamp.h", *CLASSES))
    assert complaint(tmp_path, text, standard=standard, compiler=compiler) == ""


def test_optimizers_that_only_python_has(tmp_path):
    """The compiler names them; a program does not get as far as the linker."""
    lines = "".join(f"fusedamp::optim::{name} {name}(params, 0.1);\n" for name in ("Adafactor", "Muon"))
    text = f"#include <fusedamp/optim.h>\nvoid f(std::vector<at::Tensor> params) {{\n{lines}}}\n"
    said = complaint(tmp_path, text)
    for name in ("Adafactor", "Muon"):
        wanted = f"fusedamp has {name} in Python only; use AdamW, Lion or LAMB in C++"
        assert re.search(re.escape(wanted), said), said
