"""What the README and the pages under docs/ say is there, is there, and what they show runs."""

import doctest
import re
from pathlib import Path

import pytest
from places import ROOT

from ablations.publish import BEGIN, END

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "results" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Pages that a user pastes from, top to bottom.
USERS = sorted((ROOT / "docs" / "users").glob("*.md"))


def test_the_readme_has_at_most_900_words_beside_its_table():
    before, rest = (ROOT / "README.md").read_text().split(BEGIN)
    assert len((before + rest.split(END)[1]).split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_examples_run(page):
    failed, _ = doctest.testfile(str(page), module_relative=False)
    assert failed == 0


@pytest.mark.parametrize("page", USERS, ids=lambda page: page.name)
def test_every_block_of_a_users_page_is_run(page):
    """`test_examples_run` runs what has prompts, one block after the other, in one namespace."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    # A line is a prompt, its continuation or what it prints; doctest takes a fence for output but behind a blank line.
    assert [block for block in blocks if not block.startswith(">>> ") or not block.endswith("\n\n")] == []


def test_the_readme_has_an_example():
    assert ">>>" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text()
    files = re.findall(r"`((?:kernels|heads|ablations|examples|tests|docs|results)/[\w/.{}*-]*)`", text)
    modules = re.findall(r"python -m ((?:kernels|heads|ablations)[\w.]+)", text)
    absent = [name for name in files if not name.startswith("kernels/tuned") and not any(ROOT.glob(name.rstrip("/")))]
    places = {name: name.replace(".", "/") for name in modules}
    absent += [name for name in re.findall(r"python (examples/\S+\.py)", text) if not (ROOT / name).is_file()]
    absent += [n for n, p in places.items() if not any(map(Path.exists, (ROOT / f"{p}.py", ROOT / p / "__main__.py")))]
    assert not absent
