"""What README.md and docs/ say in sentences about measurements, made from committed results.

`SENTENCES` has one function per page, which returns phrases that the page must have. `MEASURED` finds numbers
that look like measurements; each must be in one of these phrases.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pages

EPYC_LINEAR = pages.RESULTS / "amd-epyc-avx512-2-cores-linear.csv"
OURS = "fusedamp, {} weights with masters"
THEIRS = "torch AMP, {} autocast, fused AdamW"

NUMBER = r"(?:(?:1/)?\d(?:[\d.,]*\d)?)"
UNITS = (
    "ms|us|ns|seconds?|MB|GB|%|times (?:as|on|the speed|torch's)|bytes per parameter|behind"
    "|of (?:torch's|FP32's|the speed)|checks|(?:CUDA )?graphs|tests|errors|formats"
)
MEASURED = re.compile(
    rf"(?:{NUMBER} (?:to|and|of) )?{NUMBER} ?(?:{UNITS})(?!\w)|(?:within|up to|about) {NUMBER}"
    rf"|bytes per parameter \w+(?: of)? {NUMBER}|loss by {NUMBER} to {NUMBER}"
)
CODE_AND_TABLES = re.compile(r"(?ms)```.*?```|<!-- table:.*?<!-- end -->|^\|[^\n]*$|^!\[[^\n]*$")


def plain(text: str) -> str:
    """Return the sentences of a page with single spaces, without links' targets."""
    text = CODE_AND_TABLES.sub("", text)
    return " ".join(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).split())


def span(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def gaps() -> tuple[list[tuple[float, float]], ...]:
    """Return smallest and largest gap of each format: of those that keep FP32's loss, and of the others."""
    found = re.findall(r"^\| (.*?) \| [\d.]+ \| \S+ \| (\S+) to (\S+) \|", pages.PARITY.read_text(), re.M)
    lost = [row for row in found if "no masters" in row[0] and "stochastic" not in row[0]]
    return tuple(
        [(float(low), float(high)) for _, low, high in rows]
        for rows in ([row for row in found if row not in lost], lost)
    )


def largest_kept() -> str:
    return f"within {max(abs(end) for ends in gaps()[0] for end in ends):.4f} of FP32's"


def behind() -> str:
    return span([end for ends in gaps()[1] for end in ends], 2) + " behind"


def formats() -> int:
    return sum(map(len, gaps()))


def orders() -> str:
    """Return how far other orders of the batches move FP32's loss."""
    spread = re.search(r"other batch orders \((.*?)\)", pages.PARITY.read_text())
    assert spread
    return span([float(number) for number in spread[1].split(", ")], 3)


def total_bytes(mode: int) -> str:
    """Return the sum of a row of the table of bytes."""
    total: str = pages.bytes_per_parameter().splitlines()[2 + mode].split(" | ")[-1].rstrip(" |")
    return total


def readme() -> list[str]:
    parts = pages.evidence()
    step = {run["recipe"]: f"{run['step_ms']:.1f}" for run in parts["training"]["runs"]}
    cells = [re.findall(r"[\d.]+(?= \|)", line) for line in pages.speed_on_the_gpu().splitlines()[2:]]
    one_thread = [
        float(row["ratio_p50"])
        for row in pages.rows(pages.EPYC)
        if row["optimizer"] == "adamw" and row["rival"] in ("P1", "P3", "P4") and row["threads"] == "1"
        if row["workload"] in ("W1", "W2", "W3")
    ]
    suite = parts["suite"]["counts"]
    summaries = [line for tool in parts["sanitizer"].values() for line in tool["summary"]]
    errors = sum(int(number) for line in summaries for number in re.findall(r"SUMMARY: (\d+)", line))
    return [
        f"takes {step[OURS.format('FP16')]} ms with FP16 weights, and {step[THEIRS.format('FP16')]} ms under",
        f"takes {step[OURS.format('BF16')]} and {step[THEIRS.format('BF16')]} ms",
        span([float(cell) for line in cells for cell in line[:-1]], 1) + " times as fast as with",
        f"up to {max(float(line[-1]) for line in cells):.1f} times on 2,000",
        f"{total_bytes(4)} bytes per parameter instead of {total_bytes(0)}",
        f"{len(gaps()[0])} of {formats()} formats end {largest_kept()}",
        behind(),
        span(one_thread, 1) + " times as fast on one thread",
        f"{json.loads(pages.H200.read_text())['parts']['bitwise']['checks']} checks",
        f"{parts['graphs']['graphs']} CUDA graphs",
        f"{suite['tests'] - suite['skipped'] - suite['failures'] - suite['errors']:,} tests passed",
        f"found {errors} errors",
        f"the loss in {formats()} formats",
    ]


def index() -> list[str]:
    return [
        f"{total_bytes(0)} bytes per parameter become {total_bytes(4)}",
        f"in {formats()} formats",
        largest_kept(),
        behind(),
    ]


def formats_page() -> list[str]:
    return [
        f"in {formats()} formats",
        largest_kept(),
        f"moves FP32's own loss by {orders()}",
        behind(),
    ]


def graphs() -> list[str]:
    return [f"{pages.evidence()['graphs']['graphs']} graphs gave the same bits"]


def longer(dtype: str, row: str, rival: str = "AMP") -> list[float]:
    """Return fusedamp's time over torch's in the rows of linear layers whose name has ``row``."""
    return [
        1 / float(found["ratio_p50"])
        for found in pages.rows(EPYC_LINEAR)
        if found["dtype"] == dtype and re.search(row, found["row"]) and rival in found["rival"]
        if found["ratio_p50"] not in ("", "nan")
    ]


def layers() -> list[str]:
    whole = "^(?!host).*(forward . backward|training step)"
    fp16 = [1 / x for x in longer("FP16", whole)]
    host = [x for dtype in ("FP16", "BF16") for x in longer(dtype, "host time, forward . backward")]
    product = [1 / x for x in longer("BF16", "^weight gradient", "AMP")]
    return [
        f"BF16 layers take {span(longer('BF16', whole), 1)} times as long",
        f"at {span(product, 1)} times the speed of the BF16 product",
        f"1/{max(fp16):.0f} to 1/{min(fp16):.0f} of torch's time",
        f"takes {span(host, 1)} times as long as torch's for tiny layers",
    ]


def scaler() -> list[str]:
    skips = {
        policy: [int(row["skips"]) for row in pages.rows(pages.POLICIES) if row["policy"] == policy]
        for policy in ("torch", "headroom")
    }
    more = sum(ours > theirs for theirs, ours in zip(skips["torch"], skips["headroom"], strict=True))
    return [
        f"torch's policy skipped {sum(skips['torch'])} steps, and headroom {sum(skips['headroom'])}; "
        f"it skipped more in {more} of the {len(skips['torch'])} rows"
    ]


def internals() -> list[str]:
    host = [x for dtype in ("FP16", "BF16") for x in longer(dtype, "^host time")]
    return [f"up to {max(host):.1f} times torch's host time", f"Held-out loss of {formats()} formats"]


SENTENCES: dict[str, Callable[[], list[str]]] = {
    "README.md": readme,
    "index.md": index,
    "formats.md": formats_page,
    "graphs.md": graphs,
    "layers.md": layers,
    "scaler.md": scaler,
    "internals.md": internals,
}


def faults(page: Path) -> list[str]:
    """Return phrases that ``page`` lacks, and its measurements that are in no phrase."""
    text, missing = plain(page.read_text()), []
    for phrase in SENTENCES.get(page.name, list)():
        if phrase not in text:
            missing.append(f"expected {phrase!r}")
        text = text.replace(phrase, "...")
    return missing + [f"{match[0]!r} is in no result" for match in MEASURED.finditer(text)]
