"""What a detector says of wrong targets and images, and that right ones reach the losses as they are."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from heads import build_detector, detector
from heads.build import DETECTORS, WITH_MASKS
from heads.targets import usable_targets

CLASSES = 3
SIZES = [(64, 96), (70, 50)]
IMAGES = [
    torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) for size in SIZES
]
LIKE = torch.zeros(())
# The last box overhangs its image, which is no fault.
BOXES = torch.tensor([[8.0, 8.0, 56.0, 50.0], [60.0, 20.0, 90.0, 60.0], [-4.0, 5.0, 60.0, 45.0]])
BOX = [1.0, 2.0, 3.0, 4.0]
TRIANGLE = [8.0, 8.0, 56.0, 8.0, 30.0, 50.0]


def sound() -> list[dict]:
    """An image with two boxes and one with one; labels and masks of each."""
    masks = [torch.zeros(2, *SIZES[0], dtype=torch.uint8), torch.zeros(1, *SIZES[1], dtype=torch.bool)]
    masks[0][:, 10:40, 10:50] = masks[1][:, 8:40, :30] = 1
    return [
        {"boxes": BOXES[:2].clone(), "labels": torch.tensor([0, 2]), "masks": masks[0], "file": "a.png"},
        {"boxes": BOXES[2:].clone(), "labels": torch.tensor([1]), "masks": masks[1], "file": "b.png"},
    ]


def second(**changes):
    """The sound targets, with other values in the second image; None leaves a key out."""
    targets = sound()
    targets[1] = {key: value for key, value in {**targets[1], **changes}.items() if value is not None}
    return targets


def box(*numbers) -> list[dict]:
    return second(boxes=torch.tensor([numbers]))


NAN, INF = float("nan"), float("inf")
WRONG = {
    "no targets": (None, ValueError, "targets must be given in training"),
    "a dict": (sound()[0], TypeError, "targets must be a list"),
    "one for two images": (sound()[:1], ValueError, "got 1 for 2 images"),
    "three for two images": (sound() + sound()[:1], ValueError, "got 3 for 2 images"),
    "an image without a dict": ([sound()[0], None], TypeError, "targets of image 1 must be a dict"),
    "no boxes": (second(boxes=None), TypeError, "image 1 .*missing: boxes"),
    "no labels": (second(labels=None), TypeError, "image 1 .*missing: labels"),
    "lists": (second(boxes=[BOX]), TypeError, "boxes of image 1 must be a tensor"),
    "labels in a list": (second(labels=[1]), TypeError, "labels of image 1 must be a tensor"),
    "arrays": (second(boxes=np.array([BOX])), TypeError, "boxes of image 1 must be a tensor"),
    "one dimension without boxes": (second(boxes=torch.tensor([])), ValueError, r"boxes of image 1 .*got shape \(0,\)"),
    "rotated": (box(*BOX, 0.5), ValueError, r"boxes of image 1 must be \(n, 4\), got shape \(1, 5\); boxes are x1"),
    "a batch of boxes": (second(boxes=torch.tensor([[BOX]])), ValueError, r"boxes of image 1 .*\(1, 1, 4\)"),
    "whole numbers": (second(boxes=torch.tensor([[1, 2, 3, 4]])), ValueError, "boxes of image 1 .*floating point"),
    "floating labels": (second(labels=torch.tensor([1.0])), ValueError, "labels of image 1 .*integers"),
    "boolean labels": (second(labels=torch.tensor([True])), ValueError, "labels of image 1 .*integers"),
    "one-hot labels": (second(labels=torch.tensor([[0, 1, 0]])), ValueError, r"labels of image 1 .*\(n,\)"),
    "a scalar label": (second(labels=torch.tensor(1)), ValueError, r"labels of image 1 .*\(n,\)"),
    "sparse": (second(boxes=torch.tensor([BOX]).to_sparse()), ValueError, "boxes of image 1 must be a dense tensor"),
    "two labels for a box": (second(labels=torch.tensor([0, 1])), ValueError, "image 1 has 1 boxes and 2 labels"),
    "a label for two boxes": (second(boxes=torch.tensor([BOX, BOX])), ValueError, "image 1 has 2 boxes and 1 labels"),
    "labels without boxes": (second(boxes=torch.zeros(0, 4)), ValueError, "image 1 has 0 boxes and 1 labels"),
    "boxes elsewhere": (second(boxes=torch.zeros(1, 4, device="meta")), ValueError, "boxes of image 1 .*on meta"),
    "labels elsewhere": (second(labels=torch.tensor([1], device="meta")), ValueError, "labels of image 1 .*on meta"),
    "x, y, width, height": (box(60.0, 50, 20, 30), ValueError, r"image 1, box 0: \[60, 50, 20, 30\] .*x2 > x1"),
    "no width": (box(5.0, 5, 5, 9), ValueError, "image 1, box 0: .*pixels"),
    "no height": (box(5.0, 5, 9, 5), ValueError, "image 1, box 0: "),
    "no height after rounding": (
        second(boxes=torch.tensor([[5, 5, 9, 5 + 1e-9]], dtype=torch.float64)),
        ValueError,
        "image 1, box 0: ",
    ),
    "right of the left": (box(9.0, 5, 5, 9), ValueError, "image 1, box 0: "),
    "upside down": (box(5.0, 9, 9, 5), ValueError, "image 1, box 0: "),
    **{f"NaN at {i}": (box(*BOX[:i], NAN, *BOX[i + 1 :]), ValueError, "image 1, box 0: .*nan") for i in range(4)},
    "to infinity": (box(1.0, 2, INF, 4), ValueError, r"image 1, box 0: \[1, 2, inf, 4\] .*finite"),
    "from infinity": (box(1.0, -INF, 3, 4), ValueError, r"image 1, box 0: \[1, -inf, 3, 4\] .*finite"),
    "a label too many": (second(labels=torch.tensor([CLASSES])), ValueError, "image 1, box 0: label 3 .*from 0"),
    "a small type": (second(labels=torch.tensor([255]).byte()), ValueError, "image 1, box 0: label 255 .*0 … 2"),
    "a label below": (second(labels=torch.tensor([-1])), ValueError, "image 1, box 0: label -1 .*from 0"),
}
WRONG_MASKS = {
    "none": (second(masks=None), TypeError, "image 1 .*missing: masks"),
    "an array": (second(masks=np.zeros((1, *SIZES[1]))), TypeError, "masks of image 1 must be a tensor"),
    "another size": (second(masks=torch.zeros(1, 50, 70)), ValueError, r"masks of image 1 .*\(1, 70, 50\)"),
    "too many": (second(masks=torch.zeros(2, *SIZES[1])), ValueError, r"masks of image 1 .*for its 1 boxes"),
    "channels": (second(masks=torch.zeros(1, 1, *SIZES[1])), ValueError, r"masks of image 1 .*\(1, 1, 70, 50\)"),
    "complex": (second(masks=torch.zeros(1, *SIZES[1], dtype=torch.cfloat)), ValueError, "masks of image 1 .*numbers"),
    "sparse": (second(masks=torch.zeros(1, *SIZES[1]).to_sparse()), ValueError, "masks of image 1 .*dense"),
    "elsewhere": (second(masks=torch.zeros(1, *SIZES[1], device="meta")), ValueError, "masks of image 1 .*on meta"),
    "polygons of two": (second(masks=[[TRIANGLE]] * 2), ValueError, "masks of image 1 .*got 2 for 1 boxes"),
    "a polygon without a list": (second(masks=[np.array(TRIANGLE)]), TypeError, "masks of image 1, box 0, .*list"),
    "run lengths": (second(masks=[{"size": [70, 50], "counts": "1"}]), TypeError, "image 1, box 0, .*got dict"),
    "no polygon": (second(masks=[[]]), ValueError, "image 1, box 0, .*one or more polygons"),
    "a line": (second(masks=[[TRIANGLE, TRIANGLE[:4]]]), ValueError, "image 1, box 0, .*6 or more"),
    "half a point": (second(masks=[[[*TRIANGLE, 1.0]]]), ValueError, "image 1, box 0, .*x, y"),
    "points": (second(masks=[[np.reshape(TRIANGLE, (3, 2))]]), ValueError, "image 1, box 0, "),
    "uneven points": (second(masks=[[[[1, 2], [3]] * 3]]), ValueError, "image 1, box 0, "),
    "tensors": (second(masks=[[torch.tensor(TRIANGLE)]]), ValueError, "image 1, box 0, "),
    "words": (second(masks=[[["x"] * 6]]), ValueError, "image 1, box 0, "),
    "nowhere": (second(masks=[[[*TRIANGLE[:5], NAN]]]), ValueError, "image 1, box 0, .*finite"),
}
CASES = [(name, why) for why in WRONG for name in DETECTORS] + [("mask_rcnn", f"masks: {why}") for why in WRONG_MASKS]
PICTURE = IMAGES[1]
WRONG_IMAGES = {
    "a batch": (torch.stack([IMAGES[0]] * 2), TypeError, "images must be a list"),
    "none": ([], ValueError, "got none"),
    "an array": ([IMAGES[0], PICTURE.numpy()], TypeError, "image 1 must be a tensor"),
    "channels last": ([IMAGES[0], PICTURE.permute(1, 2, 0)], ValueError, r"image 1 .*\(70, 50, 3\)"),
    "a batch of one": ([IMAGES[0], PICTURE[None]], ValueError, r"image 1 .*\(1, 3, 70, 50\)"),
    "grey": ([IMAGES[0], PICTURE[:1]], ValueError, r"image 1 .*\(1, 70, 50\)"),
    "no pixels": ([IMAGES[0], PICTURE[:, :0]], ValueError, r"image 1 .*\(3, 0, 50\)"),
    "int64": ([IMAGES[0], PICTURE.long()], ValueError, "image 1 .*int64"),
    "elsewhere": ([IMAGES[0], PICTURE.to("meta")], ValueError, "image 1 .*on meta"),
}


@pytest.fixture(scope="module")
def models():
    """Every detector, in training."""
    torch.manual_seed(0)
    return {name: build_detector(name, CLASSES, "tiny", "LSC", depth=1, channels=16) for name in DETECTORS}


@pytest.fixture
def uncomputed(models, monkeypatch):
    """The same, but computing anything is an error."""

    def never(*_):
        raise AssertionError("the detector had begun to compute")

    monkeypatch.setattr(detector.Detector, "batch", never)
    return models


@pytest.mark.parametrize(("name", "why"), CASES)
def test_wrong_targets_are_refused_before_anything_is_computed(uncomputed, name, why):
    targets, error, message = WRONG_MASKS[why.removeprefix("masks: ")] if why.startswith("masks: ") else WRONG[why]
    with pytest.raises(error, match=message):
        uncomputed[name](IMAGES, targets)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("why", WRONG_IMAGES)
def test_wrong_images_are_refused(uncomputed, why, training):
    images, error, message = WRONG_IMAGES[why]
    uncomputed["detr"].train(training)
    try:
        with pytest.raises(error, match=message):
            uncomputed["detr"](images, sound())
    finally:
        uncomputed["detr"].train()


def test_the_first_wrong_box_is_named_among_many():
    """Images without boxes are counted, and a label that stands before a wrong box is first."""
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    many = {"boxes": torch.tensor([BOX] * 5), "labels": torch.zeros(5, dtype=torch.long)}
    wrong = {"boxes": many["boxes"].clone(), "labels": many["labels"].clone()}
    wrong["boxes"][3], wrong["labels"][2] = torch.tensor([4.0, 3.0, 2.0, 1.0]), 5
    sizes = [SIZES[0]] * 5
    with pytest.raises(ValueError, match="image 3, box 2: label 5"):
        usable_targets([none, many, none, wrong, many], sizes, CLASSES, False, LIKE)
    wrong["labels"][2] = 0
    with pytest.raises(ValueError, match=r"image 3, box 3: \[4, 3, 2, 1\]"):
        usable_targets([none, many, none, wrong, many], sizes, CLASSES, False, LIKE)


def losses(model, targets, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    with torch.no_grad():
        return model(IMAGES, targets, **options)


@pytest.mark.parametrize("name", DETECTORS)
def test_right_targets_give_the_same_losses_and_stay_as_they_are(models, name):
    given_targets = sound()
    want = losses(models[name], given_targets, check_targets=False)
    assert losses(models[name], given_targets) == want
    converted = sound()
    converted[0] |= {"boxes": BOXES[:2].double(), "labels": torch.tensor([0, 2], dtype=torch.int32)}
    converted[1] |= {"boxes": BOXES[2:].half(), "labels": torch.tensor([1], dtype=torch.uint8)}
    assert losses(models[name], tuple(converted)) == want
    assert converted[0]["boxes"].dtype == torch.float64 and converted[1]["labels"].dtype == torch.uint8
    for target, before in zip(given_targets, sound(), strict=True):
        assert target.keys() == before.keys() and target["file"] == before["file"]
        assert all(torch.equal(target[key], before[key]) for key in ("boxes", "labels", "masks"))
    empty = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int32), "masks": []}] * 2
    assert all(value.isfinite() for value in losses(models[name], empty).values())


def test_masks_are_for_the_detectors_that_need_them(models):
    assert tuple(name for name, model in models.items() if model.needs_masks) == WITH_MASKS
    polygons = sound()
    polygons[0]["masks"] = [[TRIANGLE], (np.array(TRIANGLE), np.array(TRIANGLE, dtype=np.float32) + 1)]
    polygons[1]["masks"] = ((TRIANGLE,),)
    assert losses(models["mask_rcnn"], polygons)["loss_mask"].isfinite()
    for masks in (torch.zeros(1, *SIZES[1], dtype=torch.int64), torch.ones(1, *SIZES[1], dtype=torch.float64)):
        assert usable_targets(second(masks=masks), SIZES, CLASSES, True, LIKE)[1]["masks"] is masks
    without = [{"boxes": t["boxes"], "labels": t["labels"]} for t in sound()]
    assert losses(models["atss"], without) == losses(models["atss"], second(masks="of no use"))


def test_a_model_in_float64_keeps_the_boxes_digits():
    boxes = BOXES[2:].double() + 1e-12
    for like, dtype in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32)):
        found = usable_targets(second(boxes=boxes), SIZES, CLASSES, False, LIKE.to(like))[1]["boxes"]
        assert found.dtype == dtype and torch.equal(found, boxes.to(dtype))


WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive")
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "nonzero", "to_list")


class Waits(TorchDispatchMode):
    """Counts operators that wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        self.found[name] += name in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "masked_select",
            "_unique2",
            "unique_dim",
        )
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts methods of tensors that read values."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.found[func.__name__] += func.__name__ in READS
        return func(*args, **(kwargs or {}))


def test_the_device_is_waited_for_once():
    targets = sound() * 4
    with Waits() as waits, Reads() as reads:
        usable_targets(targets, SIZES * 4, CLASSES, True, LIKE)
    assert +waits.found == {"_local_scalar_dense": 1} and +reads.found == {"__bool__": 1}


@pytest.mark.parametrize("name", ["atss", "detr"])
def test_unchecked_targets_are_not_waited_for(models, name, monkeypatch):
    found = []
    for options in ({}, {"check_targets": False}):
        with Waits() as waits:
            losses(models[name], sound(), **options)
        found.append(waits.found["_local_scalar_dense"])
        # The second time they are not even looked at.
        monkeypatch.setattr(detector, "usable_targets", None)
    assert found[0] == found[1] + 1


def test_evaluation_does_not_look_at_targets(models):
    model = models["retinanet"].eval()
    try:
        with torch.inference_mode():
            assert len(model(IMAGES, "anything")) == len(model(IMAGES)) == 2
    finally:
        model.train()


FLOATS = st.floats(width=32)
GOOD = st.tuples(*[st.floats(0, 50, width=32)] * 2, *[st.floats(51, 99, width=32)] * 2)
BAD = st.tuples(FLOATS, FLOATS, FLOATS, FLOATS).filter(
    lambda b: not (b[2] > b[0] and b[3] > b[1] and np.isfinite(b).all())
)
JUNK = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.just({}),
    st.builds(torch.zeros, st.lists(st.integers(0, 3), max_size=4)),
    st.builds(lambda shape: torch.zeros(shape, dtype=torch.bool), st.lists(st.integers(0, 3), max_size=3)),
    st.builds(lambda shape: np.zeros(shape), st.lists(st.integers(0, 3), max_size=3)),
)


@st.composite
def malformed(draw) -> object:
    """Targets for one to three images, sound but for one thing."""
    targets = []
    for _ in range(draw(st.integers(1, 3))):
        boxes = draw(st.lists(GOOD, max_size=4))
        labels = draw(st.lists(st.integers(0, CLASSES - 1), min_size=len(boxes), max_size=len(boxes)))
        kind = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
        small = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]))
        targets.append({"boxes": torch.tensor(boxes, dtype=kind).view(-1, 4), "labels": torch.tensor(labels).to(small)})
    count, victim = len(targets), draw(st.sampled_from(targets))
    where = draw(st.integers(0, len(victim["boxes"])))
    fault = draw(st.sampled_from(["box", "label", "boxes", "labels", "key", "target", "targets", "number"]))
    if fault == "box":
        boxes, bad = victim["boxes"].float(), torch.tensor([draw(BAD)])
        victim["boxes"] = torch.cat([boxes[:where], bad, boxes[where:]])
        victim["labels"] = torch.zeros(len(boxes) + 1, dtype=torch.int64)
    elif fault == "label":
        bad = draw(st.one_of(st.integers(-(2**63), -1), st.integers(CLASSES, 2**63 - 1)))
        victim["labels"] = torch.cat([victim["labels"].long(), torch.tensor([bad])])
        victim["boxes"] = torch.cat([victim["boxes"].float(), torch.tensor([BOX])])
    elif fault in ("boxes", "labels"):
        length = len(victim["boxes"])
        victim[fault] = draw(
            JUNK.filter(
                lambda x: not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape == (length, 4))
            )
        )
    elif fault == "key":
        del victim[draw(st.sampled_from(["boxes", "labels"]))]
    elif fault == "target":
        targets[draw(st.integers(0, count - 1))] = draw(JUNK)
    elif fault == "targets":
        return draw(JUNK.filter(lambda x: x is None or not isinstance(x, list) or len(x) != count)), count
    else:
        return targets + targets[: draw(st.integers(1, 2))], count
    return targets, count


@settings(max_examples=200, deadline=None)
@given(malformed(), st.booleans())
def test_malformed_targets_are_a_value_or_a_type_error(made, needs_masks):
    targets, count = made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, TypeError)):
            usable_targets(targets, [(100, 100)] * count, CLASSES, needs_masks, LIKE)


@settings(max_examples=100, deadline=None)
@given(st.lists(JUNK, max_size=3), st.booleans())
def test_malformed_masks_are_a_value_or_a_type_error(masks, listed):
    targets = second(masks=[masks] if listed else masks)
    with pytest.raises((ValueError, TypeError)):
        usable_targets(targets, SIZES, CLASSES, True, LIKE)
