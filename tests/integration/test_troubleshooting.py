"""Every error and warning of the package has an entry in docs/troubleshooting.md, or is about one argument.

And every entry quotes a message that exists: of the package, or one that the page marks as torch's.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "fusedamp"
PAGE = ROOT / "docs" / "troubleshooting.md"
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not PAGE.exists(), reason="not a source checkout"),
]
# "[operation] argument is X; expected Y", and what else names an argument and what it accepts.
OF_ONE_ARGUMENT = re.compile(
    r"\b(?:is|are) (?:on |a |no )?(?:\{\}|missing|float64|step op|given beside)[^;]*; expected"
    r"|\bhas (?:shape|strides|rule|flags|dtype codes?) \{\}"  # argument has shape X
    r"|\[(?:estimate|pack_parameters|convert|fusions)\]|\bgrads is empty; expected"
    r"|\{\} (?:tensors|numbers|values|rows|addresses|elements|parameters)\b.*; expected"
    r"|^\{\}(?:,? \{\})* (?:is|are|has|have) .*; expected"  # the ops' own checks in C++
    r"|hyper-parameters are \{\}|\(shape \{\}\) has no memory"
)


def template(node: ast.expr | None, named: dict[str, str]) -> str:
    """Return the text of a message, with {} for what varies."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, named) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, named) + template(node.right, named)
    return named.get(node.id, "{}") if isinstance(node, ast.Name) else "{}"


def of_python(path: Path) -> list[str]:
    tree, named = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = template(node.value, {})
            if text != "{}":
                named[node.targets[0].id] = text
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            named[node.target.id] = named.get(node.target.id, "") + template(node.value, {})
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            found.append(template(node.exc.args[0], named))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "warn":
            found.append(template(node.args[0], named))
    return found


def of_cpp(path: Path) -> list[str]:
    """Messages of fail(op, ...), STD_TORCH_CHECK(..., ...), throw, and of headers for programs: their string
    literals, {} between. refuse(where, "argument", value, "wanted") is of one argument."""
    found = []
    calls = (
        r"fail|refuse|refuse_type|refuse_value|TORCH_WARN|STD_TORCH_CHECK|py::value_error|std::runtime_error"
    )
    text = re.sub(r'"\s+"', "", path.read_text())  # the compiler joins literals
    for call in re.finditer(rf"\b(?:{calls})\((.*?)\);", text, re.S):
        if named := re.match(r'\w+, (?:"(\w+)"|name), ', call[1]):
            found.append(f"{{}} {named[1] or '{}'} is {{}}; expected {{}}")
            continue
        literals = re.findall(r'"((?:[^"\\]|\\.)*)"', call[1])
        if literals:
            start = "" if call[1].lstrip().startswith('"') else "{}"
            found.append(start + "{}".join(literals))
    return found


def of_cmake(path: Path) -> list[str]:
    """What the package sets as its problem, and its warnings: their texts, {} for variables."""
    literals = r'((?:\s*"(?:[^"\\]|\\.)*")+)'
    pattern = r"(?:set\((?:\$\{problem\}|_fusedamp_problem)|message\(WARNING)" + literals
    found = re.findall(pattern, path.read_text().replace("\\\n", ""))
    found = ["".join(re.findall(r'"((?:[^"\\]|\\.)*)"', text)) for text in found]
    return [re.sub(r"\$\{\w+\}", "{}", text).replace('\\"', '"') for text in found]


def messages() -> list[tuple[str, str]]:
    """Return (file, message) of all errors and warnings that a program with fusedamp can see."""
    python = [p for p in sorted(PACKAGE.rglob("*.py")) if "commands" not in p.parts]
    cpp = [p for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cpp", ".h", ".cu")]
    found = [(p, text) for p in python for text in of_python(p)]
    found += [(p, text) for p in cpp for text in of_cpp(p)]
    found += [(p, text) for p in sorted((PACKAGE / "cmake").glob("*.cmake")) for text in of_cmake(p)]
    plain = [(p.relative_to(ROOT).as_posix(), " ".join(text.split())) for p, text in found]
    return [(name, text) for name, text in plain if len(re.findall(r"[A-Za-z]{2,}", text)) > 2]


def entries() -> list[tuple[str, bool]]:
    """Return (quoted message, whether it is torch's) of the page and of the table in docs/layers.md."""
    found = []
    for page in (PAGE, ROOT / "docs" / "layers.md"):
        text = page.read_text()
        rows = re.findall(r"^\| (`.*?) \|", text, re.M)
        rows += [text.partition("\n## Inside\n")[2]]
        for row in rows:
            for quote in re.findall(r"``\s?(.+?)\s?``|`(.+?)`", row):
                found.append(("".join(quote), "(torch)" in row))
    return found


def matcher(quote: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, quote.split("..."))))


def test_messages_have_an_entry():
    known = [matcher(quote) for quote, _ in entries()]
    missing = [
        f"{name}: {text}"
        for name, text in messages()
        if not OF_ONE_ARGUMENT.search(text) and not any(entry.search(text) for entry in known)
    ]
    assert not missing, "write an entry in docs/troubleshooting.md:\n" + "\n".join(missing)


def test_entries_quote_messages():
    texts = [text for _, text in messages()]
    page = PAGE.read_text()
    stale = [
        quote
        for quote, is_torchs in entries()
        if f"`{quote}`" in page and not is_torchs and not any(matcher(quote).search(text) for text in texts)
    ]
    assert not stale, stale


def test_messages_are_found():
    found = messages()
    assert sum(name.startswith("python/") for name, _ in found) > 100
    assert sum(name.startswith("csrc/include/") for name, _ in found) > 80
    assert sum(name.startswith(("csrc/ops/", "csrc/python/")) for name, _ in found) > 40
    assert sum(name.endswith(".cmake") for name, _ in found) == 8
