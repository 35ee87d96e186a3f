"""The generated set: valid COCO that says what the pixels show, the same for the same seed, whole or not there."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import ROOT
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from ablations import generate as generator
from ablations.generate import DIFFICULTIES, VERSION, generate, main
from ablations.generated.contours import mask_to_polygons, mask_to_runs
from ablations.generated.outlines import SHAPES
from ablations.generated.scenes import composed, draw_scene

# Enough images for every class, an empty image in each split and, in `small`, a crowd region.
COUNTS = {"tiny": (40, 20), "small": (30, 16), "paper": (24, 21)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    return {
        name: generate(root, name, train=COUNTS[name][0], val=COUNTS[name][1], processes=1)
        for name in ("tiny", "small")
    }


def load(place: Path, split: str) -> dict:
    return json.loads((place / "annotations" / f"instances_{split}2017.json").read_text())


def digest(place: Path) -> dict[str, str]:
    """Per file: the bytes of JSON and text, the decoded pixels of images."""
    result = {}
    for file in sorted(p for p in place.rglob("*") if p.is_file()):
        image = file.suffix in (".png", ".jpg")
        content = np.asarray(Image.open(file)).tobytes() if image else file.read_bytes()
        result[str(file.relative_to(place))] = hashlib.sha256(content).hexdigest()
    return result


def encoded(annotation: dict, image: dict) -> dict:
    runs = coco_mask.frPyObjects(annotation["segmentation"], image["height"], image["width"])
    return coco_mask.merge(runs) if isinstance(runs, list) else runs


def annotated(place: Path):
    for split in ("train", "val"):
        content = load(place, split)
        images = {image["id"]: image for image in content["images"]}
        yield from ((annotation, images[annotation["image_id"]]) for annotation in content["annotations"])


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_layout_is_what_pycocotools_and_the_json_promise(sets, name, capsys):
    place = sets[name]
    identities = []
    for split, count in zip(("train", "val"), COUNTS[name], strict=True):
        coco = COCO(str(place / "annotations" / f"instances_{split}2017.json"))
        assert len(coco.imgs) == count
        assert {image["file_name"] for image in coco.imgs.values()} == set(os.listdir(place / f"{split}2017"))
        for image in coco.imgs.values():
            with Image.open(place / f"{split}2017" / image["file_name"]) as picture:
                assert picture.mode == "RGB"
                assert picture.size == (image["width"], image["height"])
                assert picture.size in DIFFICULTIES[name].sizes
        info = coco.dataset["info"]
        assert (info["difficulty"], info["seed"], info["version"]) == (name, 0, str(VERSION))
        assert {a["category_id"] for a in coco.anns.values()} == set(coco.cats)
        assert {a["image_id"] for a in coco.anns.values()} < set(coco.imgs), "no image without annotations"
        identities += [*coco.anns, *(-i for i in coco.imgs)]
    assert len(identities) == len(set(identities)) and 0 not in identities
    assert f"seed {0}" in (place / "DATASET.md").read_text()


def test_category_ids_have_gaps_and_names_are_single():
    ids = [shape.category_id for shape in SHAPES]
    assert ids == sorted(set(ids)) and len({shape.name for shape in SHAPES}) == len(SHAPES) == 20
    for difficulty in DIFFICULTIES.values():
        assert ids[: difficulty.classes] != list(range(ids[0], ids[0] + difficulty.classes))
        assert ids[0] != 0 and ids[0] != 1


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_polygons_boxes_and_areas_agree(sets, name):
    """pycocotools rasterises the polygons at eight times the size, where whole pixels matter little."""
    zoom, errors, shorts = 8, [], []
    for annotation, image in annotated(sets[name]):
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and w > 0 and h > 0
        assert x + w <= image["width"] + 1e-6 and y + h <= image["height"] + 1e-6
        if annotation["iscrowd"]:
            assert coco_mask.area(encoded(annotation, image)) == annotation["area"]
            assert coco_mask.toBbox(encoded(annotation, image)).tolist() == annotation["bbox"]
            continue
        polygons = [[zoom * v for v in points] for points in annotation["segmentation"]]
        assert all(len(points) >= 6 and len(points) % 2 == 0 for points in polygons)
        runs = coco_mask.merge(coco_mask.frPyObjects(polygons, zoom * image["height"], zoom * image["width"]))
        points = np.concatenate([np.reshape(points, (-1, 2)) for points in annotation["segmentation"]])
        np.testing.assert_allclose([*points.min(0), *np.ptp(points, axis=0)], [x, y, w, h], atol=0.006)
        short = np.abs(coco_mask.toBbox(runs) / zoom - [x, y, w, h]).max()
        shorts.append(short)
        # A tip slimmer than an eighth of a pixel is lost: 0.35 pixels at an angle of 20 degrees, more at a cut corner.
        assert short < 2
        error = coco_mask.area(runs) / zoom**2 - annotation["area"]
        # Contours are kept to 0.35 pixels, on both sides of the line and most of them much better.
        assert abs(error) < 0.35 * (w + h) and abs(error) < 0.1 * annotation["area"]
        errors.append(error / annotation["area"])
    assert abs(np.mean(errors)) < 0.003
    assert np.quantile(np.abs(errors), 0.9) < 0.025
    assert np.quantile(shorts, 0.9) < 0.4


def test_masks_lie_on_the_pixels_that_show_the_object(sets):
    """A flat difference test: where a mask is moved by 3 pixels, the colours inside it become less alike."""
    better = total = 0
    for annotation, image in annotated(sets["tiny"]):
        if annotation["area"] < 300:
            continue
        mask = coco_mask.decode(encoded(annotation, image)).astype(bool)
        split = "train" if image["id"] < 1_000_000 else "val"
        pixels = np.asarray(Image.open(sets["tiny"] / f"{split}2017" / image["file_name"]), dtype=np.float64)
        here = pixels[mask].var(0).sum()
        moved = [pixels[np.roll(mask, shift, axis)].var(0).sum() for shift in (-3, 3) for axis in (0, 1)]
        better += sum(here < other for other in moved)
        total += len(moved)
    assert total > 200
    assert better / total > 0.95


def test_sizes_cover_the_classes_of_coco(sets):
    areas = {
        name: np.array([a["area"] for a, _ in annotated(place) if not a["iscrowd"]]) for name, place in sets.items()
    }
    for name, area in areas.items():
        small, medium, large = (area < 32**2).mean(), ((area >= 32**2) & (area < 96**2)).mean(), (area >= 96**2).mean()
        assert small > 0.3 and medium > 0.15
        # An image of `tiny` has no room for a fair number of large objects, so it has none, and no APl of three.
        assert large == 0 if name == "tiny" else large > 0.02
    longest = np.array([max(a["bbox"][2:]) for a, _ in annotated(sets["tiny"])])
    assert (longest >= 16).mean() > 0.8
    low, high = DIFFICULTIES["tiny"].scale
    assert longest.min() < 1.3 * low and longest.max() > 0.8 * high


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_every_object_stays_in_sight(name):
    difficulty = DIFFICULTIES[name]
    hidden = 0
    for index in range(30):
        canvas = composed(difficulty, 0, 0, index)
        for label, thing in enumerate(canvas.things, start=1):
            assert thing.seen == np.count_nonzero(canvas.labels == label)
            assert thing.seen >= difficulty.visible * thing.whole
            # Pillow draws a polygon with its border, half a sub-pixel more on each side; a filled ring has 37 % more.
            assert thing.whole < 1000 or thing.seen < 1.2 * thing.whole
            hidden += thing.seen < 0.95 * thing.whole
    assert hidden >= 5


def test_crowd_regions_are_runs_over_several_instances(sets):
    crowds = [(a, image) for a, image in annotated(sets["small"]) if a["iscrowd"]]
    assert crowds
    for annotation, image in crowds:
        assert annotation["segmentation"]["size"] == [image["height"], image["width"]]
        assert sum(annotation["segmentation"]["counts"]) == image["height"] * image["width"]
    assert not any(a["iscrowd"] for a, _ in annotated(sets["tiny"]))


def test_colour_tells_the_class_in_tiny_only():
    assert DIFFICULTIES["tiny"].colour_bias > 0
    assert DIFFICULTIES["small"].colour_bias == DIFFICULTIES["paper"].colour_bias == 0


def test_paper_scenes_hold_every_class_and_can_be_large():
    """Drawn without writing: the first object of image i is of class i modulo 20, images 7, 32, ... are empty."""
    annotations = [draw_scene(DIFFICULTIES["paper"], 0, 0, index)[1] for index in range(4, 8)]
    assert [bool(found) for found in annotations] == [True, True, True, False]
    for index, found in zip((4, 5, 6), annotations, strict=False):
        assert SHAPES[index].category_id in {a["category_id"] for a in found}
    assert max(a["area"] for found in annotations for a in found) > 96**2


def test_same_seed_same_set_however_many_processes_draw(sets, tmp_path):
    train, val = COUNTS["tiny"]
    other = generate(tmp_path, "tiny", train=train, val=val, processes=2)
    assert other.name == sets["tiny"].name
    assert digest(other) == digest(sets["tiny"])


def test_another_seed_is_another_set(tmp_path):
    one, two = (generate(tmp_path, "tiny", seed=seed, train=2, val=1) for seed in (3, 4))
    assert one != two
    first, second = digest(one), digest(two)
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] == second[name]]


def test_splits_differ_and_fewer_images_are_the_first_of_more(sets, tmp_path):
    few = digest(generate(tmp_path, "tiny", train=3, val=3))
    many = digest(sets["tiny"])
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 6 and len({few[name] for name in pictures}) == 6
    assert all(few[name] == many[name] for name in pictures)


def test_second_call_writes_nothing(sets, tmp_path, monkeypatch):
    place = generate(tmp_path, "tiny", train=2, val=1)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(generator, "draw_scene", never)
    assert generate(tmp_path, "tiny", train=2, val=1) == place
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(preset, seed, split, index):
        if index == 2:
            raise OSError(28, "No space left on device")
        return draw_scene(preset, seed, split, index)

    monkeypatch.setattr(generator, "draw_scene", full)
    with pytest.raises(OSError, match="No space left"):
        generate(tmp_path, "tiny", train=4, val=1)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


def in_another_process(root: Path, train: int) -> subprocess.Popen:
    code = f"from ablations.generate import generate; print(generate({str(root)!r}, 'tiny', train={train}, val=1))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def test_killed_generation_leaves_no_set_and_the_next_call_heals(tmp_path):
    victim = in_another_process(tmp_path, train=5000)
    try:
        while len(list(tmp_path.glob(".*.partial-*/new/train2017/*.png"))) < 3:
            assert victim.poll() is None, "finished before it could be killed"
            time.sleep(0.005)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    # As if the killed call had asked for three images, so that the healing one need not draw 5,000.
    leftover = next(tmp_path.glob(".*.partial-*"))
    fewer = leftover.rename(tmp_path / leftover.name.replace("5000+1", "3+1"))
    assert fewer != leftover
    place = generate(tmp_path, "tiny", train=3, val=1)
    assert not fewer.exists()
    assert len(list((place / "train2017").iterdir())) == 3


@pytest.mark.parametrize("loss", ["DATASET.md", "annotations/instances_val2017.json", "train2017/000000000008.png"])
def test_a_damaged_set_is_made_again(tmp_path, loss):
    place = generate(tmp_path, "tiny", train=2, val=1)
    whole = digest(place)
    (place / loss).unlink()
    assert generate(tmp_path, "tiny", train=2, val=1) == place
    assert digest(place) == whole
    assert list(tmp_path.glob(".*.partial-*")) == []


def test_two_processes_at_once_make_one_set(tmp_path):
    both = [in_another_process(tmp_path, train=30) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1]
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == [Path(answers[0])]
    assert len(list((Path(answers[0]) / "train2017").iterdir())) == 30


def test_who_had_to_wait_takes_what_is_there(tmp_path, monkeypatch):
    real, before = generator.FileLock, {}

    class Late(real):
        def acquire(self):
            with monkeypatch.context() as first:
                first.setattr(generator, "FileLock", real)
                place = generate(tmp_path, "tiny", train=2, val=1)
            before.update({p: p.stat().st_mtime_ns for p in place.rglob("*")})
            return super().acquire()

    monkeypatch.setattr(generator, "FileLock", Late)
    place = generate(tmp_path, "tiny", train=2, val=1)
    assert before and {p: p.stat().st_mtime_ns for p in place.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficulty": "huge"}, "unknown difficulty 'huge'; the difficulties are tiny, small, paper"),
        ({"difficulty": "tiny", "seed": -1}, "seed is -1"),
        ({"difficulty": "tiny", "train": 0}, "train and val are 0 and 600"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DIFFICULTIES, "tiny", replace(DIFFICULTIES["tiny"], train=2, val=9))
    sheet = tmp_path / "sheet.png"
    assert main([str(tmp_path), "--seed", "5", "--preview", str(sheet)]) == 0
    place = Path(capsys.readouterr().out.strip())
    assert place.name == f"tiny-seed5-v{VERSION}" and len(list((place / "val2017").iterdir())) == 9
    with Image.open(sheet) as picture:
        assert picture.size[0] > 600
    assert main([str(tmp_path), "--seed", "-5"]) == 2
    assert "seed is -5" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


def random_mask(seed: int, share: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = rng.random((17, 23)) < share
    mask[rng.integers(17), rng.integers(23)] = True
    return mask


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_runs_are_those_of_pycocotools(share):
    for seed in range(5):
        mask = random_mask(seed, share)
        runs = coco_mask.frPyObjects(mask_to_runs(mask), *mask.shape)
        np.testing.assert_array_equal(coco_mask.decode(runs), mask)
    corner = np.ones((4, 3), dtype=bool)
    assert mask_to_runs(corner) == {"counts": [0, 12], "size": [4, 3]}
    assert mask_to_runs(~corner) == {"counts": [12], "size": [4, 3]}


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.7, 0.98])
def test_polygons_of_any_mask_give_it_back(share):
    """Blown up by 9, so that the rounding of corners (an eighth of a pixel each) is under half a pixel of the original.

    Holes, holes in holes, pixels that touch at corners and regions at the border are all in the random masks.
    """
    for seed in range(5):
        mask = random_mask(seed, share)
        big = np.kron(mask, np.ones((9, 9), dtype=bool))
        polygons = mask_to_polygons(big, tolerance=0.6, speck=1.0)
        runs = coco_mask.frPyObjects([points.ravel().tolist() for points in polygons], *big.shape)
        decoded = coco_mask.decode(coco_mask.merge(runs)).astype(bool)
        np.testing.assert_array_equal(decoded[4::9, 4::9], mask)
        # Only pixels at corners may differ, and there are at most four times the corners of each cell.
        assert (decoded != big).mean() < 0.02


def test_specks_are_left_out_but_never_the_whole_object():
    mask = np.zeros((20, 20), dtype=bool)
    mask[2, 2] = mask[5:15, 5:15] = True
    mask[9, 9] = False
    (polygon,) = mask_to_polygons(mask, tolerance=0.35, speck=4.0)
    assert len(polygon) < 12 and polygon.min() == 5 and polygon.max() == 15
    assert len(mask_to_polygons(mask, tolerance=0.35, speck=0.5)) == 2
    only = np.zeros((4, 4), dtype=bool)
    only[1, 2] = True
    (polygon,) = mask_to_polygons(only, tolerance=0.35, speck=4.0)
    assert len(polygon) >= 3 and polygon[:, 0].min() >= 2 and polygon[:, 0].max() <= 3
