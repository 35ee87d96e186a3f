"""What a detector asks of the targets that it is trained on, before it computes anything.

A box given as x, y, width, height, or a label that counts from 1, trains without an error and to nothing; here it is
refused, and named. Types, shapes and devices are known beforehand. The values of a whole batch become one flag on the
device, which is waited for once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from kernels.runtime.checks import INTEGER, check_device, check_tensor, kind_of

KEYS = ("boxes", "labels")
BOXES = "boxes are x1, y1, x2, y2 in pixels, finite, with x2 > x1 and y2 > y1; x, y, width, height are none"
# Fewer are no polygon, and pycocotools takes four for a box.
LEAST_NUMBERS = 6


class Target(TypedDict):
    """The objects of one image that a detector learns from.

    Attributes:
        boxes: (n, 4) floating point, x1, y1, x2, y2 in pixels; n may be 0.
        labels: (n,) int64 in 0 … C - 1.
        masks: (n, height, width) of numbers or bool, or for each object a list of polygons, arrays x, y, x, y, … in
            pixels.
    """

    boxes: Tensor
    labels: Tensor
    masks: NotRequired[Tensor | Sequence[Sequence[np.ndarray[Any, Any]]]]


def usable_targets(
    targets: Any, sizes: list[tuple[int, int]], num_classes: int, needs_masks: bool, like: Tensor
) -> list[Target]:
    """The targets of a batch as the losses use them, or an error that names the image and its first wrong box.

    Args:
        targets: A list or tuple of one dict an image: `boxes` (n, 4) floating point, x1, y1, x2, y2 in pixels, which
            may overhang the image; `labels` (n,) of any integer type, 0 … C - 1; n may be 0. Other keys pass through.
        sizes: (height, width) of the images.
        num_classes: C, without background.
        needs_masks: Whether every dict must also have `masks`: a tensor (n, height, width) of numbers or bool, or for
            each of the n objects a list of polygons, (2m,) arrays or lists x, y, x, y, …
        like: A tensor of the model: what the targets' tensors must be on the device of.

    Returns:
        New dicts, `boxes` in float32, in float64 for a model in float64, `labels` in int64.

    Raises:
        TypeError: Something is no list, dict or tensor, or a key is missing.
        ValueError: There are no targets; numbers of images or objects, shapes, dtypes, devices or values do not fit.
    """
    if targets is None:
        raise ValueError("targets must be given in training: a list with one dict an image")
    if not isinstance(targets, list | tuple):
        raise TypeError(f"targets must be a list with one dict an image, got {kind_of(targets)}")
    if len(targets) != len(sizes):
        raise ValueError(f"targets must be one dict an image, got {len(targets)} for {len(sizes)} images")
    for image, (target, size) in enumerate(zip(targets, sizes, strict=True)):
        _check_form(image, target, (*KEYS, "masks") if needs_masks else KEYS, like)
        if needs_masks:
            _check_masks(image, target["masks"], len(target["boxes"]), size, like)
    # A box that is none any more after rounding is refused as the losses would see it.
    dtype = torch.promote_types(like.dtype, torch.float32)
    usable = [
        cast(Target, {**t, "boxes": t["boxes"].to(dtype), "labels": t["labels"].to(torch.int64)}) for t in targets
    ]
    _check_values(usable, num_classes)
    return usable


def _check_form(image: int, target: Any, keys: tuple[str, ...], like: Tensor) -> None:
    """Types, shapes and devices of one image's boxes and labels."""
    if not isinstance(target, Mapping):
        raise TypeError(f"targets of image {image} must be a dict with {', '.join(keys)}, got {kind_of(target)}")
    missing = [key for key in keys if key not in target]
    if missing:
        raise TypeError(f"targets of image {image} must have {', '.join(keys)}; missing: {', '.join(missing)}")
    boxes, labels = target["boxes"], target["labels"]
    names = f"boxes of image {image}", f"labels of image {image}"
    check_tensor(names[0], boxes, "(n, 4), (0, 4) for no objects", 2)
    check_tensor(names[1], labels, "(n,)", 1, INTEGER)
    if boxes.shape[1] != 4:
        raise ValueError(f"{names[0]} must be (n, 4), got shape {tuple(boxes.shape)}; {BOXES}")
    if len(boxes) != len(labels):
        raise ValueError(f"image {image} has {len(boxes)} boxes and {len(labels)} labels; each box must have one")
    check_device(names[0], boxes, "the model", like)
    check_device(names[1], labels, "the model", like)


def _check_masks(image: int, masks: Any, count: int, size: tuple[int, int], like: Tensor) -> None:
    """Masks of one image's objects, all that is known of them without reading a tensor."""
    name = f"masks of image {image}"
    if isinstance(masks, Tensor):
        if masks.layout is not torch.strided or masks.is_complex():
            raise ValueError(f"{name} must be a dense tensor of numbers, got {masks.dtype} with {masks.layout}")
        if masks.shape != (count, *size):
            raise ValueError(
                f"{name} must be (n, height, width), {(count, *size)} for its {count} boxes and the size of the image, "
                f"got shape {tuple(masks.shape)}"
            )
        return check_device(name, masks, "the model", like)
    if not isinstance(masks, list | tuple):
        raise TypeError(f"{name} must be a tensor (n, height, width) or lists of polygons, got {kind_of(masks)}")
    if len(masks) != count:
        raise ValueError(f"{name} must be one list of polygons a box, got {len(masks)} for {count} boxes")
    for box, polygons in enumerate(masks):
        if not isinstance(polygons, list | tuple):
            raise TypeError(f"{name}, box {box}, must be a list of polygons, got {kind_of(polygons)}")
        if not polygons or not all(_is_polygon(p) for p in polygons):
            raise ValueError(
                f"{name}, box {box}, must be one or more polygons: arrays or lists of {LEAST_NUMBERS} or more finite "
                "numbers x, y, x, y, … in pixels"
            )


def _is_polygon(polygon: Any) -> bool:
    if not isinstance(polygon, np.ndarray | list | tuple):
        return False
    try:
        numbers = np.asarray(polygon)
    except (ValueError, TypeError, RuntimeError):
        # Lists of unequal length, or of tensors.
        return False
    if numbers.ndim != 1 or numbers.dtype.kind not in "iuf" or len(numbers) < LEAST_NUMBERS or len(numbers) % 2:
        return False
    return bool(np.isfinite(numbers).all())


@torch.no_grad()
def _check_values(targets: list[Target], num_classes: int) -> None:
    """Boxes and labels of all images, at the price of one wait for the device."""
    boxes, labels = torch.cat([t["boxes"] for t in targets]), torch.cat([t["labels"] for t in targets])
    good = (boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1) & (labels >= 0) & (labels < num_classes)
    if good.all():
        return
    wrong = good.tolist().index(False)
    box, label = boxes[wrong].tolist(), labels[wrong].item()
    image, number = 0, wrong
    while number >= len(targets[image]["boxes"]):
        number -= len(targets[image]["boxes"])
        image += 1
    if 0 <= label < num_classes:
        numbers = ", ".join(f"{value:g}" for value in box)
        raise ValueError(f"image {image}, box {number}: [{numbers}] is no box; {BOXES}")
    raise ValueError(
        f"image {image}, box {number}: label {label} is none of 0 … {num_classes - 1}; labels count the {num_classes} "
        "classes from 0, and the background is none of them"
    )
