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

    stale = [page.name for page in pages.PAGES if pages.written(page.read_text()) != page.read_text()]
    assert not stale, "run python benchmarks/pages.py"


def test_sentences_show_the_results():
    import pages

    text = " ".join((pages.ROOT / "README.md").read_text().split())
    missing = [phrase for phrase in pages.prose() if phrase not in text]
    assert not missing


def test_every_table_is_on_a_page():
    import pages

    used = {name for page in pages.PAGES for _, name, _ in pages.PLACE.findall(page.read_text())}
    assert used == set(pages.TABLES)


@pytest.mark.parametrize("name", ["step_h200", "speed_h200", "memory", "loss_gap"])
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


def test_pictures_exist():
    import pages

    for page in pages.PAGES:
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / picture).exists(), (page.name, picture)
