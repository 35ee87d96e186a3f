"""Exhibits are made where weights, detections and data are, kept for reports elsewhere, and cost no run its tables."""

import json
from dataclasses import replace

import pytest
import torch
from cells import CELL
from synthetic_rows import make_row

from ablations.data.coco import read_dataset
from ablations.evaluation.detections import FILE, write_detections
from ablations.exhibits.make import restored, write_exhibits
from ablations.exhibits.stored import exhibit_path, read_exhibit
from ablations.experiment import trained
from ablations.experiment.experiment import build
from ablations.generate import generate
from ablations.grid import with_dyhead
from ablations.publish import main as publish
from ablations.report import main as report
from ablations.rows.store import read_rows, write_row


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return read_dataset(generate(tmp_path_factory.mktemp("data") / "tiny", "tiny", train=6, val=4))


def found_in(data, shift):
    """Detections of every image: its objects, moved by some pixels."""
    for record in data.val.images:
        boxes = torch.from_numpy(record.boxes) + shift
        yield record.image_id, {"boxes": boxes, "scores": torch.full((len(boxes),), 0.5), "labels": record.labels}


@pytest.fixture
def run(data, tmp_path):
    """A directory with a baseline and an LSC cell as a run leaves it, with random weights, and the LSC cell."""
    base = replace(CELL, image_size=(128,), max_size=160, test_size=(128,), data_fingerprint=data.fingerprint)
    cell = with_dyhead(base, "LSC", 2, "released", "crop")
    for each, shift in ((base, 4.0), (cell, 1.0)):
        row = make_row(each.stored()["attentions"], each.depth)
        write_row(tmp_path, row | {"key": each.key, "cell": each.stored()})
        (tmp_path / "cells" / each.key).mkdir()
        write_detections(tmp_path / "cells" / each.key / FILE, found_in(data, shift), data.val.category_ids)
    trained.folder(tmp_path, cell).mkdir(parents=True, exist_ok=True)
    model = build(cell, len(data.train.category_ids), None)
    torch.save({"model": model.state_dict()}, trained.folder(tmp_path, cell) / trained.CHECKPOINT)
    trained.keep(tmp_path, cell, {"steps": 1})
    return tmp_path, cell


def test_an_exhibit_has_all_that_a_report_shows(run, data, tmp_path_factory):
    directory, cell = run
    write_exhibits(read_rows(directory), directory, data)
    exhibit = read_exhibit(directory, cell.key)
    assert "reason" not in exhibit and exhibit["notes"] == []
    objects = [record for record in data.val.images if len(record.boxes)]
    assert exhibit["compared"] == exhibit["rise"] == len(objects) and len(exhibit["pictures"]) == min(3, len(objects))
    for picture in exhibit["pictures"]:
        assert picture["AP"][1] > picture["AP"][0]
        assert len(picture["truth"]) == len(picture["dyhead"]) == len(picture["baseline"])
    assert [len(block) for block in exhibit["gates"]] == [5, 5] and exhibit["images"] == 4
    assert [len(level) for level in exhibit["gates"][0]] == [2, 3, 3, 3, 2]
    assert {len(slopes[0]) for block in exhibit["slopes"] for slopes in block} == {16}
    assert {(each["block"], each["level"]) for each in exhibit["positions"]} == {
        (b, f"P{p}") for b in (1, 2) for p in (3, 4, 5)
    }
    assert [stage["stage"] for stage in exhibit["maps"][0]["stages"]] == ["in", "S", "L", "C"]
    assert exhibit_path(directory, cell.key).stat().st_size < 400_000

    # Another place has neither weights nor data, and the same report.
    target = tmp_path_factory.mktemp("results")
    assert report([str(directory)]) == 0 and publish([str(directory), str(target)]) == 0
    text = (target / "report.html").read_text()
    assert text == (directory / "report.html").read_text()
    for words in ("Scale attention (L)", "where one pixel looks", "slopes of each channel", "behind S", "AP, image"):
        assert words in text
    assert not list(target.rglob("*.pt")) and not list(target.rglob(FILE))
    assert publish([str(directory), str(target), "--with-detections"]) == 0
    assert len(list(target.rglob(FILE))) == 2


def reason_of(directory, cell):
    return read_exhibit(directory, cell.key)["reason"]


def test_what_is_missing_is_said(run, data, tmp_path):
    directory, cell = run
    rows = read_rows(directory)
    write_exhibits(rows, directory, None)
    assert "--data" in reason_of(directory, cell)
    write_exhibits(rows, directory, replace(data, fingerprint="other"))
    assert "not the data set" in reason_of(directory, cell)
    weights = trained.folder(directory, cell) / trained.CHECKPOINT
    content = weights.read_bytes()
    weights.write_bytes(b"torn")
    write_exhibits(rows, directory, data)
    assert reason_of(directory, cell)
    weights.unlink()
    write_exhibits(rows, directory, data)
    assert "weights of atss LSC, depth 2, seed 3 are gone" in reason_of(directory, cell)
    weights.write_bytes(content)
    (directory / "cells" / cell.key / FILE).unlink()
    write_exhibits(rows, directory, data)
    exhibit = read_exhibit(directory, cell.key)
    assert exhibit["pictures"] == [] and "No boxes side by side" in exhibit["notes"][0] and exhibit["gates"]


def test_what_was_made_stays_until_no_table_has_its_cell(run, data):
    directory, cell = run
    rows = read_rows(directory)
    write_exhibits(rows, directory, data)
    before = exhibit_path(directory, cell.key).read_bytes()
    write_exhibits(rows, directory, None)
    assert exhibit_path(directory, cell.key).read_bytes() == before
    write_exhibits([row for row in rows if row["key"] != cell.key], directory, data)
    assert not exhibit_path(directory, cell.key).exists()


def test_a_row_of_another_version_is_not_taken_for_one_of_this(run):
    directory, cell = run
    row = next(row for row in read_rows(directory) if row["key"] == cell.key)
    assert restored(json.loads(json.dumps(row))) == cell
    for change in ({"unknown": 1}, {"lr": 0.5}):
        with pytest.raises(ValueError, match="another version"):
            restored(row | {"cell": row["cell"] | change})
