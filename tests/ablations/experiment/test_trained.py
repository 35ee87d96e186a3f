"""Nothing that was trained is lost: failed evaluations, mended data, other tests of the same weights."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic_rows import make_row
from tiny_coco import json_path

from ablations import run
from ablations.data import image_files
from ablations.data.problems import DataError
from ablations.executors import pool
from ablations.executors.pool import run_cells
from ablations.experiment import experiment, trained
from ablations.experiment.experiment import Job, Learned, Reading
from ablations.grid import Cell
from ablations.rows.store import read_rows, write_row


def edit(data: Path, split: str, change) -> None:
    content = json.loads(json_path(data, split).read_text())
    change(content)
    json_path(data, split).write_text(json.dumps(content))


def test_a_failed_evaluation_keeps_weights_and_metrics_and_is_tried_again_without_training(grid, monkeypatch):
    evaluate = experiment.evaluate

    def fails_on_masks(predictions, truth, categories, kind="bbox"):
        if kind == "segm":
            raise MemoryError("no memory for masks")
        return evaluate(predictions, truth, categories)

    with monkeypatch.context() as broken:
        broken.setattr(experiment, "evaluate", fails_on_masks)
        code, printed, trainings = grid(detector="mask_rcnn")
    assert code == 1 and trainings == ["mask_rcnn baseline"]
    (failed,) = read_rows(grid.out)
    assert failed["status"] == "oom" and "no memory for masks" in failed["reason"]
    assert failed["metrics"]["AP"] is not None and "segm_metrics" not in failed
    assert failed["training"]["steps"] == 3
    weights = torch.load(grid.out / failed["weights"], weights_only=True)["model"]

    # The same command, not told to retry anything.
    code, printed, trainings = grid(detector="mask_rcnn")
    assert code == 0 and trainings == []
    assert "trained already, on the same training data, and now only evaluated: mask_rcnn baseline" in printed
    (row,) = read_rows(grid.out)
    assert row["status"] == "ok" and row["key"] == failed["key"]
    assert row["metrics"] == failed["metrics"] and row["segm_metrics"]["AP"] is not None
    assert row["training"] == failed["training"]
    after = torch.load(grid.out / row["weights"], weights_only=True)["model"]
    assert all(torch.equal(after[name], value) for name, value in weights.items())

    # And once it is good, it is done.
    code, printed, trainings = grid(detector="mask_rcnn")
    assert code == 0 and "1 done, 0 to run" in printed and "only evaluated" not in printed


def test_a_mended_val_part_is_evaluated_without_training(grid, data, monkeypatch):
    def bad(*_):
        raise DataError(data / "val2017" / "x.png", ["it does not decode"])

    with monkeypatch.context() as broken:
        broken.setattr(experiment, "evaluate", bad)
        assert grid()[0] == 1
    (failed,) = read_rows(grid.out)
    assert failed["status"] == "bad_data"

    edit(data, "val", lambda content: content["annotations"].pop())
    code, printed, trainings = grid("--dry-run")
    assert code == 0 and "to evaluate" in printed
    code, printed, trainings = grid()
    assert code == 0 and trainings == [] and "only evaluated: atss baseline" in printed
    # What failed on the data as they were stands in no table any more, and is kept.
    (row,) = read_rows(grid.out)
    assert row["status"] == "ok" and row["key"] != failed["key"]
    assert row["cell"]["train_fingerprint"] == failed["cell"]["train_fingerprint"]
    assert row["cell"]["data_fingerprint"] != failed["cell"]["data_fingerprint"]
    (kept,) = (grid.out / "cells" / "replaced").glob("*/*.json")
    assert json.loads(kept.read_text()) == failed

    # A good row is of the data that it was measured on, and stays.
    edit(data, "val", lambda content: content["annotations"].pop())
    code, printed, trainings = grid()
    assert code == 0 and trainings == [] and len(read_rows(grid.out)) == 2


def test_other_training_data_are_trained_on(grid, data):
    assert grid()[2] == ["atss baseline"]
    edit(data, "train", lambda content: content["annotations"].pop())
    code, printed, trainings = grid()
    assert code == 0 and trainings == ["atss baseline"] and "only evaluated" not in printed


def test_another_test_needs_no_other_training(grid):
    assert grid()[2] == ["atss baseline"]
    code, printed, trainings = grid("--test-sizes", "96")
    assert code == 0 and trainings == [] and "only evaluated: atss baseline" in printed
    assert len({row["weights"] for row in read_rows(grid.out)}) == 1 and len(read_rows(grid.out)) == 2


def test_a_fresh_run_trains_again_and_keeps_the_old_weights(grid):
    assert grid()[2] == ["atss baseline"]
    (before,) = read_rows(grid.out)
    beside = grid.out / "cells" / before["key"]
    beside.mkdir(exist_ok=True)
    (beside / "detections.json.gz").write_text("of the old row")
    code, printed, trainings = grid("--fresh")
    assert code == 0 and trainings == ["atss baseline"] and "only evaluated" not in printed
    (after,) = read_rows(grid.out)
    assert after["metrics"] == before["metrics"] and after["training"]["loss"] == before["training"]["loss"]
    replaced = grid.out / "cells" / "replaced"
    for name in (f"{before['key']}.json", "*/checkpoint.pt", "*/losses.jsonl", f"{before['key']}/detections.json.gz"):
        assert len(list(replaced.glob(f"*/{name}"))) == 1, name
    (old,) = replaced.glob("*/*.json")
    assert json.loads(old.read_text()) == before
    assert (beside / "detections.json.gz").read_bytes() != b"of the old row"


def test_what_a_failed_run_left_beside_its_row_is_gone_before_the_next_begins(grid, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(experiment, "evaluate", lambda *_: 1 / 0)
        assert grid()[0] == 1
    (failed,) = read_rows(grid.out)
    beside = grid.out / "cells" / failed["key"]
    assert (beside / "error.txt").exists()
    (beside / "detections.json.gz").write_text("of the failed run")
    assert grid()[0] == 0
    assert not (beside / "error.txt").exists()
    assert (beside / "detections.json.gz").read_bytes() != b"of the failed run"


def test_weights_without_a_record_of_the_end_are_trained_on(grid):
    """The record is written last: killed before it, a run goes on from the checkpoint, which has no step left to do."""
    assert grid()[0] == 0
    (row,) = read_rows(grid.out)
    (record,) = grid.out.glob("cells/*/training.json")
    record.unlink()
    (grid.out / "cells" / f"{row['key']}.json").unlink()
    code, _, trainings = grid()
    assert code == 0 and trainings == ["atss baseline"]
    assert read_rows(grid.out)[0]["metrics"] == row["metrics"]
    # A record without weights is no training, either.
    (grid.out / row["weights"]).unlink()
    assert grid("--fresh")[2] == ["atss baseline"]


def test_data_that_change_under_a_run_are_not_recorded_as_what_they_were(grid, data, monkeypatch):
    build = run.build_grid

    def late_change(*arguments):
        edit(data, "val", lambda content: content["annotations"].pop())
        return build(*arguments)

    monkeypatch.setattr(run, "build_grid", late_change)
    code, _, trainings = grid()
    assert code == 1 and trainings == []
    (row,) = read_rows(grid.out)
    assert row["status"] == "bad_data" and "changed after this run had begun" in row["reason"]


def spoil(image: Path) -> bytes:
    """Overwrite the middle of an image file, and return what it was."""
    sound = image.read_bytes()
    middle = len(sound) // 2
    image.write_bytes(sound[:middle] + bytes(64) + sound[middle + 64 :])
    return sound


def test_a_small_set_with_an_image_that_does_not_decode_is_refused(grid, data):
    image = sorted((data / "val2017").iterdir())[0]
    spoil(image)
    code, printed, trainings = grid()
    assert code == 2 and image.name in printed and "does not decode" in printed
    assert trainings == [] and not grid.out.exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_of_a_large_set_that_does_not_decode_ends_its_cell_as_bad_data(grid, data, monkeypatch, split):
    monkeypatch.setattr(image_files, "DECODED_PIXELS", 0)
    image = sorted((data / f"{split}2017").iterdir())[0]
    sound = spoil(image)
    assert grid()[0] == 1
    (row,) = read_rows(grid.out)
    assert row["status"] == "bad_data" and image.name in row["reason"]
    # Put right, an image of val needs no more training.
    image.write_bytes(sound)
    code, _, trainings = grid(*(["--retry-failed"] if split == "train" else []))
    assert code == 0 and trainings == (["atss baseline"] if split == "train" else [])


def test_masks_are_asked_for_before_anything_is_trained_or_written(grid, data):
    def strip(content):
        for annotation in content["annotations"][:2]:
            annotation["segmentation"] = []

    for split in ("train", "val"):
        edit(data, split, strip)
    code, printed, trainings = grid(detector="mask_rcnn,atss")
    assert code == 2 and trainings == [] and not grid.out.exists()
    assert "instances_train2017.json" in printed and "instances_val2017.json" in printed and "segmentation" in printed
    assert grid()[0] == 0


def test_bad_annotations_are_refused_or_left_out_and_counted(grid, data):
    def misplace(content):
        content["annotations"][0]["bbox"] = [500, 10, 20, 20]
        content["annotations"][1]["bbox"] = [5, 10, -4, 20]

    edit(data, "train", misplace)
    edit(data, "val", lambda content: content["annotations"][0].update(category_id=99))
    code, printed, _ = grid()
    assert code == 2 and "--bad-annotations drop" in printed and not grid.out.exists()
    code, printed, _ = grid("--bad-annotations", "drop")
    assert code == 0
    (row,) = read_rows(grid.out)
    assert sum(row["dropped"]["train"].values()) == 2 and sum(row["dropped"]["val"].values()) == 1
    table = (grid.out / "table.md").read_text()
    assert "Annotations left out by --bad-annotations drop: 2 of train (" in table and "; 1 of val (" in table


def test_an_image_beyond_the_limit_is_refused_by_name_of_the_option(grid):
    code, printed, _ = grid("--max-image-pixels", "1000")
    assert code == 2 and "--max-image-pixels" in printed and not grid.out.exists()


def a_cell(**changes) -> Cell:
    row = make_row("LSC", 1)["cell"]
    others = {
        "train_fingerprint": "bead",
        "max_size": 160,
        "test_size": (128,),
        "test_flip": False,
        "weights": "none",
        "channels": 16,
        "batch_size": 2,
        "optimizer": "sgd",
        "backbone_lr": 1.0,
        "offset_lr": 1.0,
        "weight_decay": 0.0,
        "warmup": 0,
    }
    return replace(Cell(**{**row, **others, "image_size": (128,)}), **changes)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"data_fingerprint": "other"}, True),
        ({"test_size": (96,)}, True),
        ({"test_flip": True}, True),
        ({"data": "moved"}, True),
        ({"train_fingerprint": "other"}, False),
        ({"seed": 1}, False),
        ({"image_size": (96,)}, False),
        ({"max_size": 200}, False),
        ({"steps": 401}, False),
        ({"precision": "bf16"}, False),
        ({"backend": "torch"}, False),
    ],
)
def test_what_decides_the_weights(change, same):
    assert (a_cell(**change).training_key == a_cell().training_key) == same
    assert a_cell(**change).key != a_cell().key


def test_only_failures_on_changed_data_are_outdated(tmp_path):
    cell = a_cell()
    old = replace(cell, data_fingerprint="old").stored()
    other = replace(cell, data_fingerprint="old", seed=1).stored()
    for key, status, fields, more in (
        ("failed", "crashed", old, {"training": {"steps": 1}}),
        ("diverged", "diverged", old, {}),
        ("bad", "bad_data", old, {}),
        ("stranger", "bad_data", other, {}),
        (cell.key, "bad_data", cell.stored(), {}),
    ):
        write_row(tmp_path, make_row(status=status, key=key) | {"cell": fields} | more)
    good = make_row(key="good") | {"cell": old}
    write_row(tmp_path, good)
    assert {row["key"] for row in trained.outdated(read_rows(tmp_path), [cell])} == {"failed", "bad"}


def dies_in_its_evaluation(connection, job, place):
    """A worker that is killed after it has learned something."""
    connection.recv()
    connection.send(Learned({"training": {"steps": 3}}))
    connection.send(Learned({"metrics": {"AP": 12.5}}))
    time.sleep(0.2)
    os._exit(9)


def test_what_a_killed_process_had_learned_is_in_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "work", dies_in_its_evaluation)
    job = Job(tmp_path, Reading(), {}, tmp_path, "cpu", 1, None, "command", False, tmp_path, tmp_path)
    run_cells([a_cell()], job, 1, lambda *_: None)
    (row,) = read_rows(tmp_path)
    assert row["status"] == "crashed" and row["metrics"]["AP"] == 12.5 and row["training"]["steps"] == 3
