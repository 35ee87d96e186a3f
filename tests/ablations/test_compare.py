"""The comparison of two cells and of two directories: what is paired, what is said, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_coco
from scipy import stats
from synthetic_rows import make_row, make_rows

from ablations.compare import class_replicates, main
from ablations.data.coco import read_dataset
from ablations.evaluation.detections import FILE, write_detections
from ablations.evaluation.replicates import FILE as REPLICATES
from ablations.evaluation.replicates import NAMES, write_replicates
from ablations.rows.store import write_row


def store(directory, rows, replicates=True):
    random = np.random.default_rng(6)
    for row in rows:
        write_row(directory, row)
        if replicates and row["status"] == "ok":
            (directory / "cells" / row["key"]).mkdir(exist_ok=True)
            draws = random.normal(row["metrics"]["AP"], 0.3, (100, len(NAMES))).astype(np.float32)
            write_replicates(directory / "cells" / row["key"] / REPLICATES, draws)


def rows_with(gain=0.0, noise=0.3, **changes):
    random = np.random.default_rng(5)
    rows = make_rows(depths=(1,), seeds=(0, 1, 2), **changes)
    for row in rows:
        row["metrics"]["AP"] = 24 + random.normal(0, noise) + gain * (row["cell"]["attentions"] == "LSC")
        row["class_AP"] = {
            "disc": 30.0 + row["cell"]["seed"],
            "star": 20.0 + gain * (row["cell"]["attentions"] == "LSC"),
            "none seen": None,
        }
        row["images"] = 40
    return rows


def said(capsys, *arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def line(text, name):
    (found,) = [row for row in text.splitlines() if re.match(rf"\| {re.escape(name)} +\|", row)]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_two_cells(tmp_path, capsys):
    rows = rows_with(gain=5.0)
    store(tmp_path, rows)
    text = said(capsys, tmp_path / "atss-baseline", "atss-LSC-1-cpu-2", "--out", tmp_path, code=2)
    assert "3 cells whose key begins with 'atss-baseline'" in text and "atss-baseline-None-cpu-0" in text
    text = said(capsys, tmp_path / "atss-baseline-None-cpu-1", "atss-LSC-1-cpu-2", "--out", tmp_path)
    ap = {
        name: np.mean([r["metrics"]["AP"] for r in rows if r["cell"]["attentions"] == name])
        for name in ("baseline", "LSC")
    }
    _, a, b, difference, p = line(text, "AP")
    assert (a, b) == (f"{ap['baseline']:.1f}", f"{ap['LSC']:.1f}")
    assert difference.startswith(f"{ap['LSC'] - ap['baseline']:+.1f} ± ") and "only" not in difference
    assert float(p) < 0.001
    assert "attentions baseline → LSC" in text and "depth none → 1" in text and "lr" not in text
    assert "40 images; 3 seeds (0, 1, 2); variance of training pooled over 9 cells (16 degrees of freedom)" in text
    assert line(text, "star")[1:4] == ["20.0", "25.0", "+5.0 ± 0.0 (training only)"] and "none seen" not in text
    by_file = said(capsys, tmp_path / "cells" / "atss-baseline-None-cpu-1.json", tmp_path / "atss-LSC-1-cpu-0")
    assert by_file == text, "all seeds take part, whichever was named"


def test_two_cells_in_the_other_order_have_the_opposite_difference(tmp_path, capsys):
    store(tmp_path, rows_with(gain=5.0))
    a, b = tmp_path / "atss-baseline-None-cpu-1", tmp_path / "atss-LSC-1-cpu-2"
    there, back = (line(said(capsys, *pair), "AP") for pair in ((a, b), (b, a)))
    assert there[3].replace("+", "-") == back[3] and there[4] == back[4]


def test_two_directories(tmp_path, capsys):
    store(tmp_path / "a", rows_with(gain=0.0))
    changed = rows_with(gain=6.0, noise=0.4, cell={"lr": 0.08})
    changed = [row for row in changed if row["cell"]["attentions"] != "LC" and row["key"] != "atss-C-1-cpu-0"]
    store(tmp_path / "b", changed)
    text = said(capsys, tmp_path / "a", tmp_path / "b")
    assert "lr 0.04 → 0.08" in text and "correction over 8 comparisons" in text
    assert line(text, "atss LSC depth 1")[3].endswith("*") and not line(text, "atss L depth 1")[3].endswith("*")
    assert line(text, "atss C depth 1")[5] == "1 2" and line(text, "atss L depth 1")[5] == "0 1 2"
    assert "In one of the two alone: atss LC depth 1." in text


def test_cells_of_equal_settings_are_paired_first(tmp_path, capsys):
    store(tmp_path / "a", rows_with())
    other = rows_with(cell={"lr": 0.08})
    for row in other:
        row["key"] += "-lr"
        row["metrics"]["AP"] += 50
    store(tmp_path / "b", [*rows_with(gain=3.0), *other])
    text = said(capsys, tmp_path / "a", tmp_path / "b")
    assert line(text, "atss LSC depth 1")[3].startswith("+3.0") and "lr" not in text.split("In one")[0]


def test_rows_without_replicates_say_so(tmp_path, capsys):
    rows = rows_with()
    for row in rows:
        del row["class_AP"]
    store(tmp_path, rows, replicates=False)
    text = said(capsys, tmp_path / "atss-baseline-None-cpu-1", tmp_path / "atss-S-1-cpu-1")
    assert line(text, "AP")[3].endswith("(training only)") and line(text, "AP")[4] == ""
    assert "no AP by category" in text and line(text, "APs")[1:] == ["", "", "", ""]


def test_one_seed_without_replicates_is_worth_nothing_known(tmp_path, capsys):
    rows = [row for row in rows_with() if row["cell"]["seed"] == 1]
    store(tmp_path, rows, replicates=False)
    a, b = tmp_path / "atss-baseline-None-cpu-1", tmp_path / "atss-S-1-cpu-1"
    text = said(capsys, a, b)
    assert "nothing is known" in text and " ± " not in text
    for row in rows[1:]:
        (tmp_path / "cells" / f"{row['key']}.json").unlink()
        row["key"], row["cell"]["seed"] = row["key"] + "-later", 2
    store(tmp_path, rows)
    text = said(capsys, a, tmp_path / "atss-S-1-cpu-1-later")
    assert "share no seed" in text and line(text, "AP")[3] == ""


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    store(tmp_path / "a", [*rows_with(), make_row("LSC", 4, status="diverged")])
    store(tmp_path / "b", rows_with(cell={"data_fingerprint": "beef"}))
    a, b = tmp_path / "a", tmp_path / "b"
    cell = a / "atss-L-1-cpu-0"
    assert "evaluated on different data (f00d and beef)" in said(capsys, a, b, code=2)
    assert "evaluated on different data" in said(capsys, cell, b / "atss-L-1-cpu-0", code=2)
    assert "name two of a kind" in said(capsys, a, cell, code=2)
    assert "one directory" in said(capsys, a, a, code=2)
    assert "seeds are repetitions" in said(capsys, cell, a / "atss-L-1-cpu-2", code=2)
    assert "loss is nan at step 12" in said(capsys, cell, a / "atss-LSC-4", code=2)
    assert "0 cells whose key begins with 'nothing'" in said(capsys, cell, a / "nothing", code=2)
    assert "no directory of results" in said(capsys, cell, tmp_path / "nowhere" / "x", code=2)
    assert "or KEY with --out DIR" in said(capsys, cell, "x", code=2)
    store(tmp_path / "c", [make_row("LSC", 1, cell={"detector": "fcos"})])
    assert "share no cell" in said(capsys, a, tmp_path / "c", code=2)


def test_categories_have_intervals_from_detections_and_data(tmp_path, capsys):
    data = read_dataset(tiny_coco.write(tmp_path / "data"))
    rows = [
        make_row(name, 1, seed, cell={"data_fingerprint": data.fingerprint})
        for name in ("baseline", "L")
        for seed in (0, 1)
    ]
    random = np.random.default_rng(0)
    for row in rows:
        found = []
        for image in data.val.ground_truth["images"]:
            truth = [a for a in data.val.ground_truth["annotations"] if a["image_id"] == image["id"]]
            boxes = np.array([a["bbox"] for a in truth], float).reshape(-1, 4)
            kept = random.random(len(boxes)) < 0.7
            labels = [
                data.val.category_ids.index(a["category_id"]) for a, keep in zip(truth, kept, strict=True) if keep
            ]
            found.append((image["id"], {"bbox": boxes[kept], "scores": random.random(kept.sum()), "labels": labels}))
        write_row(tmp_path, row)
        (tmp_path / "cells" / row["key"]).mkdir()
        write_detections(tmp_path / "cells" / row["key"] / FILE, found, data.val.category_ids)
        drawn = class_replicates(tmp_path, row, data)
        row["class_AP"] = {name: float(np.nanmean(draws)) for name, draws in drawn.items() if not np.isnan(draws).all()}
        write_row(tmp_path, row)
    names = list(rows[0]["class_AP"])
    assert names
    cells = (tmp_path / "atss-baseline-None-cpu-0", tmp_path / "atss-L-1-cpu-0")
    text = said(capsys, *cells, "--data", tmp_path / "data")
    assert "only" not in line(text, names[0])[3]
    assert "training only" in line(said(capsys, *cells), names[0])[3]
    # Categories of one name are told apart here as they are in the rows.
    twins = replace(data, val=replace(data.val, category_names=("same",) * len(data.val.category_ids)))
    assert {*class_replicates(tmp_path, rows[0], twins)} == {f"same ({id_})" for id_ in data.val.category_ids}
    damaged = tmp_path / "cells" / rows[0]["key"] / FILE
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert re.search(
        f"error: {damaged} is damaged: .*make it again with: ", said(capsys, *cells, "--data", data.root, code=2)
    )
    rows[0]["cell"]["data_fingerprint"] = "other"
    with pytest.raises(ValueError, match="other data"):
        class_replicates(tmp_path, rows[0], data)


def test_an_interval_is_that_of_the_pooled_runs(tmp_path, capsys):
    rows = [row for row in rows_with() if row["cell"]["attentions"] in ("baseline", "L")]
    store(tmp_path, rows, replicates=False)
    text = said(capsys, tmp_path / "atss-baseline-None-cpu-0", tmp_path / "atss-L-1-cpu-0")
    ap = np.array([row["metrics"]["AP"] for row in rows]).reshape(2, 3)
    half_width = stats.t.ppf(0.975, 2) * np.std(ap[1] - ap[0], ddof=1) / np.sqrt(3)
    assert f"± {half_width:.1f} (training only)" in line(text, "AP")[3]
