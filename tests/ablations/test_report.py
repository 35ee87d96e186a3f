"""The report: one file that needs nothing else, says all that the rows say, and is the same for the same rows."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from synthetic_rows import GPU, make_row, make_rows

from ablations.report import main, write_report
from ablations.rows.store import read_rows, write_row

VOID = {"meta", "br", "img", "link", "input", "hr"}


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
        if self.tables and self.open and self.open[-1] in ("td", "th", "button"):
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
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert not re.search(r"@import|url\((?!#)|<(script|link|img|iframe)[^>]+(src|href)=\"(?!data:)", text)
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= set(page.ids)
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    # Two cells on the GPU make no picture.
    assert len(svgs) == 2 + 5, "AP against latency and depth, and effects on five APs, for the CPU"
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


def with_classes(rows):
    for row in rows:
        ap = row["metrics"]["AP"]
        row["class_AP"] = {"heart": ap + 5, "star <b>": ap - 20, "unseen": None}
    return rows


def test_classes_are_means_over_seeds_beside_the_baseline(tmp_path):
    page = Page(report(tmp_path, with_classes(make_rows(depths=(1,), seeds=(0, 2)))))
    (table,) = (table for table in page.tables if table[0][0] == "cell")
    assert table[0] == ["cell", "heart", "star <b>"] and len(table) == 1 + 9
    assert table[1] == ["baseline", "29.3", "4.3"] and table[-1] == ["LSC ×1", "31.4", "6.4"]


def test_more_classes_than_cells_stand_below_each_other(tmp_path):
    rows = [make_row("baseline"), make_row("LSC", 2)]
    for row in rows:
        row["class_AP"] = {f"class {number}": float(number) for number in range(3)}
    page = Page(report(tmp_path, rows))
    (table,) = (table for table in page.tables if table[0][0] == "class")
    assert table[0] == ["class", "baseline", "LSC ×2"] and table[1:] == [
        [f"class {n}", f"{n}.0", f"{n}.0"] for n in range(3)
    ]


def exhibits_of(tmp_path, content):
    rows = [make_row("baseline"), make_row("LSC", 1), make_row("LSC", 2, seed=1), make_row("LSC", 2)]
    folder = tmp_path / "exhibits"
    folder.mkdir()
    (folder / f"{rows[-1]['key']}.json").write_text(content)
    return report(tmp_path, rows)


def test_an_exhibit_that_cannot_be_shown_is_a_line(tmp_path):
    reason = json.dumps({"reason": "the weights <are> gone"})
    for number, (content, words) in enumerate(
        [
            (reason, "No exhibit: the weights &lt;are&gt; gone."),
            ("{", "none was kept"),
            ('{"pictures": 3}', "not one that this version reads"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        text = exhibits_of(tmp_path / str(number), content)
        assert "Inside the attentions: atss LSC, depth 2, seed 0" in text and words in text
        Page(text)


def test_an_exhibit_from_elsewhere_cannot_bring_in_anything(tmp_path):
    picture = {"image_id": "<i>", "width": 4, "height": 4, "AP": [1, 2], "truth": [], "baseline": [], "dyhead": []}
    box = {"box": [0, 0, 1, 1], "label": "<script>alert(1)</script>"}
    exhibit = {
        "notes": ["<script>alert(2)</script>"],
        "pictures": [picture | {"image": "data:image/png;base64,AAAA", "truth": [box]}],
        "compared": 1,
        "rise": 1,
        "fall": 0,
        "released": True,
        "gates": [],
        "slopes": [],
    }
    (tmp_path / "good").mkdir()
    text = exhibits_of(tmp_path / "good", json.dumps(exhibit))
    Page(text)
    assert "<script>alert" not in text and "image &lt;i&gt;" in text and "+1.0 AP" in text
    exhibit["pictures"][0]["image"] = 'data:image/png;base64,AAAA" onload="alert(3)'
    (tmp_path / "bad").mkdir()
    text = exhibits_of(tmp_path / "bad", json.dumps(exhibit))
    assert "onload" not in text and "not one that this version reads" in text
