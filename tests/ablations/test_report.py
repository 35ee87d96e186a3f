"""The report: one file that needs nothing else, pictures whose names can be read, effects with known sizes."""

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib.text
import pandas as pd
import pytest
from synthetic_rows import GPU, make_row, make_rows, synthetic_ap

from ablations.report import main, write_report
from ablations.rows.frame import make_frame
from ablations.rows.plots import ap_against_depth, ap_against_latency, gain_by_detector, to_svg
from ablations.rows.store import read_rows, write_row

VOID = {"meta", "br", "img", "link", "input", "hr"}
DETECTORS = ("atss", "fcos", "retinanet")


class Page(HTMLParser):
    """Checks that tags balance and collects what a test asks about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.tables, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, attributes)

    def handle_startendtag(self, tag, attributes):
        self._note(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.tables and self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def _note(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(value)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")


def report(tmp_path, rows):
    for row in rows:
        write_row(tmp_path, row)
    path = write_report(read_rows(tmp_path), tmp_path)
    assert path == tmp_path / "report.html"
    return path.read_text()


def test_the_report_is_one_whole_page_that_asks_for_nothing(tmp_path):
    gpu = [make_row(name, 1, machine=GPU, cell={"device_kind": "cuda"}) for name in ("baseline", "LSC")]
    text = report(tmp_path, [*make_rows(), *gpu, make_row("LSC", 4, status="diverged")])
    page = Page(text)
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"@import|url\((?!#)|<(script|link|img|iframe)[^>]+(src|href)", text)
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 2, "AP against latency and depth for the CPU; two cells on the GPU make no picture"
    for svg in svgs:
        assert ElementTree.fromstring(svg).get("aria-label")
    first, effects, second = page.tables
    assert first[0][:3] == ["detector", "attentions", "depth"] and len(first) == 1 + 17 + 1
    assert first[1][1] == "baseline" and len(second) == 3
    assert effects[0] == ["detector", "depth", "formulation", "effect", "AP", "AP50", "AP75", "APm", "APl"]
    assert len(effects) == 1 + 3 * 7 and effects[1][:5] == ["atss", "1", "released", "L", "+1.2"]
    words = " ".join(page.text)
    for expected in ("device: Test CPU", "device: Test GPU", "loss is nan at step 12", "How to reproduce"):
        assert expected in words
    assert "git checkout 0123456789abcdef" in words and "python -m ablations.run --grid" in words


def test_names_are_text_in_the_page_too(tmp_path):
    evil = "<script>alert(1)</script><svg onload=x>"
    cell = {"data": evil, "detector": evil, "backbone": "\"'>"}
    rows = [make_row(name, depth, cell=cell, machine={"device": evil}) for name in ("L", "S") for depth in (1, 2)]
    rows += [make_row("C", 1, cell=cell, machine={"device": evil}, status="crashed", reason=evil)]
    for number, row in enumerate(rows):
        row["key"] = f"k{number}"
    text = report(tmp_path, rows)
    Page(text)
    assert "<script>alert" not in text and "onload=x>" not in text.replace("onload=x&gt;", "")
    assert text.count("<script>") == 1


def test_files_that_are_not_rows_are_named_in_the_report(tmp_path):
    for row in make_rows():
        write_row(tmp_path, row)
    (tmp_path / "cells" / "torn.json").write_text('{"key": "torn"')
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "torn.json is not a row" in text


def test_rows_that_say_little_have_tables_and_a_report_too(tmp_path):
    rows = make_rows()
    for number, row in enumerate(rows):
        for name in ("machine", "started", "finished", "reason", "training", "batch_size_measured", "threads"):
            row[name] = None
            if number % 2:
                del row[name]
    rows.append({"key": "bare", "cell": rows[-1]["cell"] | {"seed": 1}, "status": "crashed"})
    text = report(tmp_path, rows)
    assert "device: unknown" in text and "no reason given" in text
    assert main([str(tmp_path)]) == 0


def test_the_same_rows_give_the_same_page(tmp_path):
    rows = make_rows()
    assert report(tmp_path / "a", rows) == report(tmp_path / "b", rows[::-1])


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ablations.report", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command(tmp_path, capsys):
    for row in make_rows(depths=(1,)):
        write_row(tmp_path, row)
    result = run(tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    written = {line.rsplit("/", 1)[-1] for line in result.stdout.split()}
    assert written == {"table.csv", "effects.csv", "table.md", "table.tex", "ap_against_latency.svg", "report.html"}
    assert all((tmp_path / name).stat().st_size for name in written)
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no directory" in capsys.readouterr().err and not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "no rows" in capsys.readouterr().err and list((tmp_path / "empty").iterdir()) == []
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def overlapping_names(figure):
    """Pairs of names in the pictures that lie on each other."""
    figure.draw_without_rendering()
    pairs = []
    for axes in figure.axes:
        names = [text for text in axes.texts if isinstance(text, matplotlib.text.Annotation) and text.get_text()]
        boxes = [(name.get_text(), matplotlib.text.Text.get_window_extent(name)) for name in names]
        pairs += [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if a[1].overlaps(b[1])]
    return pairs


def equal_rows():
    """All cells of one depth alike: the worst case for names."""
    rows = make_rows(depths=(1, 2))
    for row in rows:
        row["metrics"]["AP"] = 20.0 + 0.05 * (row["cell"]["depth"] or 0)
    return rows


@pytest.mark.parametrize("rows", [make_rows((1, 2, 4, 6), (0, 1, 2)), equal_rows()], ids=["four depths", "all alike"])
def test_names_in_pictures_do_not_lie_on_each_other(rows):
    frame = make_frame(rows)
    for draw in (ap_against_latency, ap_against_depth):
        assert overlapping_names(draw(frame)) == []


def test_ap_against_depth_shows_every_subset_and_the_baseline():
    axes = ap_against_depth(make_frame(make_rows(depths=(1, 2, 6)))).axes[0]
    names = {text.get_text() for text in axes.texts}
    assert names == {"baseline", "none", "L", "S", "C", "LS", "LC", "SC", "LSC"}
    curves = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 3]
    expected = [[depth, synthetic_ap("SC", depth)] for depth in (1, 2, 6)]
    assert expected in curves and len(curves) == 8
    assert [24.0, 24.0] in [list(line.get_ydata()) for line in axes.lines]
    assert list(axes.get_xticks()) == [1, 2, 6]


def test_ap_against_latency_joins_the_points_that_none_beats():
    points = {"none": (5.0, 20.0), "L": (6.0, 19.0), "S": (7.0, 25.0), "C": (7.0, 24.0), "LSC": (7.5, 25.0)}
    rows = [make_row("baseline", latency_ms_p50=8.0)]
    rows[0]["metrics"]["AP"] = 26.0
    for name, (latency, ap) in points.items():
        row = make_row(name, 1, latency_ms_p50=latency)
        row["metrics"]["AP"] = ap
        rows.append(row)
    axes = ap_against_latency(make_frame(rows)).axes[0]
    steps = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert [line.get_xydata().tolist() for line in steps] == [[[5, 20], [7, 25], [8, 26]]]
    assert {text.get_text() for text in axes.texts} == {"none, depth 1", "S, depth 1"}


def test_panels_for_detectors_and_formulations():
    rows = [*make_rows(), *make_rows(cell={"detector": "fcos"})]
    paper = [row for row in make_rows(cell={"formulation": "paper", "coarse_offsets": None}) if row["cell"]["depth"]]
    figure = ap_against_depth(make_frame(rows + paper))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["atss, released", "atss, paper", "fcos"]


def test_the_gain_of_each_detector():
    rows = [make_row(name, 1, cell={"detector": d}) for d in DETECTORS for name in ("baseline", "LSC")]
    figure = gain_by_detector(make_frame(rows))
    gain = synthetic_ap("LSC", 1) - 24
    bars, plane = figure.axes
    assert [text.get_text() for text in bars.texts] == [f"{gain:+.1f}  (LSC, depth 1)"] * 3
    assert {text.get_text() for text in plane.texts} == set(DETECTORS)
    assert overlapping_names(figure) == []


def test_no_picture_where_there_is_nothing_to_compare():
    nothing = make_frame([make_row("LSC", 1, status="oom"), make_row("baseline", status="crashed")])
    one_depth = make_frame(make_rows(depths=(1,)))
    assert ap_against_latency(nothing) is ap_against_depth(nothing) is gain_by_detector(nothing) is None
    assert ap_against_depth(one_depth) is None and gain_by_detector(one_depth) is None
    unmeasured = make_frame([row | {"latency_ms_p50": None} for row in make_rows()])
    assert ap_against_latency(unmeasured) is None and ap_against_depth(unmeasured) is not None
    assert isinstance(one_depth, pd.DataFrame) and ap_against_latency(one_depth) is not None


def test_an_svg_keeps_its_ids_apart_from_others():
    first, second = (to_svg(ap_against_depth(make_frame(make_rows())), name) for name in ("one", "two"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r"url\(#([^)]+)\)", first)) <= ids[0]
