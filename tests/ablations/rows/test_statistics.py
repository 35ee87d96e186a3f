"""Differences of a table: paired by seed, pooled by detector, corrected over the table, and what the notes say."""

import itertools

import numpy as np
import pytest
from synthetic_rows import SUBSETS, make_row, make_rows

from ablations.evaluation.replicates import NAMES, write_replicates
from ablations.rows.frame import as_text, make_frame
from ablations.rows.sections import make_sections
from ablations.rows.statistics import (
    experiment_of,
    make_statistics,
    measured,
    no_replicates,
    stored_replicates,
)
from ablations.rows.store import write_row
from ablations.rows.tables import write_tables


def noisy_rows(gain=0.0, depths=(1,), seeds=(0, 1, 2), scatter=0.5, **more):
    """Rows whose letters do nothing, and S `gain`."""
    rows = make_rows(depths, seeds, **more)
    random = np.random.default_rng(1)
    for row in rows:
        row["metrics"]["AP"] = 24 + random.normal(0, scatter) + gain * ("S" in row["cell"]["attentions"])
        row["images"] = 80
    return rows


def drawn(rows, size=0.3, draws=200):
    """Replicates that scatter by `size` around each row's AP, each row in a way of its own."""
    random = np.random.default_rng(2)
    found = {row["key"]: random.normal(0, size, (draws, len(NAMES))) + 24 for row in rows}
    return lambda row: found[row["key"]]


def by_name(statistics):
    return {each.attentions: found for each, found in statistics.differences.items()}


def notes(rows, replicates=no_replicates):
    (section,) = make_sections(rows, replicates)
    return " ".join(section.notes)


def test_a_difference_that_is_there_is_marked_and_one_that_is_not_is_not():
    rows = noisy_rows(gain=6.0)
    (section,) = make_sections(rows, drawn(rows))
    text = as_text(section.frame).set_index("attentions")["delta_AP"]
    for name in SUBSETS:
        assert text[name].endswith("*") == ("S" in name) and " ± " in text[name], text
    assert text["baseline"] == "0.0"
    frame = section.frame.set_index("attentions")
    assert (frame["delta_AP_p"].drop("baseline") < 0.05).to_dict() == {name: "S" in name for name in SUBSETS}
    assert set(frame["delta_AP_covers"].drop("baseline")) == {"training and images"}


def test_p_is_corrected_over_all_lines_of_the_table():
    rows = noisy_rows(gain=0.8)
    found = by_name(make_statistics(rows, drawn(rows)))
    alone = sorted((each.interval.p, each.p) for each in found.values())
    assert alone[0][1] == pytest.approx(8 * alone[0][0])
    others = [*rows, *noisy_rows(cell={"detector": "fcos"})]
    found = make_statistics(others, drawn(others)).differences
    assert len(found) == 16
    smallest = min(found.values(), key=lambda each: each.interval.p)
    assert smallest.p == pytest.approx(16 * smallest.interval.p)


def test_detectors_have_variances_of_their_own():
    rows = noisy_rows(scatter=0.1) + noisy_rows(scatter=5.0, cell={"detector": "fcos"})
    found = make_statistics(rows).differences
    wide = {each.detector: difference.interval.half_width for each, difference in found.items()}
    assert wide["fcos"] > 20 * wide["atss"]
    assert "pooled over 9 cells (16 degrees of freedom" in notes(rows)


def test_the_order_of_rows_does_not_matter():
    rows = noisy_rows(gain=1.0)
    one, other = make_statistics(rows, drawn(rows)), make_statistics(rows[::-1], drawn(rows))
    assert one.differences == other.differences and one.notes() == other.notes()


def test_a_cell_out_of_line_is_named():
    rows = noisy_rows(depths=(1, 2), seeds=(0, 1, 2, 3))
    planted = [row for row in rows if row["cell"]["attentions"] == "LC" and row["cell"]["depth"] == 2]
    for row, far in zip(planted, (0, 9, -9, 0), strict=True):
        row["metrics"]["AP"] += far
    found = make_statistics(rows).differences
    width = {(each.attentions, each.depth): difference.interval.half_width for each, difference in found.items()}
    assert width["LC", 2] > 5 * width["LC", 1]
    assert "a variance of its own: atss LC depth 2." in notes(rows)


def test_notes_say_what_a_sceptic_asks():
    rows = noisy_rows()
    text = notes(rows, drawn(rows))
    for expected in ("80 images; 3 seeds a cell", "16 degrees of freedom", "over 8 comparisons", "four of five"):
        assert expected in text, text
    assert "images only" not in text and "training only" not in text


def test_one_seed_covers_images_alone_and_says_so():
    rows = noisy_rows(seeds=(0,))
    text = as_text(make_frame(rows, make_statistics(rows, drawn(rows))))["delta_AP"]
    assert all(cell.endswith("(images only)") and "*" not in cell for cell in text[1:])
    assert "says nothing of another training run" in notes(rows, drawn(rows)) and "Holm" not in notes(rows, drawn(rows))
    assert "nothing is known" in notes(rows) and "±" not in as_text(make_frame(rows))["delta_AP"][1]


def test_rows_from_before_replicates_were_kept_cover_training_alone():
    rows = noisy_rows(gain=9.0)
    for row in rows:
        del row["images"]
    text = as_text(make_frame(rows))["delta_AP"]
    assert all(cell.endswith("(training only)") and "*" not in cell for cell in text[1:])
    assert "says nothing of other images" in notes(rows) and "images;" not in notes(rows)
    some = drawn(rows)
    part = make_statistics(rows, lambda row: None if row["cell"]["attentions"] == "L" else some(row))
    covers = {name: found.interval.covers for name, found in by_name(part).items()}
    assert covers["L"] == "training only" and covers["S"] == "training and images"


def test_seeds_that_are_missing_on_one_side():
    rows = noisy_rows(gain=1.0)
    at = {(row["cell"]["attentions"], row["cell"]["seed"]): row for row in rows}
    for lost in (("L", 2), ("S", 0), ("S", 1), ("C", 0), ("C", 1), ("C", 2)):
        at[lost]["status"] = "diverged"
    at["SC", 0]["cell"]["seed"], at["SC", 1]["status"], at["SC", 2]["status"] = 7, "oom", "oom"
    found = by_name(make_statistics(rows, drawn(rows)))
    assert found["L"].interval.seeds == (0, 1) and found["S"].interval.seeds == (2,) and "C" not in found
    value = np.mean([at["L", s]["metrics"]["AP"] - at["baseline", s]["metrics"]["AP"] for s in (0, 1)])
    assert found["L"].value == pytest.approx(value)
    assert found["S"].interval.covers == "training and images", "training's variance is known from the others"
    assert found["S"].interval.half_width > found["L"].interval.half_width
    assert np.isnan(found["SC"].value) and found["SC"].interval is None
    assert "for want of a seed that the baseline has, too: atss SC depth 1." in notes(rows)
    at["baseline", 0]["status"] = "oom"
    rows = [row for row in rows if row["cell"]["attentions"] in ("baseline", "L", "LS")]
    assert "over the seeds that the baseline has, too, and AP over all: atss L depth 1, atss LS depth 1." in notes(rows)


def test_without_a_baseline_there_are_no_differences():
    rows = noisy_rows()[3:]
    assert make_statistics(rows).differences == {} and make_statistics(rows).notes() == []
    failed = [make_row("baseline", seed=s, status="oom") for s in range(3)]
    assert make_statistics([*rows, *failed]).differences == {}


def test_every_permutation_of_a_few_rows_gives_the_same_table():
    rows = [row for row in noisy_rows(seeds=(0, 1)) if row["cell"]["attentions"] in ("baseline", "LSC")]
    frames = [make_frame(list(order)).to_csv() for order in itertools.permutations(rows)]
    assert len(set(frames)) == 1


def test_replicates_lie_beside_the_rows(tmp_path):
    rows = noisy_rows(gain=6.0)
    draws = drawn(rows)
    for row in rows:
        write_row(tmp_path, row)
        (tmp_path / "cells" / row["key"]).mkdir()
        write_replicates(tmp_path / "cells" / row["key"] / "replicates.npz", draws(row).astype(np.float32))
    assert stored_replicates(tmp_path)(rows[0]).shape == (200, len(NAMES))
    assert stored_replicates(tmp_path)(make_row("LSC", 9)) is None
    write_tables(rows, tmp_path)
    assert "(training only)" not in (tmp_path / "table.md").read_text()
    assert " ± " in (tmp_path / "table.md").read_text() and r"$\pm$" in (tmp_path / "table.tex").read_text()
    header = (tmp_path / "table.csv").read_text().splitlines()[1]
    assert "delta_AP,delta_AP_half_width,delta_AP_p,delta_AP_covers" in header
    assert (tmp_path / "effects.csv").read_text().splitlines()[1].startswith("detector,depth,formulation,seeds,metric")


def test_measures_come_from_metrics_and_errors():
    row = make_row("L", 1, errors={"cls": 3.5})
    assert measured(row, "AP50") == row["metrics"]["AP50"] and measured(row, "cls") == 3.5
    assert measured(row, "loc") is None and measured(make_row("L", 1), "cls") is None
    assert str(experiment_of(row["cell"])) == "atss L depth 1"


def test_damaged_replicates_are_warned_of_once_with_what_to_type(tmp_path, capsys):
    rows = make_rows(depths=(1,))
    for row, kept in zip(rows[:2], (["files"], []), strict=True):
        path = tmp_path / "cells" / row["key"] / "replicates.npz"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"PK")
        row |= {name: {path.name: 5} for name in kept} | {"machine": {"command": "the command"}}
        write_row(tmp_path, row)
    for _ in range(2):
        assert [stored_replicates(tmp_path)(row) for row in rows[:2]] == [None, None]
    seen, unseen = capsys.readouterr().err.splitlines()
    assert seen.startswith(f"warning: {tmp_path}/cells/{rows[0]['key']}/replicates.npz is damaged: ")
    assert seen.endswith("; make it again with: the command")
    assert unseen.endswith(f"; move {tmp_path}/cells/{rows[1]['key']}.json away and make it again with: the command")
