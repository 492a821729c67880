"""The program of the C++ tests, one for each run of the tests."""

import pytest
from cmake_package import CXX
from cpp_program import Program, built


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The running program; its ``run`` carries out a list of commands."""
    if not CXX:
        pytest.skip("needs a C++ compiler")
    own = tmp_path_factory.getbasetemp()
    path = built((own.parent if "popen-gw" in own.name else own) / "cpp-program")
    program = Program(path, tmp_path_factory.mktemp("cpp-cases"))
    yield program
    program.close()
