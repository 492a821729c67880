"""The law of the Python rooms: which may import which, no circles, and no import of the package's face."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "python/fusedamp"
FILES = sorted(PACKAGE.rglob("*.py"))
pytestmark = pytest.mark.skipif(not FILES, reason="not a source checkout")

# A room may import itself and rooms of a lower rank.
RANKS = {
    "_C": 0,
    "tensors": 1,
    "capabilities": 1,
    "ops": 2,
    "optim/state": 3,
    "optim/core": 4,
    "optim": 5,
    "amp": 5,
    "nn": 5,
    "cpu": 6,
    "cuda": 6,
    "numerics": 6,
    "energy": 6,
    "distributed": 6,
    "memory": 6,
    "checkpoints": 6,
    "commands": 7,
    "__main__": 8,
    "__init__": 8,  # the public names: it imports everything, and no room imports it
}


def name_of(path: Path) -> str:
    """The module of a file, as `optim.adam`; of the package itself, an empty text."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, also inside functions and for type checkers."""
    package = ["fusedamp", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "fusedamp":
                inside = target[1:]
                known = ".".join(inside) in MODULES or inside in (["_C"], ["__version__"])
                yield ".".join(inside if known or not inside else inside[:-1])


def room_of(module: str) -> str:
    parts = module.split(".")
    two = "/".join(parts[:2])
    return two if two in RANKS else parts[0] or "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    mine = room_of(name_of(path))
    for target in imports(path):
        other = room_of(target)
        assert other != "__init__", f"{path.name} imports the package's face"
        assert other == mine or RANKS[other] < RANKS[mine], f"{mine} imports {target}"


def test_no_circles():
    """Between files, in whatever room, also of imports that only type checkers see."""
    # A package's __init__ gathers its files; importing the package means these.
    graph = {name: set(imports(path)) - {name, "_C"} for name, path in MODULES.items() if name}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_top_is_small():
    """The package has at most 17 files and folders."""
    top = {p.name for p in PACKAGE.iterdir() if p.suffix != ".so" and not p.name.startswith("__pycache__")}
    assert len(top) <= 17, sorted(top)


def test_the_picture_is_up_to_date():
    """python/README.md names each room and each file at the top."""
    text = (PACKAGE.parent / "README.md").read_text()
    rooms = {path.relative_to(PACKAGE).parts[0] for path in FILES}
    assert not {room for room in rooms if room.removesuffix(".py") not in text}
