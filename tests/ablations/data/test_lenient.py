"""What other tools read is read as they read it, and counted; boxes that cannot be are left out if that is asked."""

import copy
import json
import math

import pytest
from perfect_answers import perfect, pycocotools_on
from tiny_coco import annotation, documents, edited, json_path, problem, set_in, write, write_json

from ablations.data import image_files
from ablations.data.check import read_instances
from ablations.data.coco import read_dataset, read_split
from ablations.data.images import read_header
from ablations.data.problems import DataError
from ablations.evaluation.evaluate import METRICS, evaluate


def every(section: str, change):
    """A change of every entry of a section."""

    def changed(document):
        for entry in document[section]:
            change(entry)

    return changed


# A change, and what the note counts. `annotations` are four, one of them a crowd.
LENIENT = {
    "iscrowd-absent": (every("annotations", lambda a: a.pop("iscrowd")), "iscrowd absent (4, taken as 0)"),
    "iscrowd-null": (every("annotations", lambda a: a.update(iscrowd=None)), "iscrowd null (4, taken as 0)"),
    "iscrowd-boolean": (
        every("annotations", lambda a: a.update(iscrowd=bool(a["iscrowd"]))),
        "iscrowd boolean (4, taken as 0 or 1)",
    ),
    "iscrowd-real": (
        every("annotations", lambda a: a.update(iscrowd=float(a["iscrowd"]))),
        "iscrowd written as 0.0 or 1.0 (4, taken as 0 or 1)",
    ),
    "area-absent": (every("annotations", lambda a: a.pop("area")), "area absent (4, width × height)"),
    "area-null": (every("annotations", lambda a: a.update(area=None)), "area null (4, width × height)"),
    "image-id-real": (set_in("images", 1, "id", 12.0), "ids written as 1.0 (1, taken as 1)"),
    "all-ids-real": (
        every("annotations", lambda a: a.update({k: float(a[k]) for k in ("id", "image_id", "category_id")})),
        "ids written as 1.0 (12, taken as 1)",
    ),
    "sizes-real": (
        every("images", lambda i: i.update(width=float(i["width"]), height=float(i["height"]))),
        "image sizes written as 1.0 (6, taken as 1)",
    ),
    "width-absent": (every("images", lambda i: i.pop("width")), "image width absent (3, taken from the file)"),
    "size-null": (
        every("images", lambda i: i.update(width=None, height=None)),
        "image width null (3, taken from the file), image height null (3, taken from the file)",
    ),
    "category-unnamed": (every("categories", lambda c: c.pop("name")), "category without a name (3, named by its id)"),
    "category-named-null": (set_in("categories", 0, "name", None), "category without a name (1, named by its id)"),
    "category-spaces": (
        every("categories", lambda c: c.update(name=f"\u00a0{c['name']} \u3000\n")),
        "category names with white space at an end (3, stripped)",
    ),
    "segmentation-null": (
        every("annotations", lambda a: a.update(segmentation=None)),
        "segmentation that is no mask (4, not needed for boxes)",
    ),
    "segmentation-object": (set_in("annotations", 1, "segmentation", {}), "segmentation that is no mask (1, not need"),
    "segmentation-flat": (
        every("annotations", lambda a: a.update(segmentation=[4.0, 6, 20, 6, 20, 20])),
        "segmentation that is no mask (4, not needed for boxes)",
    ),
    "segmentation-pairs": (
        set_in("annotations", 0, "segmentation", [[[4, 6], [20, 6], [20, 20]]]),
        "segmentation that is no mask (1, not needed for boxes)",
    ),
    "segmentation-garbage": (
        set_in("annotations", 0, "segmentation", {"counts": [math.nan], "size": "x"}),
        "segmentation that is no mask (1, not needed for boxes)",
    ),
}


@pytest.mark.parametrize("case", LENIENT)
def test_what_other_tools_read_is_read_and_counted(tmp_path, case):
    """The split is that of the file as COCO would write it, but for what the change itself says."""
    change, counted = LENIENT[case]
    root = write(tmp_path, edited(change))
    split, sound = read_split(root, "train", bad_annotations="refuse"), read_split(write(tmp_path / "sound"), "train")
    (note,) = split.notes
    assert note.startswith("read leniently: ") and counted in note
    assert split.dropped == {} == sound.dropped
    assert [r.image_id for r in split.images] == [r.image_id for r in sound.images] == [12, 25, 31]
    for ours, other in zip(split.images, sound.images, strict=True):
        assert (ours.width, ours.height, type(ours.image_id)) == (other.width, other.height, int)
        if not case.startswith("iscrowd"):
            assert ours.boxes.tolist() == other.boxes.tolist() and ours.labels.tolist() == other.labels.tolist()
            assert ours.crowd_boxes.tolist() == other.crowd_boxes.tolist()
    crowds = sum(len(record.crowd_boxes) for record in split.images)
    assert crowds == (0 if case in ("iscrowd-absent", "iscrowd-null") else 1)
    wide = split.images[2]
    if case.startswith("area"):
        assert wide.area.tolist() == [10 * 5, 4.5 * 11.25]
    names = {"category-unnamed": ("3", "7", "90"), "category-named-null": ("dog", "7", "bird")}
    assert split.category_names == names.get(case, ("dog", "cat", "bird"))
    json.dumps(split.ground_truth, allow_nan=False)
    metrics = evaluate(perfect(split), split.ground_truth, split.category_ids)
    assert metrics["AP"] == pytest.approx(100)
    if not case.startswith(("iscrowd-absent", "iscrowd-null", "area")):
        assert list(metrics.values()) == pycocotools_on(json_path(root), split)


def test_a_sound_file_needs_no_note(tmp_path):
    assert read_dataset(write(tmp_path)).notes == []


RENUMBERED = {
    # Texts in the order of the numbers that they stand for.
    "text": lambda value: f"{value:012d}",
    "beyond-float64": lambda value: 2**53 + value,
    "64-bit": lambda value: 2**63 - 1 - 10**9 + value,
    # The least and the largest number that an id can be: those of the categories 3 and of the annotation 900000031.
    "least": lambda value: value - 3 - 2**63,
    "largest": lambda value: value - 900000031 + 2**64 - 1,
}


def renumbered(document: dict, number) -> dict:
    document = copy.deepcopy(document)
    for section in ("images", "annotations", "categories"):
        for entry in document[section]:
            entry.update({key: number(entry[key]) for key in ("id", "image_id", "category_id") if key in entry})
    return document


@pytest.mark.parametrize("case", RENUMBERED)
def test_ids_of_any_kind_give_the_same_numbers(tmp_path, case):
    """Ids that differ by one beyond 2^53 are one number in float64, where pycocotools keeps some."""
    contents = {split: renumbered(document, RENUMBERED[case]) for split, document in documents().items()}
    for number, entry in enumerate(contents["val"]["annotations"]):
        entry["id"] = RENUMBERED[case](number + 3)
    split, plain = read_dataset(write(tmp_path / "a", contents)).train, read_dataset(write(tmp_path / "b")).train
    number = RENUMBERED[case]
    assert [record.image_id for record in split.images] == [number(12), number(25), number(31)]
    assert split.category_ids == (number(3), number(7), number(90))
    assert split.category_names == plain.category_names
    for ours, other in zip(split.images, plain.images, strict=True):
        assert ours.boxes.tolist() == other.boxes.tolist() and ours.labels.tolist() == other.labels.tolist()
    given = contents["train"]["annotations"]
    for entry, original in zip(split.ground_truth["annotations"], given, strict=True):
        assert {**entry, "id": original["id"]} == original
    # Predictions that are right here and wrong there, so that a mixed-up id changes the result.
    shifted = [
        (image, {**found, "boxes": found["boxes"] + 1.5 * (n % 2)}) for n, (image, found) in enumerate(perfect(split))
    ]
    small = [(record.image_id, found) for record, (_, found) in zip(plain.images, shifted, strict=True)]
    result = evaluate(shifted, split.ground_truth, split.category_ids)
    assert result == evaluate(small, plain.ground_truth, plain.category_ids)
    assert 0 < result["AP"] < 100 and tuple(result) == METRICS


BAD = {
    "outside": ({"bbox": [50, 2, 3, 4]}, "box outside its image"),
    "left": ({"bbox": [-5, 2, 3, 4]}, "box outside its image"),
    "negative": ({"bbox": [5, 5, -3, -4]}, "box of negative width or height"),
    "nan": ({"bbox": [1, math.nan, 3, 4]}, "box not finite"),
    "infinite": ({"bbox": [1, 2, math.inf, 4]}, "box not finite"),
    "minus-infinite": ({"bbox": [1, -math.inf, 3, 4]}, "box not finite"),
    "huge": ({"bbox": [1, 2, 10**400, 4]}, "box not finite"),
    "far": ({"bbox": [1, 2, 3, 2e9]}, "box not finite"),
    "category": ({"category_id": 4}, "unknown category"),
    "category-text": ({"category_id": "3"}, "unknown category"),
    "two": ({"category_id": 4, "bbox": [50, 2, 3, 4]}, "unknown category"),
    "three": ({"category_id": 4, "bbox": [50, 2, -3, 4]}, "unknown category"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_left_out_of_training_and_of_the_ground_truth(tmp_path, case, split):
    changes, reason = BAD[case]
    write(tmp_path)
    document = documents()["train"]
    extra = [annotation(77 + n, 31, 7, [5, 5, 3, 3]) | changes for n in range(2)]
    document["annotations"][1:1] = extra
    write_json(tmp_path, split, document)
    for image in document["images"]:
        source, target = (tmp_path / f"{part}2017" / image["file_name"] for part in ("train", split))
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    data = read_dataset(tmp_path)
    part, other = (data.train, data.val) if split == "train" else (data.val, data.train)
    assert part.dropped == {reason: 2} and other.dropped == {}
    note = f"instances_{split}2017.json: annotations left out of training and evaluation: {reason} (2)"
    assert data.notes[0] == note
    sound = read_split(write(tmp_path / "sound"), "train")
    assert part.ground_truth == sound.ground_truth
    for ours, clean in zip(part.images, sound.images, strict=True):
        assert ours.boxes.tolist() == clean.boxes.tolist() and ours.labels.tolist() == clean.labels.tolist()
        assert [len(polygons) for polygons in ours.segmentations] == [len(p) for p in clean.segmentations]
    error = problem(tmp_path, "--bad-annotations drop", split=split, bad_annotations="refuse")
    assert {text.split(":")[0] for text in error.problems} == {"annotations[1] (id 77)", "annotations[2] (id 78)"}


def test_nothing_but_bad_annotations_is_refused_in_both_modes(tmp_path):
    def change(document):
        for entry in document["annotations"]:
            entry["bbox"] = [90, 90, 3, 3]

    root = write(tmp_path, edited(change))
    problem(root, "no annotation with a box that is not a crowd region; left out were: box outside its image (4)")
    assert len(problem(root, bad_annotations="refuse").problems) == 4
    assert "outside its image" in str(problem(root, bad_annotations="refuse"))


def test_other_mistakes_are_refused_though_bad_annotations_are_left_out(tmp_path):
    def change(document):
        document["annotations"][0].update(category_id=4, iscrowd=3)
        document["annotations"][1]["image_id"] = 99

    error = problem(write(tmp_path, edited(change)), "'iscrowd' is 3", "unknown image id 99")
    assert len(error.problems) == 2


def test_arguments_of_the_reader(tmp_path):
    root = write(tmp_path)
    for read in (read_dataset, lambda root, **options: read_split(root, "val", **options)):
        with pytest.raises(ValueError, match="bad_annotations is 'ignore', expected refuse or drop"):
            read(root, bad_annotations="ignore")
        for most in (0, -1, 2.5, "9", True):
            with pytest.raises(ValueError, match=r"max_image_pixels is .*, expected a positive whole number"):
                read(root, max_image_pixels=most)


def test_a_size_that_is_not_declared_comes_from_the_file(tmp_path, monkeypatch):
    root = write(tmp_path, edited(every("images", lambda i: (i.pop("width"), i.pop("height")))))
    opened = []
    monkeypatch.setattr(image_files, "read_header", lambda *given: opened.append(given) or read_header(*given))
    assert [(r.width, r.height) for r in read_split(root, "train").images] == [(10, 24), (18, 18), (20, 16)]
    assert len(opened) == 3, "each header is read once"
    (root / "train2017" / "tall.png").write_bytes(b"no image")
    error = problem(root, "images[1] (id 12): its size is not declared, and its file 'tall.png': no image of a format")
    assert len(error.problems) == 1
    # One side is declared, and is not that of the file.
    contents = edited(lambda d: (d["images"][0].pop("width"), d["images"][0].update(height=15)))
    problem(write(tmp_path / "b", contents), "image 'wide.jpg' (id 31): it has 20x16 pixels, but 20x15 are declared")
    with pytest.raises(DataError, match=r"images\[0\] \(id 31\) has no 'width'"):
        read_instances(json_path(tmp_path / "b", "train"))
    # The pixels of such a file are bounded too, and a box is judged by its size.
    problem(root, "unless --max-image-pixels gives another", max_image_pixels=300)


def other_categories(val: list[dict], train: list[dict] | None = None) -> dict[str, dict]:
    contents = documents()
    contents["val"]["categories"] = val
    if train is not None:
        contents["train"]["categories"] = train
    return contents


def test_the_validation_split_may_lack_categories(tmp_path):
    """Its labels are those of training: 'dog' is 0 there, so 'cat' is 1 and 'bird' is 2 here as well."""
    data = read_dataset(write(tmp_path, other_categories([{"id": 90, "name": "bird"}, {"id": 7, "name": "cat"}])))
    assert data.val.category_ids == data.train.category_ids == (3, 7, 90)
    assert data.val.category_names == ("dog", "cat", "bird")
    assert [record.labels.tolist() for record in data.val.images] == [[2], [1]]
    truth = data.val.ground_truth
    assert [a["category_id"] for a in truth["annotations"]] == [7, 90]
    assert {c["id"] for c in truth["categories"]} == {3, 7, 90}
    assert data.notes == ["instances_val2017.json: categories of the training split that this one lacks: 1"]
    metrics = evaluate(perfect(data.val), truth, data.val.category_ids)
    assert list(metrics.values()) == pycocotools_on(json_path(tmp_path, "val"), data.val)
    assert metrics["AP"] == pytest.approx(100)
    whole = read_dataset(write(tmp_path / "whole"))
    assert data.val.fingerprint != whole.val.fingerprint and data.train.fingerprint == whole.train.fingerprint


def test_a_category_that_only_the_validation_split_has(tmp_path):
    more = [*documents()["val"]["categories"], {"id": 5, "name": "fish"}]
    data = read_dataset(write(tmp_path / "a", other_categories(more)))
    assert data.val.category_ids == (3, 7, 90)
    assert [record.labels.tolist() for record in data.val.images] == [[2], [1]]
    assert [c["id"] for c in data.val.ground_truth["categories"]] == [3, 7, 90]
    note = "categories without annotations that the training split lacks, left out: 'fish'"
    assert data.notes == [f"instances_val2017.json: {note}"]
    contents = other_categories(more)
    contents["val"]["annotations"][0]["category_id"] = 5
    problem(
        write(tmp_path / "b", contents),
        "category id 5 is 'fish', with 1 annotations, but absent in instances_train2017.json",
        split="val",
    )


def test_ids_swapped_between_the_splits_are_refused(tmp_path):
    swapped = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "bird"}]
    error = problem(
        write(tmp_path, other_categories(swapped)),
        "category id 3 is 'cat', but 'dog' in instances_train2017.json",
        "category id 7 is 'dog', but 'cat' in instances_train2017.json",
        split="val",
    )
    assert len(error.problems) == 2
    # White space at an end is no difference.
    same = [{"id": 3, "name": " dog"}, {"id": 7, "name": "cat\u00a0"}, {"id": 90, "name": "bird"}]
    assert read_dataset(write(tmp_path / "b", other_categories(same))).val.category_names == ("dog", "cat", "bird")
