"""The CMake package: which fusedamp and which torch a program gets, and what it says if it gets none.

Nothing is compiled here; test_package_programs.py builds programs.
"""

import re
import subprocess
from pathlib import Path

import fusedamp
import pytest
from cmake_package import CMAKE, CXX, check_out, configure, fake_torch, install

pytestmark = pytest.mark.skipif(not CMAKE or not CXX, reason="needs CMake and a C++ compiler")
FIND = "find_package(fusedamp CONFIG REQUIRED)\n"
# The target's properties, one a line.
SHOW = """
foreach(name INCLUDE_DIRECTORIES COMPILE_FEATURES LINK_LIBRARIES LINK_OPTIONS)
  get_target_property(value fusedamp::fusedamp INTERFACE_${name})
  message(STATUS "${name}=${value}")
endforeach()
"""


@pytest.fixture
def site(tmp_path):
    """A folder as site-packages, with fusedamp and a CPU torch."""
    install(tmp_path / "site")
    fake_torch(tmp_path / "site/torch")
    return tmp_path / "site"


def words(text: str) -> str:
    """Return a message of CMake, which breaks lines, with single blanks."""
    return " ".join(text.split())


def shown(done) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^-- ([A-Z_]+)=(.*)$", done.stdout, re.M))


def kept(files: list[str]) -> str:
    """Return the option that makes the linker keep libraries."""
    return f"LINKER:--push-state,--no-as-needed,{','.join(files)},--pop-state"


def use(site: Path, text: str = FIND + SHOW, *options: str, **variables: str):
    """Configure a program that has only been told where fusedamp is."""
    return configure(
        site.parent / "program", text, f"-Dfusedamp_DIR={site}/fusedamp/cmake", *options, **variables
    )


def refused(done) -> str:
    assert done.returncode == 1
    return words(done.stderr)


@pytest.mark.parametrize(
    ("version", "request_", "fits"),
    [
        ("0.1.0", "", True),
        ("0.1.0", "0.1", True),
        ("0.1.0", "0.1.0", True),
        ("0.1.0", "0.1.0 EXACT", True),
        ("0.1.4", "0.1.3", True),
        ("0.1.4", "0.1.3 EXACT", False),
        ("0.1.4", "0.1.5", False),
        ("0.1.4", "0.2", False),
        ("0.2.0", "0.1", False),  # before 1.0 a minor version may change everything
        ("0.2.0", "0", False),
        ("0.1.0", "1", False),
        ("1.4.2", "1.3", True),
        ("1.4.2", "1.5", False),
        ("1.4.2", "0.1", False),
        ("2.0.0", "1.4", False),
        ("10.0.0", "1.0", False),
        ("0.3.0", "0.1...0.4", True),
        ("0.3.0", "0.1...0.3", True),
        ("0.3.0", "0.1...<0.3", False),
        ("0.3.1", "0.1...0.3", False),
        ("0.3.0", "0.4...1.0", False),
        ("1.1.0", "0.3...2", True),
    ],
)
def test_versions(version, request_, fits, site):
    """A range of versions needs CMake 3.19."""
    said = subprocess.run([CMAKE, "--version"], capture_output=True, text=True).stdout
    if "..." in request_ and tuple(map(int, re.search(r"(\d+)\.(\d+)", said).groups())) < (3, 19):
        pytest.skip("needs CMake 3.19")
    header = site / "fusedamp/include/fusedamp/version.h"
    text, count = re.subn(r'(define FUSEDAMP_VERSION) ".*"', rf'\1 "{version}"', header.read_text())
    assert count == 1
    header.write_text(text)
    done = use(
        site,
        f"find_package(fusedamp {request_} CONFIG REQUIRED)\nmessage(STATUS VERSION=${{fusedamp_VERSION}})",
    )
    if fits:
        assert shown(done)["VERSION"] == version
    else:
        assert f"version: {version}" in refused(done)


def test_a_wheel_is_relocatable(site):
    """Headers, libraries and the torch next to it, by the folder's present name."""
    (moved := site.parent / "elsewhere").mkdir()
    site = site.rename(moved / "site-packages")
    target = shown(configure(moved / "program", FIND + SHOW, f"-DCMAKE_PREFIX_PATH={site}"))
    lib = site / "torch/lib"
    assert target["INCLUDE_DIRECTORIES"].split(";") == [
        f"{site}/fusedamp/include",
        f"{site}/torch/include",
        f"{site}/torch/include/torch/csrc/api/include",
    ]
    files = [
        f"{site}/fusedamp/libfusedamp_cpu.so",
        *(f"{lib}/lib{n}.so" for n in ("torch", "torch_cpu", "c10")),
    ]
    assert target["LINK_LIBRARIES"].split(";") == ["fusedamp_classes", *files]
    assert target["LINK_OPTIONS"] == kept(files)
    assert str(site.parent.parent / "site") not in str(target)


def test_a_checkout_has_its_headers_in_csrc(tmp_path):
    package = check_out(tmp_path)
    fake_torch(tmp_path / "torch")
    done = configure(
        tmp_path / "program", FIND + SHOW, f"-Dfusedamp_DIR={package}/cmake", f"-DTorch_ROOT={tmp_path}/torch"
    )
    assert shown(done)["INCLUDE_DIRECTORIES"].startswith(f"{tmp_path}/csrc/include;")


PLACES = {
    "Torch_DIR": "other/share/cmake/Torch",
    "Torch_ROOT": "other",
    "CMAKE_PREFIX_PATH": "other",
    "CMAKE_PREFIX_PATH=torch.utils.cmake_prefix_path": "other/share/cmake",
    "CMAKE_PREFIX_PATH=site-packages": "packages",
    "CMAKE_PREFIX_PATH=two": "nothing;@/other",
}


@pytest.mark.parametrize("of", ["cache", "environment"])
@pytest.mark.parametrize("name", PLACES)
def test_torch_is_the_one_that_was_asked_for(name, of, site):
    """Not the one next to fusedamp."""
    asked = fake_torch(site.parent / "other")
    (site.parent / "packages").mkdir()
    (site.parent / "packages/torch").symlink_to(asked)
    place = f"{site.parent}/{PLACES[name]}".replace("@", str(site.parent))
    folder = f"{site.parent}/packages/torch" if "packages" in place else str(asked)
    variable = name.partition("=")[0]
    if of == "cache":
        done = use(site, FIND + SHOW, f"-D{variable}={place}")
    else:
        done = use(site, FIND + SHOW, **{variable: place.replace(";", ":")})
    assert f"{folder}/include" in shown(done)["INCLUDE_DIRECTORIES"]


def test_a_search_for_torch_that_failed_before(site):
    """CMake leaves its result in Torch_DIR."""
    assert (
        f"{site}/torch/" in shown(use(site, FIND + SHOW, "-DTorch_DIR=Torch_DIR-NOTFOUND"))["LINK_LIBRARIES"]
    )


def test_torch_is_never_searched_in_other_places(site):
    """Where a folder was asked for that has no torch, even if there is one next to fusedamp."""
    text = refused(use(site, FIND, f"-DTorch_DIR={site}/nowhere"))
    assert f"torch was not found in Torch_DIR ({site}/nowhere)" in text


def test_no_torch(site):
    (site / "torch").rename(site / "no-torch")
    text = refused(use(site))
    assert f"torch was not found in CMAKE_PREFIX_PATH, and not next to {site}/fusedamp" in text
    assert (
        "Pass -DCMAKE_PREFIX_PATH=\"$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')\""
        in text
    )
    assert "or call find_package(Torch) before" in text


def test_torch_is_too_old(tmp_path):
    install(tmp_path / "site")
    folder = fake_torch(tmp_path / "site/torch", version="2.10.2")
    assert f"torch 2.10.2 ({folder}) is too old; expected 2.11 or later." in refused(use(tmp_path / "site"))
    # Before 2.10 the numbers were in another header.
    (folder / "include/torch/headeronly/version.h").rename(
        folder / "include/torch/csrc/api/include/torch/version.h"
    )
    assert "torch 2.10.2" in refused(use(tmp_path / "site"))


@pytest.mark.parametrize("name", ["torch", "torch_cpu", "c10", "c10_cuda"])
def test_torch_is_incomplete(name, tmp_path):
    install(tmp_path / "site")
    folder = fake_torch(tmp_path / "site/torch", cuda=True)
    (folder / f"lib/lib{name}.so").unlink()
    text = refused(use(tmp_path / "site"))
    assert f"torch in {folder} has no lib/lib{name}.so. Call find_package(Torch) before" in text


def test_torch_without_headers(site):
    (site / "torch/include/torch/headeronly/version.h").unlink()
    text = refused(use(site))
    assert f"{site}/torch has no torch/headeronly/version.h in its include folders; expected" in text


@pytest.mark.parametrize("language", ["C", "NONE"])
def test_a_program_without_cpp(language, site):
    """fusedamp's classes could not be compiled."""
    text = refused(use(site, FIND, language=language))
    assert "C++ is not enabled, with which fusedamp's classes are compiled. Add CXX to the languages" in text
    again = use(site, f"enable_language(CXX)\n{FIND}{SHOW}", language=language)
    assert shown(again)["LINK_LIBRARIES"]


def test_fusedamp_is_not_built(site):
    (site / "fusedamp/libfusedamp_cpu.so").unlink()
    text = refused(use(site))
    assert (
        f"fusedamp is not built: {site}/fusedamp/libfusedamp_cpu.so is missing. Run `pip install .`" in text
    )


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ("COMPONENTS cuda", 'fusedamp has no components; "cuda" was asked for'),
        ("OPTIONAL_COMPONENTS cuda", ""),
    ],
)
def test_components(components, message, site):
    done = use(site, f"find_package(fusedamp CONFIG REQUIRED {components})\n")
    if message:
        assert message in refused(done)
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("words_", ["", "QUIET"])
def test_an_optional_package(words_, found, site):
    """The program continues, and has been told why, unless it asked for silence."""
    if not found:
        (site / "torch").rename(site / "no-torch")
    text = """
if(fusedamp_FOUND AND TARGET fusedamp::fusedamp AND NOT fusedamp_NOT_FOUND_MESSAGE)
  message(STATUS RESULT=found)
elseif(NOT fusedamp_FOUND AND NOT TARGET fusedamp::fusedamp
       AND fusedamp_NOT_FOUND_MESSAGE MATCHES "^torch was not")
  message(STATUS RESULT=none)
endif()
"""
    done = use(site, f"find_package(fusedamp CONFIG {words_})\n{text}")
    assert shown(done)["RESULT"] == ("found" if found else "none")
    assert ("torch was not found" in words(done.stderr)) == (not found and not words_)
    assert ("Found fusedamp" in done.stdout) == (found and not words_)


@pytest.mark.parametrize(("standard", "feature"), [(201703, 17), (202002, 20), (202302, 23)])
def test_the_standard_is_that_of_torchs_headers(standard, feature, tmp_path):
    install(tmp_path / "site")
    fake_torch(tmp_path / "site/torch", standard=standard)
    assert shown(use(tmp_path / "site"))["COMPILE_FEATURES"] == f"cxx_std_{feature}"


def test_headers_that_ask_for_less(tmp_path):
    """fusedamp's own need C++17."""
    install(tmp_path / "site")
    fake_torch(tmp_path / "site/torch", standard=201402)
    assert shown(use(tmp_path / "site"))["COMPILE_FEATURES"] == "cxx_std_17"


def test_a_torch_with_cuda(tmp_path):
    """Both CUDA libraries are kept; TorchConfig.cmake, which would stop here, is not read."""
    package = install(tmp_path / "site")
    (package / "libfusedamp_cuda.so").touch()
    lib = fake_torch(tmp_path / "site/torch", cuda=True) / "lib"
    done = use(tmp_path / "site")
    target, names = shown(done), ("torch", "torch_cpu", "c10", "torch_cuda", "c10_cuda")
    files = [f"{package}/libfusedamp_{name}.so" for name in ("cpu", "cuda")]
    files += [f"{lib}/lib{name}.so" for name in names]
    assert target["LINK_LIBRARIES"].split(";") == ["fusedamp_classes", *files]
    assert target["LINK_OPTIONS"] == kept(files)
    assert f"(version {fusedamp.__version__}, CPU and CUDA), torch 2.13.0" in done.stdout
    assert done.stderr == ""


def test_a_cuda_library_is_left_out_where_torch_has_no_cuda(site):
    (site / "fusedamp/libfusedamp_cuda.so").touch()
    done = use(site)
    assert "fusedamp_cuda" not in str(shown(done))
    assert done.stderr == ""


@pytest.mark.parametrize("quiet", ["", "QUIET"])
def test_a_cpu_build_warns_where_torch_has_cuda(quiet, tmp_path):
    package = install(tmp_path / "site")
    (package / "libfusedamp_cuda.so").unlink(missing_ok=True)
    fake_torch(tmp_path / "site/torch", cuda=True)
    done = use(tmp_path / "site", f"find_package(fusedamp CONFIG REQUIRED {quiet})\n{SHOW}")
    assert "libfusedamp_cuda" not in str(shown(done))
    warned = "fusedamp was built without CUDA kernels, and torch 2.13.0 has CUDA" in words(done.stderr)
    assert warned == (not quiet)


# What find_package(Torch) leaves: targets of torch, with CUDA or without.
TARGETS = """
add_library(torch_cpu SHARED IMPORTED)
add_library(torch SHARED IMPORTED)
get_filename_component(include "${CMAKE_CURRENT_LIST_DIR}/../../../include" ABSOLUTE)
set_target_properties(torch PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${include}")
"""


@pytest.mark.parametrize("cuda", [False, True])
def test_a_target_torch_is_used(cuda, site):
    (site / "fusedamp/libfusedamp_cuda.so").touch()
    config = TARGETS + "add_library(torch_cuda SHARED IMPORTED)\n" * cuda
    other = fake_torch(site.parent / "other", version="2.14.1", standard=202002, config=config)
    done = use(site, f"find_package(Torch REQUIRED)\n{FIND}{SHOW}", f"-DTorch_DIR={other}/share/cmake/Torch")
    target, package = shown(done), site / "fusedamp"
    assert target["COMPILE_FEATURES"] == "cxx_std_20"
    objects = [f"{package}/libfusedamp_{name}.so" for name in ("cpu", "cuda")[: 1 + cuda]]
    assert target["LINK_LIBRARIES"].split(";") == ["fusedamp_classes", *objects, "torch"]
    assert target["LINK_OPTIONS"] == kept(objects)
    assert "torch 2.14.1" in done.stdout


def test_a_target_torch_that_is_too_old(site):
    other = fake_torch(site.parent / "other", version="2.9.1", config=TARGETS)
    text = refused(
        use(site, f"find_package(Torch REQUIRED)\n{FIND}", f"-DTorch_DIR={other}/share/cmake/Torch")
    )
    assert "torch 2.9.1 (the target torch) is too old; expected 2.11 or later." in text


def test_a_target_torch_of_something_else(site):
    text = refused(use(site, f"add_library(torch INTERFACE IMPORTED)\n{FIND}"))
    assert "the target torch has no torch/headeronly/version.h in its include folders" in text


def test_twice(site):
    """In one folder, and in one below."""
    (sub := site.parent / "program/sub").mkdir(parents=True)
    (sub / "CMakeLists.txt").write_text(FIND + SHOW)
    once = shown(use(site))
    done = use(site, FIND * 2 + "add_subdirectory(sub)\n")
    assert shown(done) == once
    assert done.stdout.count("Found fusedamp") <= 1, "CMake repeats no result"


def test_no_names_are_left_in_the_program(site):
    """But those that find_package sets."""
    text = f"get_cmake_property(before VARIABLES)\n{FIND}get_cmake_property(after VARIABLES)\n"
    text += 'list(REMOVE_ITEM after ${before} before)\nmessage(STATUS "NEW=${after}")\n'
    new = set(shown(use(site, text))["NEW"].split(";"))
    assert {
        n for n in new if not n.lower().startswith(("fusedamp_", "_fusedamp_", "cmake_", "find_package_"))
    } == set()
