"""Data directories: what the reader makes of good ones, and what it says about bad files and folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny_coco import REAL, annotation, documents, edited, json_path, needs_coco, write

from ablations.data.coco import find_root, read_dataset, read_image, read_split
from ablations.data.problems import DataError


def test_a_sound_directory(tmp_path):
    data = read_dataset(write(tmp_path))
    train = data.train
    assert [record.image_id for record in train.images] == [12, 25, 31]
    assert train.category_ids == data.val.category_ids == (3, 7, 90)
    assert train.category_names == ("dog", "cat", "bird")
    tall, empty, wide = train.images
    assert (tall.width, tall.height, Path(tall.path).name) == (10, 24, "tall.png")
    assert tall.boxes.dtype == np.float32 and tall.labels.dtype == np.int64
    assert empty.boxes.shape == (0, 4) and empty.labels.shape == (0,) and empty.crowd_boxes.shape == (0, 4)
    # xywh becomes corners, the crowd region stands apart, file order stays.
    assert wide.boxes.tolist() == [[2.5, 3, 12.5, 8], [4, 4, 8.5, 15.25]]
    assert wide.labels.tolist() == [2, 1]
    assert wide.crowd_boxes.tolist() == [[0, 0, 20, 16]]
    assert wide.area.tolist() == [10 * 5 * 0.75, 4.5 * 11.25 * 0.75]
    assert wide.segmentations[0][0].tolist() == [2.5, 3, 12.5, 3, 12.5, 8]
    assert data.notes == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_category_ids_make_the_round_trip(tmp_path):
    train = read_split(write(tmp_path), "train")
    given = {a["image_id"]: [] for a in documents()["train"]["annotations"]}
    for entry in documents()["train"]["annotations"]:
        if not entry["iscrowd"]:
            given[entry["image_id"]].append(entry["category_id"])
    for record in train.images:
        assert [train.category_ids[label] for label in record.labels] == given.get(record.image_id, [])


def test_ground_truth_is_the_file_with_ids_from_one(tmp_path):
    def change(document):
        document["annotations"][0]["id"] = 0
        document["annotations"].append(annotation(57, 12, 7, [5, 5, 0, 2]))

    contents = edited(change)
    truth = read_split(write(tmp_path, contents), "train").ground_truth
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3, 4, 5]
    for ours, given in zip(truth["annotations"], contents["train"]["annotations"], strict=True):
        assert {**ours, "id": given["id"]} == given
    keys = ("id", "file_name", "width", "height")
    given = {tuple(image[key] for key in keys) for image in contents["train"]["images"]}
    assert {tuple(image[key] for key in keys) for image in truth["images"]} == given
    assert {(c["id"], c["name"]) for c in truth["categories"]} == {(3, "dog"), (7, "cat"), (90, "bird")}
    json.dumps(truth, allow_nan=False)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
def test_a_perfect_answer_has_full_precision(tmp_path):
    split = read_split(write(tmp_path), "train")
    truth = COCO()
    truth.dataset = split.ground_truth
    truth.createIndex()
    answers = [
        {"image_id": r.image_id, "category_id": split.category_ids[label], "bbox": [x, y, X - x, Y - y], "score": 0.9}
        for r in split.images
        for label, (x, y, X, Y) in zip(r.labels, r.boxes.tolist(), strict=True)
    ]
    evaluation = COCOeval(truth, truth.loadRes(answers), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)
    # Run lengths and polygons are such as pycocotools takes.
    assert [truth.annToMask(a).sum() > 0 for a in truth.dataset["annotations"]] == [True] * 4


def test_both_forms_of_the_layout(tmp_path):
    write(tmp_path / "coco")
    assert find_root(tmp_path) == tmp_path / "coco"
    assert read_dataset(tmp_path).fingerprint == read_dataset(tmp_path / "coco").fingerprint


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    first = read_dataset(write(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert read_dataset(tmp_path / "b").fingerprint == first.fingerprint
    path = json_path(tmp_path / "b")
    path.write_text(path.read_text().replace("[1, 2, 3, 4]", "[1, 2, 3, 5]"))
    changed = read_dataset(tmp_path / "b")
    assert changed.fingerprint != first.fingerprint
    assert changed.val.fingerprint == first.val.fingerprint
    with open(tmp_path / "a" / "val2017" / "a.jpg", "ab") as file:
        file.write(b"\0")
    assert read_dataset(tmp_path / "a").val.fingerprint != first.val.fingerprint


def test_missing_directories_and_files(tmp_path):
    for root, fragment in ((tmp_path / "none", "no such directory"), (tmp_path, "no COCO layout here")):
        with pytest.raises(DataError, match=fragment) as caught:
            read_dataset(root)
        assert str(root) in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a directory"):
        read_dataset(tmp_path / "file")
    with pytest.raises(DataError, match=r"'a\\x00b': no such directory"):
        read_dataset("a\0b")
    root = write(tmp_path / "data")
    shutil.rmtree(root / "val2017")
    with pytest.raises(DataError, match=r"data/val2017: no such directory, but instances_val2017\.json names 2 images"):
        read_dataset(root)
    json_path(root, "train").unlink()
    with pytest.raises(DataError, match=r"2 problems[^$]*instances_train2017\.json: no such file[^$]*val2017: no such"):
        read_dataset(root)
    with pytest.raises(ValueError, match="the splits are train, val"):
        read_split(root, "test")


@needs_coco
def test_a_slice_of_the_real_coco_reads_as_it_is():
    data = read_dataset(REAL)
    for split, images, crowds, empty in ((data.train, 64, 7, 2), (data.val, 41, 5, 1)):
        assert len(split.images) == images
        assert sum(len(record.crowd_boxes) for record in split.images) == crowds
        assert sum(len(record.boxes) + len(record.crowd_boxes) == 0 for record in split.images) == empty
        assert len(split.category_ids) == 80 and split.category_ids[-1] == 90
        content = json.loads(split.path.read_text())
        truth = split.ground_truth
        assert len(truth["annotations"]) == len(content["annotations"])
        for ours, given in zip(truth["annotations"], content["annotations"], strict=True):
            assert all(ours[key] == value for key, value in given.items() if key != "id")
        for record in split.images:
            assert read_image(record).shape == (record.height, record.width, 3)
    # Results that were published name the data by these.
    assert data.train.fingerprint == "619d999ee0c60436881880d0f7fcac9a"
    assert data.val.fingerprint == "95fc661ffc69b2c9c1e78849183491d4"
    assert data.fingerprint == "c00f9d54920e88bd48d27ec8a1820da9"
    assert data.notes == [] and data.train.dropped == data.val.dropped == {}
