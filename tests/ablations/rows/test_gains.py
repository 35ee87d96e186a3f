"""The gain of each detector beside the paper's: which lines there are, what they say, and where they are shown."""

import pytest
from synthetic_rows import make_row

from ablations.report import write_report
from ablations.rows.frame import make_frame
from ablations.rows.gains import COLUMNS, gains_table
from ablations.rows.store import read_rows, write_row
from ablations.rows.tables import write_tables


def rows(detector: str, ap: dict[str, float], seeds: int = 1, **more) -> list[dict]:
    """One row for each of `ap`, and seed s adds s points to the baseline and 3 s to the others."""
    made = []
    for attentions, value in ap.items():
        for seed in range(seeds):
            row = make_row(attentions, 1, seed, cell={"detector": detector}, **more)
            row["metrics"]["AP"] = value + seed * (1 if attentions == "baseline" else 3)
            made.append(row)
    return made


def lines(*parts: list[dict]) -> dict[str, dict]:
    table = gains_table(make_frame([row for part in parts for row in part]))
    assert tuple(table) == COLUMNS
    return {line["detector"]: dict(line) for _, line in table.iterrows()}


def test_each_detector_has_its_gain_and_the_papers():
    found = lines(
        rows("fcos", {"baseline": 20.0, "LSC": 23.25, "LS": 50.0}), rows("mask_rcnn", {"baseline": 30.0, "LSC": 28.0})
    )
    assert list(found) == ["fcos", "mask_rcnn"]
    assert [found["fcos"][name] for name in COLUMNS] == [
        *("fcos", "1", "released", "20.0", "23.2", "+3.2"),
        *("38.8", "40.0", "+1.2"),
    ]
    assert found["mask_rcnn"]["gain"] == "-2.0"
    assert {found["mask_rcnn"][name] for name in ("paper_baseline", "paper_LSC", "paper_gain")} == {""}


@pytest.mark.parametrize(
    ("detector", "gain"),
    [("faster_rcnn", "+2.5"), ("retinanet", "+2.7"), ("atss", "+3.2"), ("fcos", "+1.2"), ("reppoints", "+1.4")],
)
def test_the_papers_gains_are_those_of_its_table_3(detector, gain):
    found = lines(rows(detector, {"baseline": 20.0, "LSC": 20.0}), rows("detr", {"baseline": 1.0, "LSC": 1.0}))
    assert found[detector]["paper_gain"] == gain


def test_a_gain_over_several_seeds_has_its_interval():
    found = lines(
        rows("fcos", {"baseline": 20.0, "LSC": 22.0}, seeds=3), rows("detr", {"baseline": 1.0, "LSC": 2.0}, seeds=3)
    )
    # Differences of 2, 4 and 6: their standard error is 2 / sqrt(3), and t with two degrees of freedom 4.303.
    assert found["fcos"]["gain"] == "+4.0 ± 5.0 (training only)"


def test_what_failed_is_empty_and_what_cannot_be_compared_is_left_out():
    failed = make_row("LSC", 1, status="diverged", cell={"detector": "retinanet"})
    found = lines(
        rows("fcos", {"baseline": 20.0, "LSC": 22.0}),
        [*rows("retinanet", {"baseline": 20.0}), failed],
        rows("reppoints", {"LSC": 20.0}),
    )
    assert list(found) == ["fcos", "retinanet"]
    assert (found["retinanet"]["baseline"], found["retinanet"]["LSC"], found["retinanet"]["gain"]) == ("20.0", "", "")
    assert not lines(rows("fcos", {"baseline": 20.0, "LSC": 22.0}), rows("detr", {"baseline": 1.0}))


def test_the_gains_stand_in_tables_and_report_of_several_detectors(tmp_path):
    for row in rows("fcos", {"baseline": 20.0, "LSC": 22.0}):
        write_row(tmp_path, row)
    files = [tmp_path / "table.md", tmp_path / "table.tex", write_report(read_rows(tmp_path), tmp_path)]
    write_tables(read_rows(tmp_path), tmp_path)
    assert not any("Gain of DyHead" in path.read_text() for path in files)
    for row in rows("faster_rcnn", {"baseline": 30.0, "LSC": 29.0}):
        write_row(tmp_path, row)
    write_tables(read_rows(tmp_path), tmp_path)
    text = (tmp_path / "table.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| faster_rcnn") and "+2.5" in line]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        *("faster_rcnn", "1", "released", "30.0", "29.0", "-1.0"),
        *("36.4", "38.9", "+2.5"),
    ]
    assert "COCO val2017" in text.splitlines()[-1]
    latex = (tmp_path / "table.tex").read_text()
    assert latex.count(r"\begin{table*}") == latex.count(r"\end{table*}") == 2
    assert r"\label{tab:dyhead-gains-1}" in latex
    page = write_report(read_rows(tmp_path), tmp_path).read_text()
    assert page.count("<h3>Gain of DyHead") == 1 and "<td>+2.5</td>" in page
