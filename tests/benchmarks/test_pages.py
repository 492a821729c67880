"""Tables and pictures of README.md and docs/ show the committed results."""

import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not (BENCHMARKS / "pages.py").exists(), reason="not a source checkout"),
]


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_tables_show_the_results():
    import pages

    stale = [page.name for page in pages.PAGES if pages.written(page) != page.read_text()]
    assert not stale, "run python benchmarks/pages.py"


def test_sentences_show_the_results():
    import pages
    import sentences

    faults = {page.name: sentences.faults(page) for page in pages.PAGES if page != pages.PARITY}
    assert not {name: found for name, found in faults.items() if found}
    assert set(sentences.SENTENCES) <= set(faults)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A step takes 24.4 ms. It is 1.6 to 2.1\ntimes as fast.", ["24.4 ms", "1.6 to 2.1 times as"]),
        ("On a GPU 475 checks ran, up to 7.7 times on GPUs", ["475 checks", "up to 7.7"]),
        ("within [0.0006](parity.md) of FP32's, and 1/36 of torch's", ["within 0.0006", "1/36 of torch's"]),
        ("A loss of 16 bits in FP32, with 2 ranks and 8-bit states", []),
        ("```\n24.4 ms\n```\n| 3.5 ms |\n![2 ms](a.png)\n", []),
    ],
)
def test_measurements_are_found(text, found):
    import sentences

    assert [match[0] for match in sentences.MEASURED.finditer(sentences.plain(text))] == found


def test_every_table_is_on_a_page():
    import pages

    used = {name for page in pages.PAGES for _, name, _ in pages.PLACE.findall(page.read_text())}
    assert used == set(pages.TABLES)


@pytest.mark.parametrize("name", ["step_h200", "speed_h200", "speed_cpu", "memory", "loss_gap"])
def test_pictures_show_the_results(name):
    pytest.importorskip("matplotlib")
    import pages
    import pictures

    read, draw = pictures.PICTURES[name]
    numbers = read()
    png = (pages.ROOT / "docs" / f"{name}.png").read_bytes()
    text = f"{pictures.KEYWORD}\0{pictures.fingerprint(numbers)}".encode()
    assert text in png, "run python benchmarks/pictures.py"
    pictures.plt.close(draw(numbers))


def test_links_lead_to_files():
    """Relative links, and links into the repository on its main branch."""
    import pages

    for page in pages.PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            inside = link.removeprefix(f"{pages.REPOSITORY}/blob/main/").removeprefix(
                f"{pages.REPOSITORY}/raw/main/"
            )
            if not inside.startswith(("https://", "#")):
                folder = page.parent if inside == link else pages.ROOT
                assert (folder / inside.partition("#")[0]).exists(), (page.name, link)


def test_every_picture_is_on_a_page():
    import pages

    text = "".join(page.read_text() for page in pages.PAGES)
    unused = [png.name for png in (pages.ROOT / "docs").glob("*.png") if png.name not in text]
    assert not unused


def test_links_become_absolute():
    import pages

    url = "https://example.org/fusedamp"
    text = "[a](docs/b.md#c) ![d](docs/e.png) [![f](https://g/h)](i.md) [j](https://k) [l](#m)"
    assert pages.absolute(text, url) == (
        f"[a]({url}/blob/main/docs/b.md#c) ![d]({url}/raw/main/docs/e.png) "
        f"[![f](https://g/h)]({url}/blob/main/i.md) [j](https://k) [l](#m)"
    )
    assert pages.absolute(pages.absolute(text, url), url) == pages.absolute(text, url)
    assert f"[![CI]({url}/actions/workflows/ci.yml/badge.svg)]" in pages.badges(url)
    assert "CI" not in pages.badges(None)


def test_readme_is_short_and_starts_with_code():
    import pages

    text = (pages.ROOT / "README.md").read_text()
    assert len(re.findall(r"\S*\w\S*", text)) < 900
    assert text.splitlines().index("```python") < 30  # the first screen
