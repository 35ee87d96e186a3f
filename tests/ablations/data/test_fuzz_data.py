"""Data that anything may have happened to: read exactly as pycocotools and Pillow read it, or a `DataError`."""

import contextlib
import copy
import io
import json
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from perfect_answers import perfect, pycocotools_on
from PIL import Image, features
from pycocotools.coco import COCO
from tiny_coco import documents, json_path, write

from ablations.data.check import check_segmentations
from ablations.data.coco import read_image, read_split
from ablations.data.loader import Loader
from ablations.data.problems import DataError
from ablations.evaluation.evaluate import evaluate

# pycocotools' masks are of before numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")

FAST = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def images_root(tmp_path_factory):
    return write(tmp_path_factory.mktemp("images"))


class Twice(dict):
    """An object that is written with a key twice."""

    def items(self):
        items = list(super().items())
        return items + items[:1]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([12, 25, 31, 3, 7, 90, 12.0, 25.0, 31.0, 7.0, 3.5, -0.0, 1e308, 1e10, 1e17, 10**400]),
    st.floats(),
    st.floats(-5, 30),
    st.text(max_size=5),
    st.sampled_from(
        ["7", "12", "../x", "/etc/passwd", "a\\b", "C:x", "tall.png", "./wide.jpg", "\ud800", "\0", " cat "]
    ),
)
VALUES = st.one_of(
    SCALARS,
    st.recursive(SCALARS, lambda part: st.lists(part, max_size=5) | st.dictionaries(st.text(max_size=4), part)),
    st.lists(st.floats(-5, 30), min_size=4, max_size=4),
    st.sampled_from([{"counts": [240], "size": [24, 10]}, [[1, 2, 3, 4, 5, 6]], [{"counts": [320], "size": [16, 20]}]]),
)


def places(node, path=()):
    """The path of every node of a document."""
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


def node_at(document, place):
    for step in place:
        document = document[step]
    return document


@st.composite
def spoilt(draw):
    """The contents of a sound file, changed in one to three places."""
    document = documents()["train"]
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        spots = [place for place in places(document) if place]
        *way, last = draw(st.sampled_from(spots))
        parent = node_at(document, way)
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "copy", "twice", "everywhere"]))
        if kind == "remove":
            del parent[last]
        elif kind == "twice" and isinstance(parent[last], dict):
            parent[last] = Twice(parent[last])
        elif kind == "copy":
            parent[last] = copy.deepcopy(node_at(document, draw(st.sampled_from(spots))))
        elif kind == "everywhere" and isinstance(parent, dict) and len(way) == 2:
            value = draw(VALUES)
            for entry in document[way[0]]:
                if isinstance(entry, dict):
                    entry[last] = copy.deepcopy(value)
        else:
            # A copy, because a later change may go into it, and the strategy keeps its own.
            parent[last] = copy.deepcopy(draw(VALUES))
    return document


def finite(box) -> bool:
    return all(abs(value) <= 1e9 for value in box)


def is_bad(entry: dict, images: dict, categories: set) -> bool:
    """Whether an annotation of a file that was read is one of those that are left out."""
    box = entry["bbox"]
    if entry["category_id"] not in categories or not finite(box) or min(box[2:]) < 0:
        return True
    width, height = images[entry["image_id"]]
    (x, y, w, h), thin = box, min(box[2:]) <= 0.01
    if thin:
        return x > width + 0.01 or y > height + 0.01 or x + w < -0.01 or y + h < -0.01
    return x >= width or y >= height or x + w <= 0 or y + h <= 0


def check_against_pycocotools(split, path):
    """Images, categories and annotations are those of `COCO(path).dataset`, and so is AP where it can be had."""
    with contextlib.redirect_stdout(io.StringIO()):
        given = COCO(str(path)).dataset
    truth = split.ground_truth
    json.dumps(truth, allow_nan=False)
    files = {image["id"]: image for image in given["images"]}
    assert [record.image_id for record in split.images] == sorted(files)
    for image in truth["images"]:
        file = files[image["id"]]
        assert image["file_name"] == file["file_name"]
        for side in ("width", "height"):
            assert file.get(side) is None or image[side] == file[side]
    names = (
        {c["id"]: (c.get("name") or "").strip() or str(int(c["id"])) for c in given["categories"]}
        if all(type(c["id"]) is not str for c in given["categories"])
        else {c["id"]: (c.get("name") or "").strip() for c in given["categories"]}
    )
    assert split.category_ids == tuple(sorted(names))
    for category in truth["categories"]:
        assert not names[category["id"]] or category["name"] == names[category["id"]]
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    kept = [entry for entry in given["annotations"] if not is_bad(entry, sizes, set(names))]
    assert len(given["annotations"]) - len(kept) == sum(split.dropped.values())
    assert len(truth["annotations"]) == len(kept)
    for ours, entry in zip(truth["annotations"], kept, strict=True):
        area = entry.get("area")
        assert (ours["image_id"], ours["category_id"]) == (entry["image_id"], entry["category_id"])
        assert ours["bbox"] == entry["bbox"] and ours["iscrowd"] == int(entry.get("iscrowd") or 0)
        assert ours["area"] == (entry["bbox"][2] * entry["bbox"][3] if area is None else area)
    for record in split.images:
        limits = np.array([record.width, record.height] * 2)
        assert ((record.boxes >= 0) & (record.boxes <= limits)).all()
        assert (record.boxes[:, :2] < record.boxes[:, 2:]).all()
        assert read_image(record).shape == (record.height, record.width, 3)
    metrics = list(evaluate(perfect(split), truth, split.category_ids).values())
    ids = [entry[key] for entry in given["annotations"] for key in ("id", "image_id", "category_id")]
    # pycocotools cannot find an annotation of id 0, and rounds large ids.
    if not split.dropped and all(type(value) is not str and abs(value) <= 2**53 for value in ids) and all(ids[::3]):
        try:
            expected = pycocotools_on(path, split)
        except (KeyError, TypeError, ValueError, IndexError):
            return
        assert metrics == expected


@settings(max_examples=500, **FAST)
@given(document=spoilt(), masks=st.integers(0, 3).map(lambda number: number == 0))
def test_any_change_of_the_json_is_read_as_pycocotools_reads_it_or_refused(root, document, masks):
    path = json_path(root)
    path.write_text(json.dumps(document))
    try:
        split = read_split(root, "train", masks=masks)
    except DataError as error:
        assert error.problems and str(error).encode() and "2017" in str(error)
        return
    check_against_pycocotools(split, path)
    if masks:
        check_segmentations(split)
        _, targets, _ = Loader(split, 3, 0, (16,), 64, masks=True).batch(0)
        assert all(len(target["masks"]) == len(target["boxes"]) for target in targets)


@settings(max_examples=300, **FAST)
@given(data=st.data())
def test_any_damage_to_the_text_is_read_as_pycocotools_reads_it_or_refused(root, data):
    path = json_path(root)
    text = bytearray(json.dumps(documents()["train"]).encode())
    digits = [place for place, byte in enumerate(text) if byte in b"0123456789"]
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        spot = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["digit", "byte", "cut", "insert"]))
        if kind == "digit":
            spot = data.draw(st.sampled_from(digits))
            text[spot : spot + 1] = data.draw(
                st.sampled_from([b"0", b"1", b"9", b"", b".", b"-1", b"7.0", b"3e0", b"31"])
            )
        elif kind == "byte":
            text[spot] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789.,-e"')))
        elif kind == "cut":
            del text[spot : spot + data.draw(st.integers(1, 30))]
        else:
            inserts = [b"9" * 30, b'"', b"[", b"}", b"-", b"e9", b"e-9", b"null", b",", b"\\u0000", b"0", b"NaN", b".5"]
            text[spot:spot] = data.draw(st.sampled_from(inserts))
    path.write_bytes(text)
    try:
        split = read_split(root, "train")
    except DataError as error:
        assert path.name in str(error)
        return
    check_against_pycocotools(split, path)


KINDS = [
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "TIFF",
    "GIF",
    "PPM",
    "TGA",
    "JPEG2000",
    "AVIF",
    "QOI",
    "SGI",
    "PCX",
    "ICO",
    "DDS",
]


@cache
def files() -> list[bytes]:
    """One 20x16 image in every format, with and without an EXIF orientation where that is kept."""
    pixels = np.random.default_rng(1).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    missing = {
        name
        for name, check in {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}.items()
        if not features.check(check)
    }
    found = []
    for kind in KINDS:
        if kind not in missing:
            for options in ({}, {"exif": exif}) if kind in ("JPEG", "PNG", "TIFF", "WEBP") else ({},):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, kind, **options)
                found.append(file.getvalue())
    return found


@st.composite
def damaged(draw):
    """The bytes of an image file: changed, cut, lengthened, or with the end of another one."""
    content = bytearray(draw(st.sampled_from(files())))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["byte", "byte", "byte", "cut", "extend", "swap", "insert"]))
        # Headers first: most of a file is pixel data.
        spot = draw(st.integers(0, max(0, min(len(content), 700) - 1)))
        if kind == "byte" and content:
            content[spot] = draw(st.one_of(st.sampled_from([0, 1, 0xD8, 0xD9, 0xE1, 0xFF]), st.integers(0, 255)))
        elif kind == "cut":
            del content[draw(st.integers(0, len(content))) :]
        elif kind == "extend":
            content += draw(st.binary(max_size=40))
        elif kind == "insert":
            content[spot:spot] = draw(st.binary(max_size=8))
        elif kind == "swap":
            other = draw(st.sampled_from(files()))
            content[spot:] = other[draw(st.integers(0, len(other))) :]
    return bytes(content)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=600, **FAST)
@given(content=damaged())
@example(content=b"")
def test_any_damage_to_an_image_is_read_as_pillow_reads_it_or_refused(images_root, content):
    root = images_root
    path = root / "train2017" / "wide.jpg"
    path.write_bytes(content)
    try:
        record = read_split(root, "train").images[2]
    except DataError as error:
        assert "image 'wide.jpg' (id 31): " in str(error)
        return
    pixels = read_image(record)
    assert pixels.shape == (16, 20, 3)
    with Image.open(path) as image:
        if image.mode in ("L", "RGB", "P") and record.orientation == 1:
            np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
