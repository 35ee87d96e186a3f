"""Masks: what is read is what pycocotools reads, and a split that passes the check can be trained on and evaluated."""

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from tiny_coco import documents, edited, json_path, write

from ablations.data.check import check_segmentations
from ablations.data.coco import read_dataset, read_split
from ablations.data.loader import Loader
from ablations.data.problems import DataError
from ablations.data.segments import MAX_POINT, bitmap, compact_polygons, read_segmentation, run_lengths
from ablations.evaluation.evaluate import evaluate

# pycocotools' masks are of before numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")


def read(value, width=20, height=16):
    """A segmentation as it is read from JSON."""
    return read_segmentation(compact_polygons(value) if type(value) is list else value, width, height)


@pytest.mark.parametrize("seed", range(8))
def test_compressed_run_lengths_decode_as_pycocotools_does(seed):
    generator = np.random.default_rng(seed)
    shape = [(1, 1), (1, 50), (37, 1), (31, 33), (480, 640), (200, 1), (64, 64), (99, 98)][seed]
    density = generator.uniform(0, 1)
    # Blocks, so that long runs and differences of both signs occur.
    mask = np.kron(generator.random(shape) < density, np.ones((3, 2))).astype(np.uint8)
    encoded = rle.encode(np.asfortranarray(mask))
    text = encoded["counts"].decode()
    flat = mask.flatten("F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    expected = np.diff(np.concatenate(([0], ends, [flat.size])))
    if flat[0]:
        expected = np.concatenate(([0], expected))
    assert run_lengths(text).tolist() == expected.tolist()
    value = {"counts": text, "size": list(mask.shape)}
    assert read(value, *mask.shape[::-1]) == (value, None, 0)
    if text != "0":
        assert read({"counts": text[:-1], "size": list(mask.shape)}, *mask.shape[::-1])[1]


RUNS = {"size": [16, 20], "counts": [20, 40, 10, 250]}
OTHER_RUNS = {"size": [16, 20], "counts": [5, 30, 285]}
FORMS = {
    "polygon": [[2, 3, 12.5, 3, 12, 8, 4, 9]],
    "polygons": [[2, 3, 12.5, 3, 12, 8], [15, 10, 19, 10, 19, 15]],
    "run-lengths": RUNS,
    "compressed": {"size": [16, 20], "counts": rle.frPyObjects(RUNS, 16, 20)["counts"].decode()},
    "list-of-run-lengths": [RUNS],
    "list-of-two-run-lengths": [RUNS, OTHER_RUNS],
    "reals": {"size": [16.0, 20.0], "counts": [20.0, 40, 10, 250.0]},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_pycocotools_reads_is_read(tmp_path, form):
    """The mask of the loader is, without scaling, that of pycocotools' annToMask on the file as it stands."""

    def change(document):
        document["annotations"][0]["segmentation"] = FORMS[form]

    root = write(tmp_path, edited(change))
    data = read_dataset(root, masks=True)
    check_segmentations(data.train)
    record = data.train.images[2]
    ours = bitmap(record.segmentations[0], 20, 16, 20, 16)
    file = COCO(str(json_path(root)))
    np.testing.assert_array_equal(ours, file.annToMask(file.anns[101]))
    assert ours.any()
    truth = COCO()
    truth.dataset = data.train.ground_truth
    truth.createIndex()
    np.testing.assert_array_equal(truth.annToMask(truth.anns[1]), ours)


UNUSABLE = {
    "text": ("1 2 3", "neither a list of polygons nor a run-length encoding"),
    "polygon-text": (["1 2 3"], "polygon 0 of its segmentation is not a flat list of finite numbers"),
    "polygon-odd": ([[1, 2, 3, 4, 5, 6, 7]], "polygon 0 of its segmentation has 7 numbers, expected x, y pairs"),
    "polygon-nan": ([[1, float("nan"), 3, 4, 5, 6]], "not a flat list of finite numbers"),
    "polygon-far": ([[1, 2, 3, 4, 5, 2.0 * MAX_POINT]], "not a flat list of finite numbers, at most 1000000"),
    "polygon-bool": ([[1, 2, 3, 4, 5, True]], "not a flat list of finite numbers"),
    "flat": ([1, 2, 3, 4, 5, 6], "polygon 0 of its segmentation is not a flat list"),
    "pairs": ([[[1, 2], [3, 4], [5, 6]]], "polygon 0 of its segmentation is not a flat list"),
    "other-size": ({**RUNS, "size": [20, 16]}, "not [16, 20], that of the image"),
    "size-bool": ({**RUNS, "size": [True, 20]}, "not [16, 20], that of the image"),
    "too-long": ({**RUNS, "counts": [300, 21]}, "do not add up to 20x16 pixels"),
    "negative": ({**RUNS, "counts": [330, -10]}, "do not add up"),
    "wraps": ({**RUNS, "counts": [2**64, 320]}, "do not add up"),
    "bad-text": ({**RUNS, "counts": "zzzz"}, "do not add up"),
    "half": ({**RUNS, "counts": [0.5, 319.5]}, "do not add up"),
    "no-counts": ({**RUNS, "counts": None}, "neither a list nor a string of counts"),
    "compressed-in-list": ([FORMS["compressed"]], "a list of compressed run lengths"),
    "bad-in-list": ([RUNS, {**RUNS, "counts": [1]}], "do not add up"),
    "mixed-list": ([[2, 3, 12.5, 3, 12, 8], RUNS], "polygon 1 of its segmentation is not a flat list"),
    "null": (None, "its segmentation is null"),
    "empty-object": ({}, "that of the image"),
    "empty": ([], "it has no segmentation"),
    "short": ([[1, 2], [1, 2, 3, 4]], "it has no segmentation"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_mask_is_a_problem_only_where_masks_are_needed(tmp_path, case):
    value, fragment = UNUSABLE[case]

    def change(document):
        document["annotations"][0]["segmentation"] = value
        document["annotations"][3]["segmentation"] = value

    root = write(tmp_path, edited(change))
    split = read_split(root, "train")
    assert split.images[2].segmentations == [None, None]
    for attempt in (lambda: check_segmentations(split), lambda: read_split(root, "train", masks=True)):
        with pytest.raises(DataError) as caught:
            attempt()
        assert [text.split(":")[0] for text in caught.value.problems] == [
            "annotations[0] (id 101)",
            "annotations[3] (id 56)",
        ]
        assert fragment in caught.value.problems[0] and "masks need polygons or run lengths" in str(caught.value)
        assert caught.value.path == json_path(root)
    with pytest.raises(DataError, match=r"annotations\[0\]"):
        Loader(split, 1, 0, (16,), 64, masks=True)


def test_the_annotation_is_named_as_it_stands_in_the_file(tmp_path):
    """Also where others before it were left out."""

    def change(document):
        document["annotations"][0]["bbox"] = [50, 50, 3, 3]
        document["annotations"][1]["category_id"] = 4
        document["annotations"][3]["segmentation"] = {}

    split = read_split(write(tmp_path, edited(change)), "train")
    assert sum(split.dropped.values()) == 2
    with pytest.raises(DataError, match=r"json: annotations\[3\] \(id 56\): the size of its run-length encoding"):
        check_segmentations(split)


def test_an_absent_segmentation_is_no_mask_either(tmp_path):
    def change(document):
        del document["annotations"][0]["segmentation"]

    split = read_split(write(tmp_path, edited(change)), "train")
    assert split.notes == []
    with pytest.raises(DataError, match=r"annotations\[0\] \(id 101\): it has no segmentation; masks need"):
        check_segmentations(split)


LACKING = {
    "crowd-empty": {"iscrowd": 1, "segmentation": []},
    "crowd-null": {"iscrowd": 1, "segmentation": None},
    "no-height": {"bbox": [2, 2, 5, 0], "area": 0, "segmentation": []},
}


@pytest.mark.parametrize("case", LACKING)
def test_what_training_ignores_needs_a_mask_in_evaluation_alone(tmp_path, case):
    contents = documents()
    for document in contents.values():
        document["annotations"][-1].update(LACKING[case])
    data = read_dataset(write(tmp_path, contents))
    check_segmentations(data.train)
    images, targets, _ = Loader(data.train, 3, 0, (16,), 64, masks=True).batch(0)
    assert all(len(target["masks"]) == len(target["boxes"]) for target in targets) and len(images) == 3
    with pytest.raises(DataError, match=r"instances_val2017\.json: annotations\[1\] \(id 2\): it"):
        check_segmentations(data.val)
    with pytest.raises(DataError, match=r"annotations\[1\] \(id 2\)"):
        read_dataset(tmp_path, masks=True)


def perfect_masks(split):
    """For every image, the masks of its ordinary objects as found."""
    for record in split.images:
        drawn = [
            bitmap(part, record.width, record.height, record.width, record.height) for part in record.segmentations
        ]
        masks = np.array(drawn, np.uint8).reshape(-1, record.height, record.width)
        found = {"boxes": record.boxes, "scores": np.ones(len(drawn)), "labels": record.labels, "masks": masks}
        yield record.image_id, found


def test_a_split_that_passes_can_be_evaluated(tmp_path):
    contents = documents()
    contents["val"]["annotations"] += [
        {
            **contents["val"]["annotations"][0],
            "id": 3,
            "iscrowd": 1,
            "segmentation": {"size": [12, 16], "counts": [192]},
        },
        {**contents["val"]["annotations"][0], "id": 4, "bbox": [3, 3, 0, 4], "segmentation": [[3, 3, 3, 7, 3, 5]]},
    ]
    data = read_dataset(write(tmp_path, contents))
    check_segmentations(data.val)
    truth = data.val.ground_truth
    assert len(truth["annotations"]) == 4
    metrics = evaluate(perfect_masks(data.val), truth, data.val.category_ids, "segm")
    assert metrics["AP50"] > 50


def test_true_is_no_side_of_an_image():
    assert read({"size": [1, 20], "counts": [20]}, 20, 1)[1] is None
    assert read({"size": [True, 20], "counts": [20]}, 20, 1)[1]


def test_an_outline_far_outside_its_image_is_drawn_in_little_memory():
    segmentation, problem, _ = read([[-1e6, -1e6, 1e6, -1e6, 1e6, 1e6, -1e6, 1e6]], 2, 2)
    assert problem is None
    assert bitmap(segmentation, 2, 2, 500, 500).all()
