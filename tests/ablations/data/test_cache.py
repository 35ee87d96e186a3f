"""Parsed data from the cache are those of the instances files, or are made anew."""

import json
import multiprocessing
import os
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from tiny_coco import annotation, documents, write, write_json

from ablations.data import cache as module
from ablations.data import coco
from ablations.data.cache import keep_dataset, open_dataset
from ablations.data.coco import read_dataset
from ablations.data.loader import Loader
from ablations.data.problems import DataError

RUNS = {"size": [16, 20], "counts": "P:"}


def hard_cases(contents):
    """Ids of text and beyond 63 bits, every form of segmentation and one that is none, a category only train has."""
    train, val = contents["train"], contents["val"]
    train["annotations"] += [
        annotation(2**64 - 1, 31, 7, [1, 1, 5, 5], segmentation=[[1, 1, 6, 1, 6, 6], [2, 2, 3, 2, 3, 3]]),
        annotation(2**63, 31, 3, [1, 1, 5, 5], segmentation=RUNS | {"counts": [5, 20, 295]}),
        annotation(4, 31, 3, [1, 1, 5, 5], segmentation=[[1, 2, 3]]),
        annotation(5, 31, 3, [1, 1, 5, 5], segmentation=None),
        annotation(6, 12, 3, [400, 400, 5, 5]),
        annotation(7, 12, 3, [3, 3, 0, 4]),
    ]
    for number, entry in enumerate(val["annotations"]):
        entry["id"] = f"ä{number}"
    names = {image["id"]: f"v{number}" for number, image in enumerate(val["images"])}
    for entry in val["images"]:
        entry["id"] = names[entry["id"]]
    for entry in val["annotations"]:
        entry["image_id"] = names[entry["image_id"]]
    val["categories"] = [category for category in val["categories"] if category["id"] != 90]
    val["annotations"] = [entry for entry in val["annotations"] if entry["category_id"] != 90]
    return contents


@pytest.fixture
def root(tmp_path):
    return write(tmp_path / "data", hard_cases(documents()))


@pytest.fixture
def parsed(monkeypatch):
    """The instances files that were parsed."""
    seen = []
    read = coco.read_instances
    monkeypatch.setattr(coco, "read_instances", lambda path, **given: seen.append(path.name) or read(path, **given))
    return seen


def opened(root, cache, checked=False, **given):
    said = []
    data = open_dataset(root, cache=cache, checked=checked, say=said.append, **given)
    return data, said


def plain(value):
    """Any value in a form that `==` compares to the bit and the type."""
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tolist()
    if isinstance(value, list | tuple):
        return type(value), [plain(part) for part in value]
    return type(value), {key: plain(part) for key, part in value.items()} if isinstance(value, dict) else value


def assert_equal(data, other):
    assert (data.root, data.fingerprint, data.notes) == (other.root, other.fingerprint, other.notes)
    for a, b in ((data.train, other.train), (data.val, other.val)):
        for field in fields(a):
            if field.name not in ("images", "annotations"):
                assert plain(getattr(a, field.name)) == plain(getattr(b, field.name)), field.name
        assert plain(a.ground_truth) == plain(b.ground_truth)
        assert len(a.images) == len(b.images)
        for one, two in zip(a.images, b.images, strict=True):
            for field in fields(one):
                assert plain(getattr(one, field.name)) == plain(getattr(two, field.name)), field.name
        for field in fields(a.annotations):
            values = getattr(a.annotations, field.name), getattr(b.annotations, field.name)
            one, two = [value if isinstance(value, np.ndarray | dict) else list(value) for value in values]
            assert plain(one) == plain(two), field.name


def test_what_is_opened_is_what_was_read(root, tmp_path, parsed):
    for checked in (False, True, False):
        data, said = opened(root, tmp_path / "cache", checked)
        assert_equal(data, read_dataset(root))
        assert said == []
    assert data.train.annotations.ids.tolist()[4:6] == [2**64 - 1, 2**63]
    assert data.val.images[0].image_id == "v0" and data.train.annotations.odd and data.train.dropped
    # Once for the cache, and for each comparison.
    assert len(parsed) == 2 * 4
    loaders = [Loader(part, 2, 0, (24, 32), 40, masks=False) for part in (data.train, read_dataset(root).train)]
    for step in range(3):
        one, two = (loader.batch(step) for loader in loaders)
        assert one.extent == two.extent
        assert all(torch.equal(a, b) for a, b in zip(one.images, two.images, strict=True))
        assert [plain(target) for target in one.targets] == [plain(target) for target in two.targets]


def test_ways_of_reading_do_not_share_an_entry(root, tmp_path):
    opened(root, tmp_path / "cache")
    with pytest.raises(DataError, match="lies outside its image"):
        opened(root, tmp_path / "cache", bad_annotations="refuse")
    with pytest.raises(DataError, match="masks need"):
        opened(root, tmp_path / "cache", masks=True)


def test_a_changed_instances_file_is_read_anew(root, tmp_path):
    before, _ = opened(root, tmp_path / "cache")
    path = root / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["bbox"][0] = 3.5
    status = path.stat()
    path.write_text(json.dumps(document))
    # Of the same size and time; what the system notes of the file itself gives it away.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    for checked in (True, False):
        data, _ = opened(root, tmp_path / "cache", checked)
        assert data.fingerprint != before.fingerprint
        assert_equal(data, read_dataset(root))


def test_a_file_that_was_only_touched_is_not_parsed(root, tmp_path, parsed):
    before, _ = opened(root, tmp_path / "cache")
    os.utime(root / "annotations" / "instances_val2017.json")
    for checked in (True, False):
        data, _ = opened(root, tmp_path / "cache", checked)
        assert data.fingerprint == before.fingerprint
    assert len(parsed) == 2


def test_image_files_are_checked_by_the_one_who_has_to(root, tmp_path, parsed):
    before, _ = opened(root, tmp_path / "cache")
    path = root / "train2017" / "wide.jpg"
    content = path.read_bytes()
    path.write_bytes(content + b"behind the image")
    longer, _ = opened(root, tmp_path / "cache")
    assert longer.fingerprint != before.fingerprint and len(parsed) == 2
    assert opened(root, tmp_path / "cache", checked=True)[0].fingerprint == longer.fingerprint
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"wide\.jpg"):
        opened(root, tmp_path / "cache")
    assert opened(root, tmp_path / "cache", checked=True)[0].fingerprint == longer.fingerprint


def test_sizes_that_came_from_the_image_files_are_taken_from_them_again(tmp_path, parsed):
    contents = documents()
    del contents["train"]["images"][0]["width"]
    root = write(tmp_path / "data", contents)
    for _ in range(2):
        assert_equal(opened(root, tmp_path / "cache")[0], read_dataset(root))
    assert len(parsed) == 2 * 4
    opened(root, tmp_path / "cache", checked=True)
    assert len(parsed) == 2 * 4


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "index-flipped": (".json", flipped),
    "index-short": (".json", lambda path: path.write_bytes(path.read_bytes()[:-5])),
    "index-foreign": (".json", lambda path: path.write_text("{}")),
    "column-short": ("bbox.npy", lambda path: path.write_bytes(path.read_bytes()[:-5])),
    "column-empty": ("bbox.npy", lambda path: path.write_bytes(b"")),
    "column-foreign": ("bbox.npy", lambda path: np.save(path, np.zeros(3))),
    "column-pickle": ("bbox.npy", lambda path: np.save(path, np.array([print], dtype=object))),
}


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_said_and_made_anew(root, tmp_path, damage, checked):
    cache = tmp_path / "cache"
    opened(root, cache)
    suffix, spoil = DAMAGES[damage]
    (path,) = [path for path in cache.rglob(f"*{suffix}") if "val" not in path.name]
    spoil(path)
    data, said = opened(root, cache, checked)
    assert [str(path) in line for line in said] == [True]
    assert_equal(data, read_dataset(root))
    assert opened(root, cache)[1] == []
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_bit_that_has_turned_is_found_when_a_run_begins(root, tmp_path):
    opened(root, tmp_path / "cache")
    (path,) = (tmp_path / "cache").rglob("train-annotations-bbox.npy")
    flipped(path)
    data, said = opened(root, tmp_path / "cache")
    assert len(said) == 1
    assert_equal(data, read_dataset(root))


def test_columns_that_are_gone_are_made_anew(root, tmp_path):
    opened(root, tmp_path / "cache")
    shutil.rmtree(next(path for path in (tmp_path / "cache").iterdir() if path.is_dir()))
    assert_equal(opened(root, tmp_path / "cache", checked=True)[0], read_dataset(root))


def test_a_cache_that_cannot_be_written_is_said_by_the_one_who_starts(root, tmp_path):
    (tmp_path / "file").write_text("")
    data, said = opened(root, tmp_path / "file" / "cache")
    assert_equal(data, read_dataset(root))
    assert len(said) == 1 and "parsed data are not kept" in said[0] and str(tmp_path / "file") in said[0]
    assert opened(root, tmp_path / "file" / "cache", checked=True)[1] == []


def test_a_full_disk_leaves_nothing_behind(root, tmp_path, monkeypatch):
    def full(path, values, **given):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module.np, "save", full)
    data, said = opened(root, tmp_path / "cache")
    assert len(said) == 1 and "No space left" in said[0]
    assert_equal(data, read_dataset(root))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_data_that_were_read_before_there_was_a_place_for_them_are_kept(root, tmp_path, parsed):
    read = read_dataset(root)
    assert_equal(keep_dataset(read, cache=tmp_path / "cache"), read)
    assert_equal(opened(root, tmp_path / "cache", checked=True)[0], read)
    assert len(parsed) == 2
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text() + " ")
    keep_dataset(read, cache=tmp_path / "other")
    assert [path.suffix for path in (tmp_path / "other").iterdir()] == [".lock"]


def test_without_a_cache_the_files_are_read(root, tmp_path):
    assert_equal(opened(root, None)[0], read_dataset(root))
    write_json(root, "val", [])
    with pytest.raises(DataError, match="expected an object"):
        opened(root, tmp_path / "cache")


def _open_and_count(root, cache, start, counts):
    read, parsed = coco.read_instances, []
    coco.read_instances = lambda path, **given: parsed.append(path) or read(path, **given)
    start.wait()
    data = open_dataset(root, cache=cache, checked=True)
    counts.put((len(parsed), data.fingerprint))


def test_processes_that_start_at_once_parse_once(root, tmp_path):
    context = multiprocessing.get_context("fork")
    start, counts = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_open_and_count, args=(root, tmp_path / "cache", start, counts)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    found = [counts.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(number for number, _ in found) == [0, 0, 0, 2]
    assert {fingerprint for _, fingerprint in found} == {read_dataset(root).fingerprint}
