"""Where tests stand: tests/util/data/test_loader.py is of util/data/loader.py; the others are listed here.

And that what the documents name is there."""

import re
from pathlib import Path

import pytest

from tests.harness import ROOT

FILES = sorted((ROOT / "tests").rglob("test_*.py"))
# What these are of crosses the modules.
CROSS_CUTTING = {
    "test_bench.py",
    "test_contributing.py",
    "test_crop_pct.py",
    "test_docs_commands.py",
    "test_docs_python.py",
    "test_families.py",
    "test_faults.py",
    "test_fuzz.py",
    "test_gpu.py",
    "test_host_sync.py",
    "test_hostile_checkpoints.py",
    "test_hostile_images.py",
    "test_imports.py",
    "test_layout.py",
    "test_recipes.py",
    "test_resume.py",
    "test_self_describing.py",
    "test_wiring.py",
}


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT / "tests")) for path in FILES])
def test_each_test_file_is_of_a_module_or_crosses_several(path):
    module = ROOT / path.replace("test_", "")
    assert module.is_file() != (path in CROSS_CUTTING), module


def test_no_file_is_listed_that_is_gone():
    assert {path for path in CROSS_CUTTING if (ROOT / "tests" / path).is_file()} == CROSS_CUTTING


def test_each_test_that_the_documents_promise_exists():
    promised = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "promises.md").read_text()))
    written = {name for path in FILES for name in re.findall(r"(?m)^def (test_\w+)", path.read_text())}
    assert len(promised) > 20 and promised <= written, promised - written


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text("utf-8"))
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_of_a_document_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_s_table_of_what_to_change_is_contributing_s():
    rows = {
        page: re.findall(r"(?m)^\| \[?(an? [\w -]+?)(?:\]\(.*?\))? \| (.*?) \|", (ROOT / page).read_text("utf-8"))
        for page in ("README.md", "CONTRIBUTING.md")
    }
    assert len(rows["README.md"]) == 6 and rows["README.md"] == rows["CONTRIBUTING.md"]


def test_readme_names_every_document_and_pictures_that_are_small():
    text = (ROOT / "README.md").read_text("utf-8")
    assert all(f"(docs/{page.name})" in text for page in (ROOT / "docs").glob("*.md"))
    pictures = re.findall(r"!\[.*?\]\((docs/\w+\.png)\)", text)
    assert len(pictures) == 2 and all((ROOT / picture).stat().st_size < 300_000 for picture in pictures)
