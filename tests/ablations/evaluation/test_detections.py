"""The detections' file: COCO's results format, read by pycocotools, with the numbers of the row."""

import contextlib
import gzip
import io
import json

import numpy as np
import pytest
import torch
from evaluation_scenes import found, random_scene
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ablations.evaluation.detections import by_image, read_detections, write_detections
from ablations.evaluation.evaluate import METRICS, evaluate


def uneven(seed):
    """A scene whose boxes and scores have more digits than the file."""
    ground, predictions = random_scene(seed)
    for _, detections in predictions:
        detections["boxes"][:, 2:] += 1 + torch.rand(len(detections["boxes"]), 2)
        detections["scores"] -= torch.rand(len(detections["scores"])) / 16
    return ground, predictions


def test_pycocotools_finds_the_numbers_of_the_row_in_the_file(tmp_path):
    torch.manual_seed(0)
    ground, predictions = uneven(1)
    path = tmp_path / "detections.json.gz"
    write_detections(path, predictions, [1, 2, 3])
    stored = by_image(read_detections(path), [image for image, _ in predictions], [1, 2, 3])
    ours = evaluate(stored, ground, [1, 2, 3])
    (tmp_path / "results.json").write_bytes(gzip.decompress(path.read_bytes()))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = ground
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    theirs = [None if value < 0 else 100 * value for value in evaluation.stats]
    assert [ours[name] for name in METRICS] == theirs
    assert ours["AP"] == pytest.approx(evaluate(predictions, ground, [1, 2, 3])["AP"], abs=0.2)


def test_what_is_stored_is_near_what_was_found(tmp_path):
    torch.manual_seed(1)
    _, predictions = uneven(2)
    path = tmp_path / "detections.json.gz"
    write_detections(path, predictions, [7, "x", 9])
    for (image, before), (again, after) in zip(
        predictions, by_image(read_detections(path), [image for image, _ in predictions], [7, "x", 9]), strict=True
    ):
        assert image == again and np.array_equal(before["labels"], after["labels"])
        corners = np.concatenate([after["bbox"][:, :2], after["bbox"][:, :2] + after["bbox"][:, 2:]], axis=1)
        assert np.abs(corners - before["boxes"].numpy()).max(initial=0) <= 0.0101
        assert np.allclose(after["scores"], before["scores"].numpy(), rtol=5e-6, atol=0)
    # Stored again nothing changes, to the byte.
    whole = path.read_bytes()
    stored = by_image(read_detections(path), [image for image, _ in predictions], [7, "x", 9])
    write_detections(path, stored, [7, "x", 9])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("score", [0.0, 1.0, 1e-7, 0.99999994, 0.05])
def test_scores_of_any_size_are_numbers_of_json(tmp_path, score):
    path = tmp_path / "detections.json.gz"
    write_detections(path, [(1, found((1, 2, 3, 4, score, 0)))], [1])
    (entry,) = json.loads(gzip.decompress(path.read_bytes()))
    assert entry["score"] == pytest.approx(float(np.float32(score)), rel=5e-6) and entry["bbox"] == [1, 2, 2, 2]


def test_nothing_found_and_text_for_ids(tmp_path):
    path = tmp_path / "detections.json.gz"
    write_detections(path, [("a", found()), ("b", found())], ["c"])
    assert read_detections(path) == []
    predictions = [("a", found()), ('b"\n', found((1, 1, 5, 5, 0.5, 0))), ("d", found())]
    write_detections(path, predictions, ["c"])
    assert [entry["image_id"] for entry in read_detections(path)] == ['b"\n']
    assert [len(d["scores"]) for _, d in by_image(read_detections(path), ["a", 'b"\n', "d"], ["c"])] == [0, 1, 0]
    with pytest.raises(ValueError, match="image b"):
        by_image(read_detections(path), ["a"], ["c"])


def test_masks_are_stored_and_evaluated(tmp_path):
    mask = torch.zeros(1, 200, 200, dtype=torch.bool)
    mask[:, 10:30, 10:50] = True
    ground = {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 40]}
            | {"segmentation": [[10, 10, 50, 10, 50, 50, 10, 50]]}
        ],
        "categories": [{"id": 1}],
    }
    predictions = [(1, found((10, 10, 50, 50, 0.9, 0)) | {"masks": mask})]
    path = tmp_path / "detections.json.gz"
    write_detections(path, predictions, [1])
    stored = by_image(read_detections(path), [1], [1])
    assert evaluate(stored, ground, [1], "segm") == evaluate(predictions, ground, [1], "segm")
    assert evaluate(stored, ground, [1])["AP"] == pytest.approx(100)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "detections.json.gz"
    write_detections(path, [(1, found((1, 1, 5, 5, 0.5, 0)))], [1])
    whole = path.read_bytes()
    for damaged in (b"", whole[:30], whole[:-9], whole[:-1], whole[:15] + b"\xff\xff\xff" + whole[18:], b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is damaged: "):
            read_detections(path)


def test_a_bad_detection_leaves_the_old_file(tmp_path):
    path = tmp_path / "detections.json.gz"
    write_detections(path, [(1, found((1, 1, 5, 5, 0.5, 0)))], [1])
    with pytest.raises(ValueError, match="image 2: score 0 is nan"):
        write_detections(path, [(1, found()), (2, found((1, 1, 5, 5, float("nan"), 0)))], [1])
    assert len(read_detections(path)) == 1
