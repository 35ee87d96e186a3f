"""Batches: geometry to a fraction of a pixel, and nothing that depends on what was asked for before."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_coco import CATEGORIES, annotation, write, write_json

from ablations.data.coco import read_split
from ablations.data.loader import EvalLoader, Loader, flip_boxes, resized, scale_boxes
from ablations.data.problems import DataError


def directory(root: Path, sizes: list[tuple[int, int]]):
    """A train split with one image of each (width, height), of random pixels, each with one box but the last."""
    write(root)
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number, (width, height) in enumerate(sizes):
        name = f"{number}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / "train2017" / name)
        images.append({"id": 100 + number, "file_name": name, "width": width, "height": height})
        if number < len(sizes) - 1:
            annotations.append(annotation(number, 100 + number, 7, [1, 2, width - 4, height - 3]))
    write_json(root, "train", {"images": images, "annotations": annotations, "categories": CATEGORIES})
    return read_split(root, "train")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """13 landscape or square images and 6 portrait ones."""
    sizes = [(20 + n % 3, 16 + n % 5) for n in range(12)] + [(16, 21 + n) for n in range(6)] + [(18, 18)]
    return directory(tmp_path_factory.mktemp("mixed"), sizes)


def same(a, b):
    (images, targets, extent), (other_images, other_targets, other_extent) = a, b
    assert extent == other_extent
    assert len(images) == len(other_images)
    for image, other in zip(images, other_images, strict=True):
        assert torch.equal(image, other)
    for target, other in zip(targets, other_targets, strict=True):
        assert target["image_id"] == other["image_id"]
        assert torch.equal(target["boxes"], other["boxes"]) and torch.equal(target["labels"], other["labels"])


@pytest.mark.parametrize(
    "width,height,short_side,max_size,expected",
    [
        (640, 480, 800, 1333, (1067, 800)),
        # The cap binds: 1333 / 640 = 2.0828.
        (640, 360, 800, 1333, (1333, 750)),
        (480, 640, 800, 1333, (800, 1067)),
        # 101 * 50 / 67 = 75.37 and exactly 50.
        (101, 67, 50, 1000, (75, 50)),
        # A half is rounded up: 3 * 5 / 2 = 7.5.
        (3, 2, 5, 100, (8, 5)),
        (1000, 1, 800, 1333, (1333, 1)),
        (1000, 1, 1, 10, (10, 1)),
        (128, 128, 128, 128, (128, 128)),
    ],
)
def test_resized(width, height, short_side, max_size, expected):
    assert resized(width, height, short_side, max_size) == expected


def test_boxes_by_hand():
    boxes = np.array([[10, 20, 30, 60], [0, 0, 101, 67]], dtype=np.float32)
    # 101x67 becomes 75x50: x by 75/101, y by 50/67.
    scaled = scale_boxes(boxes, 75 / 101, 50 / 67)
    np.testing.assert_allclose(scaled[0], [7.425743, 14.925373, 22.277228, 44.776119], rtol=1e-6)
    np.testing.assert_allclose(scaled[1], [0, 0, 75, 50], rtol=1e-6)
    # In a width of 75, the right edge at 22.28 becomes the left one at 75 - 22.28.
    np.testing.assert_allclose(flip_boxes(scaled, 75)[0], [52.722772, 14.925373, 67.574257, 44.776119], rtol=1e-6)
    assert boxes.tolist() == [[10, 20, 30, 60], [0, 0, 101, 67]]
    assert flip_boxes(np.zeros((0, 4), np.float32), 75).shape == (0, 4)


def bump(length: int, start: int, end: int) -> np.ndarray:
    """A smooth hill over [start, end) on pixels of which the first spans 0 to 1: one period of a cosine."""
    centres = np.arange(length) + 0.5
    hill = 0.5 - 0.5 * np.cos(2 * np.pi * (centres - start) / (end - start))
    return np.where((centres > start) & (centres < end), hill, 0)


def extent(profile: torch.Tensor, ratio: float) -> tuple[float, float]:
    """Start and end of a hill from its mean and variance.

    A period of 1 - cos of length L has the variance L² (1/12 - 1/(2π²)); resizing convolves it with a triangle of one
    pixel, of the coarser of the two grids, on either side, whose variance is a sixth.
    """
    centres = torch.arange(len(profile)) + 0.5
    mean = (profile * centres).sum() / profile.sum()
    variance = (profile * (centres - mean) ** 2).sum() / profile.sum()
    blur = 0 if ratio == 1 else max(1.0, ratio) ** 2 / 6
    half = float((variance - blur).sqrt()) / (1 / 12 - 0.5 / np.pi**2) ** 0.5 / 2
    return float(mean) - half, float(mean) + half


@pytest.mark.parametrize("short_side", [37, 80, 100, 128, 250])
@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("portrait", [False, True])
def test_the_box_stays_on_its_object(tmp_path, short_side, flip, portrait):
    """A smooth hill fills a box. Where the pixels of the batch have it, there its target must be."""
    width, height, (x1, y1, x2, y2) = (100, 160, (12, 60, 52, 150)) if portrait else (160, 100, (60, 12, 150, 52))
    pixels = np.rint(255 * bump(height, y1, y2)[:, None] * bump(width, x1, x2)).astype(np.uint8)
    write(tmp_path)
    Image.fromarray(pixels).save(tmp_path / "train2017" / "0.png")
    content = {
        "images": [{"id": 1, "file_name": "0.png", "width": width, "height": height}],
        "annotations": [annotation(1, 1, 3, [x1, y1, x2 - x1, y2 - y1])],
        "categories": CATEGORIES,
    }
    write_json(tmp_path, "train", content)
    loader = Loader(read_split(tmp_path, "train"), 1, 0, (short_side,), 1000, flip=flip)
    (image,), (target,), _ = loader.batch(0)
    assert min(image.shape[1:]) == short_side and (image.shape[2] < image.shape[1]) == portrait
    left, top, right, bottom = target["boxes"][0].tolist()
    ratio = short_side / 100
    for profile, start, end in ((image[0].double().sum(0), left, right), (image[0].double().sum(1), top, bottom)):
        found = extent(profile, ratio)
        # Rounding to 8 bits is all that is lost; a wrong convention costs half a pixel of either grid.
        assert abs(sum(found) - start - end) / 2 < 0.02
        assert abs((found[1] - found[0]) / (end - start) - 1) < 0.01


def test_resizing_is_half_pixel_correct_with_antialias(mixed):
    for short_side in (7, 11, 40):
        images, _ = EvalLoader(mixed, len(mixed.images), short_side, 1000)._make(0)
        for record, image in zip(mixed.images, images, strict=True):
            with Image.open(record.path) as file:
                source = torch.from_numpy(np.array(file)).permute(2, 0, 1)[None].double()
            expected = torch.nn.functional.interpolate(
                source, image.shape[1:], mode="bilinear", align_corners=False, antialias=True
            )[0]
            # Pillow rounds to 8 bits after each of its two passes.
            assert (image.double() - expected).abs().max() <= 1.5


def test_images_of_the_asked_size_are_not_touched(mixed):
    images, shown = EvalLoader(mixed, 19, 18, 18)._make(0)
    index = [item.image_id for item in shown].index(118)
    with Image.open(mixed.images[index].path) as file:
        assert np.array_equal(images[index].permute(1, 2, 0).numpy(), np.asarray(file))


def test_flip_mirrors_the_image(mixed):
    plain = Loader(mixed, 4, 0, (16,), 64, flip=0.0)
    mirrored = Loader(mixed, 4, 0, (16,), 64, flip=1.0)
    for step in range(4):
        (images, targets, _), (others, other_targets, _) = plain.batch(step), mirrored.batch(step)
        for image, target, other, mirror in zip(images, targets, others, other_targets, strict=True):
            assert torch.equal(image.flip(2), other) and not torch.equal(image, other)
            back = flip_boxes(mirror["boxes"].numpy(), image.shape[2])
            np.testing.assert_allclose(back, target["boxes"].numpy(), atol=4e-6)


def test_targets_keep_the_contract(mixed):
    loader = Loader(mixed, 4, 3, (16, 24), 64)
    empty = 0
    for step in range(10):
        images, targets, _ = loader.batch(step)
        for image, target in zip(images, targets, strict=True):
            assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.is_contiguous()
            boxes, labels = target["boxes"], target["labels"]
            assert boxes.dtype == torch.float32 and boxes.shape == (len(labels), 4)
            assert labels.dtype == torch.int64 and type(target["image_id"]) is int
            height, width = image.shape[1:]
            limits = torch.tensor([width, height, width, height]) + 1e-5
            assert (boxes >= -1e-5).all() and (boxes <= limits).all()
            empty += len(labels) == 0
    assert empty > 0, "the image without objects is trained on too"


@pytest.mark.parametrize("threads", [0, 3])
def test_a_batch_depends_on_the_step_alone(mixed, threads):
    options = dict(batch_size=4, seed=5, short_sides=(14, 16, 18), max_size=30)
    loader = Loader(mixed, **options)
    forward = [loader.batch(step) for step in range(12)]
    other = Loader(mixed, threads=threads, cache_bytes=0, **options)
    for step in [7, 8, 9, 3, 11, 0, 0, 1, 2, 10, 4, 5, 6]:
        same(other.batch(step), forward[step])
    other.close()
    resumed = Loader(mixed, threads=threads, **options)
    for step in range(6, 12):
        same(resumed.batch(step), forward[step])
    resumed.close()


def test_what_a_caller_writes_does_not_come_back(mixed):
    loader = Loader(mixed, 4, 0, (16,), 64)
    images, targets, _ = loader.batch(2)
    before = [image.clone() for image in images], [{**t, "boxes": t["boxes"].clone()} for t in targets]
    for image, target in zip(images, targets, strict=True):
        image.zero_()
        target["boxes"].zero_()
        target["labels"] += 50
    after_images, after_targets, _ = loader.batch(2)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after_images, strict=True))
    assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(before[1], after_targets, strict=True))
    assert all(int(label) < 3 for target in after_targets for label in target["labels"])


def test_seeds_and_steps_differ(mixed):
    def drawn(seed):
        loader = Loader(mixed, 4, seed, (12, 14, 16, 18), 64)
        return [
            [(target["image_id"], *image.shape) for image, target in zip(*loader.batch(step)[:2], strict=True)]
            for step in range(10)
        ]

    first, second = drawn(0), drawn(1)
    assert first == drawn(0)
    # The order and the scales each follow the seed.
    assert [[entry[0] for entry in batch] for batch in first] != [[entry[0] for entry in batch] for batch in second]
    assert [[min(entry[2:]) for entry in b] for b in first] != [[min(entry[2:]) for entry in b] for b in second]
    assert all(a != b for a, b in pairwise(first))
    # Four sides of 40 draws: none is left out, and a batch is not of one scale.
    assert len({min(entry[2:]) for batch in first for entry in batch}) == 4
    assert any(len({min(entry[2:]) for entry in batch}) > 1 for batch in first)


def test_flips_come_at_their_rate(mixed):
    loader = Loader(mixed, 8, 0, (16,), 64, flip=0.25)
    plain = Loader(mixed, 8, 0, (16,), 64, flip=0.0)
    flipped = sum(
        not torch.equal(a, b)
        for step in range(100)
        for a, b in zip(loader.batch(step)[0], plain.batch(step)[0], strict=True)
    )
    # 800 draws: 200 expected, standard deviation 12.2.
    assert 150 < flipped < 250


@pytest.mark.parametrize("batch_size", [1, 4, 7, 40])
def test_batches_are_of_one_aspect_and_every_image_comes_equally_often(mixed, batch_size):
    loader = Loader(mixed, batch_size, 0, (16,), 64)
    portrait = [record.height > record.width for record in mixed.images]
    seen: dict[bool, list[int]] = {False: [], True: []}
    epochs = 6
    for step in range(epochs * len(mixed.images)):
        indices = loader.indices(step)
        assert len(indices) == batch_size
        kinds = {portrait[index] for index in indices}
        assert len(kinds) == 1
        seen[kinds.pop()] += indices
    for kind, order in seen.items():
        size = portrait.count(kind)
        # Steps in proportion to the group's size, and the group in whole permutations, each different.
        assert len(order) == epochs * size * batch_size
        rounds = [order[start : start + size] for start in range(0, len(order), size)]
        assert all(sorted(round_) == sorted(rounds[0]) for round_ in rounds)
        assert set(rounds[0]) == {index for index, is_portrait in enumerate(portrait) if is_portrait == kind}
        assert len({tuple(round_) for round_ in rounds}) > epochs - 2
    counts = Counter(index for order in seen.values() for index in order)
    assert set(counts.values()) == {epochs * batch_size}


def test_groups_alternate_through_the_epoch(mixed):
    loader = Loader(mixed, 1, 0, (16,), 64)
    portrait = [mixed.images[loader.indices(step)[0]].height > 20 for step in range(190)]
    # 6 of 19 are portrait; any window holds its share, give or take one.
    for start in range(150):
        assert abs(sum(portrait[start : start + 38]) - 12) <= 1


def test_one_group_alone(tmp_path):
    for name, sizes in (("wide", [(20, 10)] * 3), ("tall", [(10, 20)] * 3)):
        loader = Loader(directory(tmp_path / name, sizes), 2, 0, (10,), 64)
        order = [index for step in range(3) for index in loader.indices(step)]
        assert sorted(order[:3]) == sorted(order[3:]) == [0, 1, 2]


@pytest.mark.parametrize("threads", [0, 2])
def test_an_image_that_does_not_decode_is_named(tmp_path, threads):
    split = directory(tmp_path, [(60, 60)] * 3)
    path = Path(split.images[1].path)
    # After the check, which would have found it.
    data = bytearray(path.read_bytes())
    data[3000:3100] = bytes(100)
    path.write_bytes(data)
    loader = Loader(split, 3, 0, (60,), 64, threads=threads)
    with pytest.raises(DataError, match=r"1\.png: it does not decode"):
        loader.batch(0)
    loader.close()
    evaluation = EvalLoader(split, 1, 60, 64, threads=threads)
    with pytest.raises(DataError, match=r"1\.png"):
        list(evaluation)
    evaluation.close()


def test_small_data_is_decoded_once_and_large_data_not_kept(tmp_path):
    split = directory(tmp_path, [(20, 16)] * 4)
    # Four images at 20x16 and at 25x20.
    needed = 4 * 3 * (20 * 16 + 25 * 20)
    kept = Loader(split, 4, 0, (16, 20), 64, cache_bytes=needed)
    unkept = Loader(split, 4, 0, (16, 20), 64, cache_bytes=needed - 1)
    first = [kept.batch(step) for step in range(12)]
    for step in range(12):
        same(unkept.batch(step), first[step])
    for record in split.images:
        Path(record.path).unlink()
    for step in range(12):
        same(kept.batch(step), first[step])
    with pytest.raises(DataError, match=r"\.png"):
        unkept.batch(0)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_evaluation_shows_every_image_once_in_id_order(mixed, threads, cache_bytes):
    loader = EvalLoader(mixed, 4, 24, 30, threads=threads, cache_bytes=cache_bytes)
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [4, 4, 4, 4, 3] and len(loader) == 5
    shown = [item for _, items in batches for item in items]
    assert [item.image_id for item in shown] == list(range(100, 119))
    for (images, items), (more_images, more_items) in zip(batches, loader, strict=True):
        assert items == more_items
        assert all(torch.equal(a, b) for a, b in zip(images, more_images, strict=True))
    loader.close()


def test_boxes_come_back_to_the_original(tmp_path):
    split = directory(tmp_path, [(101, 67), (67, 101)])
    ((images, shown),) = EvalLoader(split, 2, 50, 1000)
    assert [tuple(image.shape[1:]) for image in images] == [(50, 75), (75, 50)]
    assert shown[0].ratio == (50 / 67, 75 / 101) and (shown[0].width, shown[0].height) == (101, 67)
    found = torch.tensor([[7.425743, 14.925373, 22.277228, 44.776119], [0, 0, 75, 50]])
    torch.testing.assert_close(shown[0].to_original(found), torch.tensor([[10.0, 20, 30, 60], [0, 0, 101, 67]]))
    whole = shown[1].to_original(torch.tensor([[0.0, 0, 50, 75]]))
    torch.testing.assert_close(whole, torch.tensor([[0.0, 0, 67, 101]]))
    assert shown[0].to_original(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got float 2.5"),
        ({"batch_size": True}, "batch_size must be a whole number, got bool True"),
        ({"short_sides": ()}, "short_sides is empty"),
        ({"short_sides": (16, 0)}, "a side of short_sides must be at least 1, got 0"),
        ({"short_sides": (16.5,)}, "a side of short_sides must be a whole number, got float 16.5"),
        ({"max_size": 0}, "max_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"flip": 1.5}, "flip is 1.5, expected a probability"),
        ({"flip": float("nan")}, "flip is nan"),
        ({"threads": -1}, "threads must be at least 0, got -1"),
        ({"cache_bytes": -1}, "cache_bytes must be at least 0, got -1"),
    ],
    ids=str,
)
def test_arguments_out_of_range(mixed, change, message):
    kind = TypeError if "a whole number" in message else ValueError
    with pytest.raises(kind, match=message):
        Loader(mixed, **{"batch_size": 2, "seed": 0, "short_sides": (16,), "max_size": 64, **change})
    if change.keys() <= {"batch_size", "max_size", "threads", "cache_bytes"}:
        with pytest.raises(kind, match=message):
            EvalLoader(mixed, **{"batch_size": 2, "short_side": 16, "max_size": 64, **change})
    with pytest.raises(ValueError, match="split has no images"):
        EvalLoader(replace(mixed, images=[]), 2, 16, 64)


def test_a_range_of_sides(mixed):
    loader = Loader(mixed, 8, 0, range(16, 21), 64)
    sides = {min(image.shape[1:]) for step in range(10) for image in loader.batch(step)[0]}
    assert sides == {16, 17, 18, 19, 20}
