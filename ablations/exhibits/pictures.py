"""Images and maps as small data URIs, and boxes as numbers, so that a page draws them sharp in any size and colour."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ablations.exhibits.choose import Box, overlap

# Pixels of the longer side: of an image as a page shows it, and of a map, which has few of its own.
IMAGE_SIDE, MAP_SIDE = 320, 64
JPEG_QUALITY = 82
RIGHT_IOU = 0.5


def image_uri(pixels: NDArray[np.uint8]) -> str:
    """An image (height, width, 3) uint8 RGB as a JPEG of at most `IMAGE_SIDE` pixels, never enlarged."""
    image = Image.fromarray(pixels)
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return _uri("jpeg", buffer)


def map_uri(values: Tensor) -> str:
    """A map (H, W) of numbers from 0 up as a PNG, from dark (0) to bright (its own largest value)."""
    array = values.float().numpy()
    top = float(array.max())
    image = Image.fromarray((array * (255 / top if top > 0 else 0)).round().astype(np.uint8), "L")
    image.thumbnail((MAP_SIDE, MAP_SIDE), Image.Resampling.BOX)
    palette = (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    coloured = Image.fromarray(np.asarray(image), "P")
    coloured.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    coloured.save(buffer, "PNG", optimize=True)
    return _uri("png", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def truth_boxes(objects: Sequence[Box], names: dict[Any, str]) -> list[dict[str, Any]]:
    """Annotated objects, crowd regions left out: `box` x, y, width, height in pixels, and `label`."""
    return [_drawn(box, names) for box in objects if not box.get("iscrowd")]


def best_boxes(objects: Sequence[Box], found: Sequence[Box], names: dict[Any, str]) -> list[dict[str, Any]]:
    """As many detections as the image has objects, by falling score; no threshold that one detector meets more easily.

    Args:
        objects: Annotations of the image.
        found: Detections of the image, in COCO's layout.
        names: Of the categories, by id.

    Returns:
        As `truth_boxes`, with `score`, and `right`: whether it is the first on an object of its category with IoU of
        at least 0.5.
    """
    objects = [box for box in objects if not box.get("iscrowd")]
    ranked = sorted(found, key=lambda box: -box["score"])[: len(objects)]
    overlaps = overlap(ranked, objects)
    taken: set[int] = set()
    drawn = []
    for box, row in zip(ranked, overlaps, strict=True):
        fits = [
            number
            for number, other in enumerate(objects)
            if number not in taken and other["category_id"] == box["category_id"] and row[number] >= RIGHT_IOU
        ]
        if fits:
            taken.add(max(fits, key=lambda number: row[number]))
        drawn.append(_drawn(box, names) | {"score": round(float(box["score"]), 3), "right": bool(fits)})
    return drawn


def _drawn(box: Box, names: dict[Any, str]) -> dict[str, Any]:
    corners = [round(float(value), 1) for value in box["bbox"]]
    return {"box": corners, "label": names.get(box["category_id"], str(box["category_id"]))}
