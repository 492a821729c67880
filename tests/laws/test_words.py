"""Plain words: texts that people read use the field's terms. Each row: a pattern, and what to write."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

WORDS = {
    r"(?:optimi[sz]er )phase": "step",
    r"read pass(?:es)?": "gradient check (finite check and norm)",
    r"looks? (?:again )?at|looked (?:again )?at|(?:one|each|a|second|last) look\b": "check, read, access",
    r"(?:8-bit|tapered|signed|unsigned|quantized) codes": "quantized values",
    r"(?:in|as|with|their|its) codes|codes (?:and|of) (?:the )?(?:state|scale)s?": "quantized values",
    r"wide (?:states?|masters?|weights?)": "FP32 (or FP64)",
    r"(?:every|each|any|other|what) kinds? of (?:gradient|parameter|tensor|state)": "dtypes, or name it",
    r"in turns|take turns|takes its turn": "round-robin, alternately",
    r"(?:no|any|every|some)body|whoever": "no other references, other code, the caller",
    r"(?:what|which|that) (?:is|are) no (?!longer|more)\w+": "non-X, not an X",
    r"(?:is|are|be) no (?:error|overflow|numbers?|option|matrix|matrices|states?|float)": "is not a(n) X",
    r"(?:is|was|been) said of|what (?:is|was) said": "name the thing",
    r"of which (?:none|nothing|no )": "a second sentence",
    r"states? in 8 bits": "8-bit states",
    r"anew": "again, recreated, from scratch",
    r"(?:step|phase) at hand": "this step",
    r"drifts? apart|draws? alike": "diverge; draw the same numbers",
    r"yardstick": "spread",
    r"how (?:masters|states|weights|it|they)\b[ \w]{0,20} kept": "storage, stored",
    r"for what (?:is|are) ": "if the argument is",
    r"claims? (?:that )?did not show": "was not confirmed",
    r"numbers that stop": "values that stall",
    r"(?:lies|lie|stands?|stood) beside": "adjacent, next to, with",
    r"goes on with|go on with|went on with": "continues",
    r"(?:is|are|was|were) (?:obeyed|refused) by name": "raises",
}

# American spelling. Each row: British words, and what to write.
SPELLING = {
    r"(?:\w*(?:initial|synchron|normal|vector|optim|quant|serial|general|parallel|organ|recogn|util|summar|minim|maxim|"
    r"emphas|categor|standard|special|real|final|local|global|stabil|random|memor|material|author|custom|character|"
    r"penal|regular|token|visual|equal|canonical|discret|linear|factor|sanit|apolog|critic|priorit|polar|symbol|item)"
    r"is(?:e|ed|es|ing|er|ers|ation|ations))(?![a-z])": "-ize, -ization",
    r"\w*(?:colour|behaviour|neighbour|favour|honour|labour|rumour|vapour|flavour)": "-or",
    r"(?:cancel|travel|model|label|signal|channel|level|total|marshal|initial)l(?:ed|ing|er|ers)\b": "one l",
    r"(?:centre|fibre|metre|litre|calibre|theatre)s?\b": "-er",
    r"(?:grey|licence|defence|offence|catalogue|analogue|dialogue|programme|judgement|whilst|amongst|artefact|"
    r"sceptic|learnt|spelt|analyse|paralyse|maths|fulfil\b|tyre|cheque)": "gray, license, -og, ...",
}
WORDS |= SPELLING

# True uses: terms of the field.
ALLOWED = (
    r"exit codes?|dtype codes?|codes? of a dtype|machine code|zero_code|source code|\bcodes? =",
    r"Nesterov's look-ahead|look ahead|looked up|look-up",
    r"that are no powers of two",
)

NEVER = ("benchmarks/results", "benchmarks/partial", "tests/laws/test_words.py")
TEXTS = {".py", ".h", ".cuh", ".cu", ".cpp", ".inc", ".def", ".cmake", ".md", ".toml"}
FOLDERS = ("python/fusedamp", "csrc", "docs", "benchmarks", "tests")

PATTERN = re.compile("|".join(rf"(?P<w{i}>\b(?:{word}))" for i, word in enumerate(WORDS)), re.I)
TRUE = re.compile("|".join(ALLOWED))


def texts() -> list[Path]:
    found = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in TEXTS]
    found += [*ROOT.glob("*.md"), *ROOT.glob("*.py"), ROOT / "Makefile"]
    names = {p: p.relative_to(ROOT).as_posix() for p in found if "build" not in p.parts}
    return sorted(p for p, name in names.items() if not name.startswith(NEVER))


def prose(path: Path) -> str:
    """Return what a person reads of ``path``: comments and strings of Python, all of other files; one line
    break and comment sign between two words are one space."""
    text = path.read_text()
    if path.suffix == ".py":
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        text = "\n\n".join(token.string for token in tokens if token.type in kinds)
    return re.sub(r"(?<!\n)\n[ \t]*(?:#|//)?[ \t]*(?!\n)", " ", text)


def dialect(text: str) -> list[str]:
    """Return the words of ``WORDS`` in ``text``, with what to write instead."""
    text = TRUE.sub("", text)
    found = []
    for match in PATTERN.finditer(text):
        instead = list(WORDS.values())[int(match.lastgroup[1:])]
        context = " ".join(text[max(match.start() - 40, 0) : match.end() + 40].split())
        found.append(f"{match.group()!r}; write: {instead} (... {context} ...)")
    return found


@pytest.mark.parametrize("path", texts(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_words_are_plain(path):
    found = dialect(prose(path))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "old",
    [
        "The addresses are read in one read pass.",
        "the next step looks at all of it",
        "Whether nobody can have changed the state",
        "AdamW updates what is no matrix",
        "times in the optimizer phase; the two take turns",
        "Quantized values are no numbers",
        "tapered 8-bit codes with FP32 block scales",
        "an uninitialised buffer",
        "assert_neighbours and their behaviour",
        "COLOURS of the centre, labelled",
        "the licence of a sceptic",
    ],
)
def test_dialect_is_found(old):
    assert dialect(old)


@pytest.mark.parametrize(
    "good",
    ["Exit code 2", "dtype codes of n tensors", "as in Nesterov's look-ahead", "precise otherwise, raised"],
)
def test_terms_of_the_field_are_allowed(good):
    assert not dialect(good)
