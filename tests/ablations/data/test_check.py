"""Bad instances files: each problem is found before training, named with its place, and never a traceback."""

import os
import pickle

import pytest
from tiny_coco import annotation, documents, edited, json_path, set_in, write, write_json

from ablations.data import json_file, problems
from ablations.data.check import read_instances
from ablations.data.coco import read_dataset, read_split
from ablations.data.problems import DataError


def remove(*path):
    def change(node):
        for step in path[:-1]:
            node = node[step]
        del node[path[-1]]

    return change


def again(section, number, **changes):
    """A change that repeats an entry with some keys changed."""
    return lambda document: document[section].append({**document[section][number], **changes})


ANNOTATION = "annotations[1] (id 55)"
OPTION = "; --bad-annotations drop leaves it out"
IMAGE = "images[1] (id 12)"
BIG = 10**400

BAD = {
    "image-without-id": (remove("images", 1, "id"), ["images[1] has no 'id'"]),
    "image-without-name": (remove("images", 1, "file_name"), [IMAGE, "has no 'file_name'"]),
    "image-width-text": (set_in("images", 1, "width", "10"), [IMAGE, "'width' is '10', expected a whole number"]),
    "image-width-half": (set_in("images", 1, "width", 10.5), [IMAGE, "'width' is 10.5, expected a whole number"]),
    "image-not-object": (set_in("images", 1, [1]), ["images[1] is [1], expected an object"]),
    "image-id-mixed": (set_in("images", 1, "id", "12"), ["image ids are numbers and text, 25 and '12'"]),
    "image-id-null": (set_in("images", 1, "id", None), ["images[1]: 'id' is null, expected a whole number of 64 bits"]),
    "image-id-bool": (set_in("images", 1, "id", True), ["'id' is true"]),
    "image-id-half": (set_in("images", 1, "id", 12.5), ["'id' is 12.5"]),
    "image-id-65-bits": (set_in("images", 1, "id", 1 << 64), ["'id' is 18446744073709551616, expected a whole number"]),
    "image-id-rounded": (set_in("images", 1, "id", 1e17), ["'id' is 1e+17, expected a whole number"]),
    "image-id-huge": (set_in("images", 1, "id", BIG), ["images[1]: 'id' is 1000", "expected a whole number"]),
    "image-size-zero": (set_in("images", 1, "height", 0), [IMAGE, "declared height is 0 pixels"]),
    "image-size-negative": (set_in("images", 1, "height", -24), [IMAGE, "declared height is -24 pixels"]),
    "image-bomb": (set_in("images", 1, "height", 10**8), [IMAGE, "at most 178956970 pixels", "--max-image-pixels"]),
    "image-name-number": (set_in("images", 1, "file_name", 5), [IMAGE, "'file_name' is 5, expected a file name"]),
    "image-name-empty": (set_in("images", 1, "file_name", ""), [IMAGE, "'file_name' is ''"]),
    "image-name-absolute": (set_in("images", 1, "file_name", "/etc/passwd"), ["'/etc/passwd'", "leave the data dir"]),
    "image-name-dots": (set_in("images", 1, "file_name", "a/../../b.jpg"), ["'a/../../b.jpg'", "leave the data dir"]),
    "image-name-drive": (set_in("images", 1, "file_name", "C:b.jpg"), ["'C:b.jpg'", "leave the data directory"]),
    "image-name-backslash": (set_in("images", 1, "file_name", "..\\b.jpg"), ["forward slashes"]),
    "image-name-nul": (set_in("images", 1, "file_name", "b\0.jpg"), [r"'b\x00.jpg'", "file system can hold"]),
    "image-name-surrogate": (set_in("images", 1, "file_name", "\ud800.jpg"), [r"\ud800", "file system can hold"]),
    "image-name-escape-code": (set_in("images", 1, "file_name", "\x1b[2J/../x"), [r"\x1b[2J", "leave the data"]),
    "image-id-twice": (again("images", 1, file_name="x.jpg"), ["images[3] (id 12)", "image id 12 is given twice"]),
    "image-name-twice": (again("images", 1, id=99), ["images[3] (id 99)", "also that of images[1]"]),
    "image-name-twice-spelled": (again("images", 1, id=99, file_name="./tall.png"), ["also that of images[1]"]),
    "category-not-object": (set_in("categories", 0, "cat"), ["categories[0] is 'cat', expected an object"]),
    "category-without-id": (remove("categories", 0, "id"), ["categories[0] has no 'id'"]),
    "category-id-mixed": (
        again("categories", 0, id="7"),
        ["category ids are numbers and text, 3 and '7'"],
    ),
    "category-name-list": (set_in("categories", 0, "name", ["cat"]), ["categories[0]: 'name' is ['cat']"]),
    "category-name-control": (set_in("categories", 0, "name", "c\nat"), [r"'c\nat', expected printable text"]),
    "category-id-twice": (again("categories", 0), ["categories[3]: the category id 7 is given twice"]),
    "annotation-not-object": (set_in("annotations", 1, None), ["annotations[1] is null, expected an object"]),
    "annotation-without-id": (remove("annotations", 1, "id"), ["annotations[1] has no 'id'"]),
    "annotation-without-box": (remove("annotations", 1, "bbox"), [ANNOTATION, "has no 'bbox'"]),
    "annotation-without-image": (remove("annotations", 1, "image_id"), [ANNOTATION, "has no 'image_id'"]),
    "annotation-without-category": (remove("annotations", 1, "category_id"), [ANNOTATION, "has no 'category_id'"]),
    "annotation-id-twice": (set_in("annotations", 1, "id", 101), ["annotations[1] (id 101)", "101 is given twice"]),
    "annotation-id-mixed": (
        set_in("annotations", 1, "id", "55"),
        ["annotation ids are numbers and text, 56 and '55'"],
    ),
    "annotation-id-bool": (set_in("annotations", 1, "id", False), ["annotations[1]: 'id' is false, expected a whole"]),
    "annotation-image-text": (set_in("annotations", 1, "image_id", "12"), [ANNOTATION, "unknown image id '12'"]),
    "annotation-area-text": (set_in("annotations", 1, "area", "9"), [ANNOTATION, "'area' is '9'"]),
    "annotation-area-nan": (set_in("annotations", 1, "area", float("nan")), [ANNOTATION, "'area' is nan"]),
    "annotation-area-negative": (set_in("annotations", 1, "area", -1), [ANNOTATION, "'area' is -1"]),
    "annotation-area-bool": (set_in("annotations", 1, "area", True), [ANNOTATION, "'area' is true"]),
    "annotation-crowd-two": (set_in("annotations", 1, "iscrowd", 2), [ANNOTATION, "'iscrowd' is 2, expected 0 or 1"]),
    "annotation-crowd-text": (set_in("annotations", 1, "iscrowd", "0"), [ANNOTATION, "'iscrowd' is '0'"]),
    "annotation-crowd-half": (set_in("annotations", 1, "iscrowd", 0.5), [ANNOTATION, "'iscrowd' is 0.5"]),
    "unknown-category": (set_in("annotations", 1, "category_id", 4), [ANNOTATION, f"unknown category id 4{OPTION}"]),
    "unknown-image": (set_in("annotations", 1, "image_id", 0), [ANNOTATION, "unknown image id 0"]),
    "box-short": (set_in("annotations", 1, "bbox", [1, 2, 3]), [ANNOTATION, "[1, 2, 3], expected four"]),
    "box-object": (set_in("annotations", 1, "bbox", {"x": 1}), [ANNOTATION, "{'x': 1}, expected four"]),
    "box-null": (set_in("annotations", 1, "bbox", None), [ANNOTATION, "'bbox' is null"]),
    "box-text": (set_in("annotations", 1, "bbox", 2, "3"), [ANNOTATION, "[1, 2, '3', 4], expected four"]),
    "box-bool": (set_in("annotations", 1, "bbox", 2, True), [ANNOTATION, "[1, 2, True, 4], expected four"]),
    "box-nested": (set_in("annotations", 1, "bbox", 2, [3]), [ANNOTATION, "[1, 2, [3], 4], expected four"]),
    "box-huge": (set_in("annotations", 1, "bbox", 2, BIG), [ANNOTATION, "expected four finite numbers", OPTION]),
    "box-nan": (
        set_in("annotations", 1, "bbox", 0, float("nan")),
        [ANNOTATION, "[nan, 2, 3, 4], expected four finite"],
    ),
    "box-infinite": (set_in("annotations", 1, "bbox", 2, float("inf")), [ANNOTATION, "[1, 2, inf, 4], expected"]),
    "box-negative-width": (
        set_in("annotations", 1, "bbox", 2, -3),
        [ANNOTATION, f"the box [1, 2, -3, 4] has a negative width or height{OPTION}"],
    ),
    "box-negative-height": (set_in("annotations", 1, "bbox", 3, -0.5), [ANNOTATION, "negative width or height"]),
    "box-right-of-image": (
        set_in("annotations", 1, "bbox", 0, 10),
        [ANNOTATION, f"outside its image of 10x24 pixels{OPTION}"],
    ),
    "box-below-image": (set_in("annotations", 1, "bbox", 1, 24), [ANNOTATION, "outside its image of 10x24"]),
    "box-left-of-image": (set_in("annotations", 1, "bbox", 0, -3), [ANNOTATION, "outside its image"]),
    "box-above-image": (set_in("annotations", 1, "bbox", 1, -4), [ANNOTATION, "outside its image"]),
    "thin-box-outside": (set_in("annotations", 1, "bbox", [10.1, 2, 0.01, 4]), [ANNOTATION, "outside its image"]),
    "empty-box-far-away": (set_in("annotations", 1, "bbox", [30, 2, 0, 4]), [ANNOTATION, "outside its image"]),
    "images-missing": (remove("images"), ["has no 'images'"]),
    "images-object": (set_in("images", {"0": {}}), ["'images' is not a list"]),
    "images-empty": (set_in("images", []), ["has no images: the list is empty"]),
    "annotations-missing": (remove("annotations"), ["has no 'annotations'"]),
    "annotations-null": (set_in("annotations", None), ["'annotations' is not a list"]),
    "annotations-empty": (set_in("annotations", []), ["has no annotations: the list is empty"]),
    "categories-missing": (remove("categories"), ["has no 'categories'"]),
    "categories-empty": (set_in("categories", []), ["has no categories: the list is empty"]),
    "only-crowd": (lambda d: d.update(annotations=d["annotations"][2:3]), ["no annotation with a box that is not a"]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_bad_entry_is_named_with_its_file_and_place(tmp_path, case, split):
    change, fragments = BAD[case]
    contents = edited(change)
    # The same content serves as either part.
    write(tmp_path, documents())
    write_json(tmp_path, split, contents["train"])
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path, bad_annotations="refuse")
    message = str(caught.value)
    assert caught.value.path == json_path(tmp_path, split)
    assert f"instances_{split}2017.json" in message
    # One mistake is one problem, except that what an unreadable entry defines is then unknown to those that use it.
    followed = ": unknown category id " if case.startswith("category") else ": unknown image id "
    assert len([problem for problem in caught.value.problems[1:] if followed not in problem]) == 0
    for fragment in fragments:
        assert fragment in message
    assert all(character.isprintable() or character == "\n" for character in message)


def spelled(text: bytes):
    return lambda content: text


BROKEN = {
    "empty": (lambda text: b"", "broken JSON at line 1 column 1"),
    "cut": (lambda text: text[:-40], "broken JSON at line 1 column"),
    "second-line": (lambda text: b'{"images": [],\n  "x": }', "broken JSON at line 2 column 8"),
    "trailing": (lambda text: text + b"}", "broken JSON at line 1 column"),
    "not-utf8": (lambda text: text.replace(b"wide", b"w\xff\xfe"), "not UTF-8 text at byte"),
    "deep": (lambda text: b"[" * 200_000, "nested too deeply"),
    "deep-inside": (
        lambda text: text.replace(b'"year"', b'"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b', "year"'),
        "nested too deeply",
    ),
    "endless-integer": (lambda text: text.replace(b"101", b"1" * 5000), "broken JSON: "),
    "top-level-list": (lambda text: b"[" + text + b"]", "the top level is [{"),
    "top-level-null": (lambda text: b"null", "the top level is null, expected an object"),
    "key-twice": (lambda text: text.replace(b'"id": 55', b'"id": 54, "id": 55'), "an object (id 55) has the key 'id'"),
    "section-twice": (lambda text: b'{"images": 3, ' + text[1:], "has the key 'images' more than once"),
    "overflow-in-box": (lambda text: text.replace(b"[1, 2, 3, 4]", b"[1, 2, 1e999, 4]"), "[1, 2, inf, 4], expected"),
    "nan-in-box": (lambda text: text.replace(b"[1, 2, 3, 4]", b"[NaN, 2, 3, 4]"), "annotations[1] (id 55): 'bbox'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_text(tmp_path, case):
    change, fragment = BROKEN[case]
    path = json_path(write(tmp_path))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path, bad_annotations="refuse")
    assert str(caught.value).startswith(f"{path}: ")
    assert fragment in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_mistake(tmp_path, encoding):
    path = json_path(write(tmp_path))
    path.write_text(path.read_text(), encoding=encoding)
    assert len(read_split(tmp_path, "train").images) == 3


def test_every_problem_of_both_files_is_listed_at_once(tmp_path):
    contents = documents()
    contents["train"]["annotations"][0]["bbox"][2] = -1
    contents["train"]["annotations"][1].update(category_id=4, area=-1)
    contents["train"]["images"][0]["file_name"] = "../x.jpg"
    contents["train"]["annotations"][3]["bbox"] = [50, 50, 1, 1]
    contents["train"]["images"][0].update(width=20)
    contents["val"]["annotations"][0]["image_id"] = 77
    write(tmp_path, contents)
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path, bad_annotations="refuse")
    message = str(caught.value)
    train, val = (f"annotations/instances_{split}2017.json: " for split in ("train", "val"))
    assert message.startswith(f"{tmp_path}: 5 problems\n")
    for line in (
        f"{train}images[0] (id 31): 'file_name' is '../x.jpg'",
        f"{train}annotations[0] (id 101): the box [2.5, 3.0, -1, 5.0] has a negative",
        f"{train}annotations[1] (id 55): unknown category id 4",
        f"{train}annotations[1] (id 55): 'area' is -1",
        f"{val}annotations[0] (id 1): unknown image id 77",
    ):
        assert f"  - {line}" in message


def test_a_broken_entry_is_not_blamed_on_its_annotations(tmp_path):
    change, _ = BAD["image-width-text"]
    with pytest.raises(DataError) as caught:
        read_split(write(tmp_path, edited(change)), "train")
    assert len(caught.value.problems) == 1


def test_long_lists_are_capped_and_counted(tmp_path):
    def many(document):
        document["annotations"] += [annotation(1000 + n, 31, 5, [1, 1, 2, 2]) for n in range(200)]

    with pytest.raises(DataError) as caught:
        read_split(write(tmp_path, edited(many)), "train", bad_annotations="refuse")
    lines = str(caught.value).splitlines()
    assert len(caught.value.problems) == 200
    assert lines[0].endswith("200 problems")
    assert len(lines) == 1 + problems.SHOWN_PROBLEMS + 1
    assert lines[-1] == f"  - and {200 - problems.SHOWN_PROBLEMS} more"


def test_the_error_survives_the_way_between_processes():
    error = DataError("somewhere/x.json", ["one", "two"])
    copied = pickle.loads(pickle.dumps(error))
    assert str(copied) == str(error)
    assert copied.problems == ["one", "two"]


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 100)
    with pytest.raises(DataError, match="at most 100 are read"):
        read_split(tmp_path, "train")


def test_a_pipe_in_place_of_the_json_does_not_stop_the_check(tmp_path):
    path = json_path(write(tmp_path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a regular file"):
        read_split(tmp_path, "train")


def test_boxes_are_dropped_and_clipped_and_counted(tmp_path):
    def change(document):
        document["annotations"] += [
            annotation(201, 31, 7, [5, 5, 0, 3]),
            annotation(202, 31, 7, [5, 5, 3, 0.0]),
            annotation(203, 31, 7, [20, 4, 0, 3]),
            # A rounding of nothing, beside the edge.
            annotation(207, 31, 7, [20.005, 4, 0.01, 3]),
            # Overhangs on every side, by at most 2 pixels.
            annotation(204, 25, 7, [-1, -2, 20, 21.5]),
            # Positive in float64, nothing in float32.
            annotation(205, 25, 7, [17.99999999, 3, 1e-9, 3]),
            annotation(206, 25, 7, [3, 3, 3, 3], segmentation=[[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]),
        ]

    instances = read_instances(json_path(write(tmp_path, edited(change))))
    assert instances.notes == [
        "boxes that overhang their image, clipped: 1 (by up to 2 px)",
        "boxes of zero width or height, dropped: 5",
        "polygons of fewer than three points, dropped: 2",
    ]
    record = next(r for r in read_split(tmp_path, "train").images if r.image_id == 25)
    assert record.boxes.tolist() == [[0, 0, 18, 18], [3, 3, 6, 6]]
    assert [polygon.tolist() for polygon in record.segmentations[1]] == [[1, 2, 3, 4, 5, 6]]


def test_sums_that_round_are_no_overhang(tmp_path):
    # In float64, 0.1 + 19.9 is 20.000000000000004 - 4e-15 or so: neither a note nor outside.
    change = set_in("annotations", 0, "bbox", [7.1, 0.3, 12.900000000000002, 15.7])
    instances = read_instances(json_path(write(tmp_path, edited(change))))
    assert instances.notes == []
