"""The report in a real browser: it sorts, says nothing on the console, and fits a phone, in light and dark."""

import pytest
from browser import MISSING, Browser
from synthetic_rows import GPU, make_row, make_rows

from ablations.report import write_report

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
COLUMN = "return Array.from(document.querySelectorAll('table')[0].tBodies[0].rows, row => row.cells[{}].textContent)"
# Cells without an AP, between others.
FAILED = ("none", "L", "S", "C", "LS")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of two tables with classes, loss curves and effects."""
    directory = tmp_path_factory.mktemp("report")
    rows = make_rows((1, 2), (0, 1))
    for row in rows:
        row["class_AP"] = {f"class {number}": row["metrics"]["AP"] + number for number in range(12)}
        folder = directory / "cells" / row["key"]
        folder.mkdir(parents=True)
        (folder / "losses.jsonl").write_text("".join(f'{{"step": {n}, "loss": {9 / n}}}\n' for n in range(1, 9)))
    rows += [make_row(name, 1, machine=GPU, cell={"device_kind": "cuda"}) for name in ("baseline", "LSC")]
    rows += [make_row(name, 4, status="diverged") for name in FAILED]
    return write_report(rows, directory)


def test_a_click_on_a_heading_sorts(page, tmp_path):
    with Browser(tmp_path) as browser:
        browser.open(page)
        before = browser.script(COLUMN.format(5))
        browser.click("thead th:nth-child(6) button")
        down = [float(text) for text in browser.script(COLUMN.format(5)) if text]
        assert down == sorted(down, reverse=True) and len(down) == 17
        assert browser.script(COLUMN.format(5))[17:] == [""] * len(FAILED), "what is empty goes last"
        sort = "return document.querySelector('thead th:nth-child(6)').getAttribute('aria-sort')"
        assert browser.script(sort) == "descending"
        browser.click("thead th:nth-child(6) button")
        assert [float(text) for text in browser.script(COLUMN.format(5)) if text] == down[::-1]
        assert browser.script(COLUMN.format(5))[17:] == [""] * len(FAILED) and browser.script(sort) == "ascending"
        # Differences have signs and intervals, names are words; the other table stays.
        browser.click("thead th:nth-child(12) button")
        differences = [float(text.split()[0]) for text in browser.script(COLUMN.format(11)) if text]
        assert differences == sorted(differences, reverse=True)
        browser.click("thead th:nth-child(2) button")
        names = browser.script(COLUMN.format(1))
        assert names == sorted(names) and before != names
        assert browser.console() == []


def test_headings_are_reached_and_used_from_the_keyboard(page, tmp_path):
    with Browser(tmp_path) as browser:
        browser.open(page)
        heading = browser.script(
            "document.querySelector('thead th:nth-child(6) button').focus(); return document.activeElement.textContent"
        )
        assert heading == "AP"
        for kind in ("keyDown", "keyUp"):
            key = {"type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            browser.devtools("Input.dispatchKeyEvent", key)
        values = [float(text) for text in browser.script(COLUMN.format(5)) if text]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_both_palettes(page, tmp_path, dark):
    with Browser(tmp_path / "profile", 390, 844, dark) as browser:
        browser.open(page)
        assert browser.script("return document.documentElement.scrollWidth") == 390
        wide = browser.script(
            "return Array.from(document.querySelectorAll('.scroll'), box => box.scrollWidth > box.clientWidth + 40)"
        )
        assert wide[0], "a table scrolls in its own box"
        panels = browser.script("return Array.from(document.querySelectorAll('.drawn'), x => x.clientWidth)")
        assert len(panels) == 2 + 5 + 2 and min(panels) >= 150
        ground, ink, axis = browser.script(
            "let style = name => getComputedStyle(document.querySelector(name));"
            "return [style('body').backgroundColor, style('body').color, style('.drawn text').fill]"
        )
        assert contrast(ground, ink) > 7 and contrast(ground, axis) > 7
        assert (brightness(ground) < 0.1) == dark
        names = browser.script(
            "return Array.from(document.querySelectorAll('.drawn text'), x => getComputedStyle(x).fill)"
        )
        assert min(contrast(ground, name) for name in names) > 3
        assert browser.console() == []


def brightness(colour):
    """Relative luminance of a computed colour (WCAG 2)."""
    inside = colour[colour.index("(") + 1 : -1]
    if colour.startswith("color(srgb"):
        channels = [float(part) for part in inside.split()[1:4]]
    else:
        channels = [float(part) / 255 for part in inside.split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    low, high = sorted((brightness(first), brightness(second)))
    return (high + 0.05) / (low + 0.05)
