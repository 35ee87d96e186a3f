"""Batches for training and evaluation: decoded by Pillow, resized, flipped, grouped by aspect ratio.

A training batch is a pure function of the split, the seed and the step. Nothing is carried from one step to the next,
so a resumed run sees what an uninterrupted one would have seen, and threads that work ahead cannot change it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ablations.data.annotations import mask_problems
from ablations.data.batch import ALONE, Batch, Share, Shown, Target
from ablations.data.coco import read_image
from ablations.data.problems import DataError
from ablations.data.segments import bitmap
from ablations.data.split import ImageRecord, Split, sizes
from kernels.runtime.checks import check_integer

CACHE_BYTES = 512 << 20

Made = TypeVar("Made")

# The first word of a seed sequence after the seed: streams of different purpose never meet.
_ORDER, _AUGMENT = 0, 1


def resized(width: int, height: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Width and height with the shorter side brought to `short_side`, less where the longer would pass `max_size`.

    Both sides are rounded to whole pixels, so the two ratios differ slightly; boxes are scaled by the exact ones.

    Example:
        >>> from ablations.data.loader import resized
        >>> resized(640, 427, 800, 1333)
        (1199, 800)
    """
    scale = min(short_side / min(width, height), max_size / max(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def scale_boxes(boxes: np.ndarray, ratio_x: float, ratio_y: float) -> np.ndarray:
    """Boxes (n, 4) xyxy in an image resized by these ratios; pixel edges, not centres, are what scales."""
    return boxes * np.array([ratio_x, ratio_y, ratio_x, ratio_y], dtype=np.float32)


def flip_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    """Boxes (n, 4) xyxy in the horizontally flipped image of this width.

    Example:
        >>> import numpy as np
        >>> from ablations.data.loader import flip_boxes
        >>> flip_boxes(np.array([[10, 20, 30, 40]]), 100).tolist()
        [[70, 20, 90, 40]]
    """
    flipped = boxes.copy()
    flipped[:, 0], flipped[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return flipped


class _Pixels:
    """Images of a split at given sizes, kept in memory if all that can be asked for fits.

    Everything here and in `_make` is numpy and Pillow: a torch operation would start as many OpenMP threads as torch
    has, in each loader thread anew and in the way of the training step.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        short_sides: Sequence[int],
        max_size: int,
        budget: int,
        pin: bool = False,
    ):
        self.records, self.pin = records, pin
        self.kept: dict[tuple[int, int, int], np.ndarray] = {}
        shapes = sizes(records).astype(np.float64)
        total = 0.0
        for short_side in sorted(set(short_sides)):
            scale = np.minimum(short_side / shapes.min(1), max_size / shapes.max(1))
            total += 3 * (shapes.prod(1) * scale**2).sum()
            if total > budget:
                break
        self.keeps = total <= budget

    def get(self, index: int, width: int, height: int, flip: bool = False) -> Tensor:
        """The image at this size, (3, height, width) uint8, the caller's own."""
        key = (index, width, height)
        image = self.kept.get(key)
        if image is None:
            pixels = read_image(self.records[index])
            if pixels.shape[:2] != (height, width):
                # Pillow puts pixel centres at half-integers and widens its filter when it shrinks.
                pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
            if not self.keeps:
                return self._own(pixels.transpose(2, 0, 1), flip)
            image = self.kept[key] = np.array(pixels.transpose(2, 0, 1), order="C")
        return self._own(image, flip)

    def _own(self, image: np.ndarray, flip: bool) -> Tensor:
        """A copy of (3, height, width) pixels, mirrored or not, in the order of these axes."""
        own = torch.empty(image.shape, dtype=torch.uint8, pin_memory=self.pin)
        # numpy copies with one thread, and lets other Python threads run.
        np.copyto(own.numpy(), image[..., ::-1] if flip else image)
        return own


class _Ahead(Generic[Made]):
    """Calls a pure function of an index, with threads that work on the indices to come."""

    def __init__(self, make: Callable[[int], Made], threads: int, end: int | None = None):
        self.make, self.threads, self.end = make, threads, end
        self.pool = ThreadPoolExecutor(threads, "loader") if threads else None
        self.pending: dict[int, Future[Made]] = {}

    def __call__(self, index: int) -> Made:
        if self.pool is None:
            return self.make(index)
        # Two more than there are threads, so that none is idle while the caller fetches the next.
        stop = index + self.threads + 2
        stop = stop if self.end is None else min(stop, self.end)
        for stale in [other for other in self.pending if not index <= other < stop]:
            self.pending.pop(stale).cancel()
        for wanted in range(index, stop):
            if wanted not in self.pending:
                self.pending[wanted] = self.pool.submit(self.make, wanted)
        return self.pending.pop(index).result()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


class Loader:
    """Training batches of one split.

    Images are taken from two groups, landscape and portrait, and a batch from one group only, so that little is padded.
    Each group is an endless sequence of seeded permutations, cut into batches; the steps are dealt to the groups evenly
    in proportion to their sizes. So every image of a group is seen once before any is seen twice, no batch is short,
    and no image is left out. Scale and flip are drawn from a generator seeded by the seed and the step, one draw for
    each image of the batch.

    Args:
        split: What to read.
        batch_size: Images a step.
        seed: Not negative.
        short_sides: The shorter side in pixels is drawn from these, each image for itself: a tuple or a range.
        max_size: Cap of the longer side in pixels.
        flip: Probability of a horizontal flip.
        threads: How many threads make the coming batches; 0 makes each when it is asked for.
        cache_bytes: Images are kept decoded and resized when all of them, at all sizes, need no more memory than this.
        masks: Whether the targets have masks; every object of positive size then needs a segmentation.
        share: The images of each step that this process takes; all of them if it works alone.
        pin: Whether images lie in pinned memory, which a GPU copies from while it computes.

    Raises:
        TypeError, ValueError: An argument is no whole number, or out of range.
        DataError: Masks are wanted, and objects lack a segmentation.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        short_sides: Sequence[int],
        max_size: int,
        *,
        flip: float = 0.5,
        threads: int = 0,
        cache_bytes: int = CACHE_BYTES,
        masks: bool = False,
        share: Share = ALONE,
        pin: bool = False,
    ):
        check_integer("seed", seed, 0)
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is {flip!r}, expected a probability, 0 to 1")
        _check_arguments(split, batch_size, short_sides, max_size, threads, cache_bytes)
        if masks and (problems := mask_problems(split.annotations, training=True)):
            raise DataError(split.path, problems)
        self.records = split.images
        self.masks = masks
        self.batch_size, self.seed, self.flip = batch_size, seed, flip
        self.short_sides, self.max_size = tuple(short_sides), max_size
        shapes = sizes(self.records)
        portrait = shapes[:, 1] > shapes[:, 0]
        self.groups = (np.flatnonzero(~portrait), np.flatnonzero(portrait))
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._pixels = _Pixels(self.records, self.short_sides, max_size, cache_bytes, pin)
        self._ahead = _Ahead(self._make, threads)
        if batch_size % (share.ranks * share.parts):
            raise ValueError(f"{share.ranks} ranks and {share.parts} parts do not divide {batch_size} images evenly")
        self._positions = share.positions(batch_size).tolist()

    def batch(self, step: int) -> Batch:
        """The batch of a step, the same for the same step whenever and in whatever order it is asked for.

        Returns:
            Images, and for each a target: `boxes` (n, 4) float32 xyxy in pixels of that image, finite and of positive
            size, `labels` (n,) int64, 0-based, `image_id`, and `flipped`; n is 0 for an image without objects. With
            `masks` also `masks`, (n, H, W) uint8 of 0 and 1. An object whose box has no size left at the size of the
            image is left out.

        Raises:
            DataError: An image does not decode; the message names the file.
        """
        return self._ahead(step)

    def close(self) -> None:
        """End the threads, if there are any."""
        self._ahead.close()

    def indices(self, step: int) -> list[int]:
        """Which images of the split make up the batch of a step."""
        landscape = len(self.groups[0])
        # How many batches of landscape images come before this step, and whether one comes in it.
        before = step * landscape // len(self.records)
        group = 0 if (step + 1) * landscape // len(self.records) > before else 1
        number = before if group == 0 else step - before
        members = self.groups[group]
        start = number * self.batch_size
        chosen = []
        for number in range(start, start + self.batch_size):
            epoch, offset = divmod(number, len(members))
            chosen.append(int(members[self._order(group, epoch)[offset]]))
        return chosen

    def _order(self, group: int, epoch: int) -> np.ndarray:
        order = self._orders.get((group, epoch))
        if order is None:
            generator = np.random.default_rng([self.seed, _ORDER, group, epoch])
            order = generator.permutation(len(self.groups[group]))
            if len(self._orders) >= 8:
                self._orders = {}
            self._orders[group, epoch] = order
        return order

    def _make(self, step: int) -> Batch:
        generator = np.random.default_rng([self.seed, _AUGMENT, step])
        sides = generator.integers(len(self.short_sides), size=self.batch_size).tolist()
        flips = (generator.random(self.batch_size) < self.flip).tolist()
        indices = self.indices(step)
        shapes = [
            resized(self.records[index].width, self.records[index].height, self.short_sides[side], self.max_size)
            for index, side in zip(indices, sides, strict=True)
        ]
        made = [self._image(indices[n], shapes[n], flips[n]) for n in self._positions]
        extent = max(height for _, height in shapes), max(width for width, _ in shapes)
        return Batch([image for image, _ in made], [target for _, target in made], extent)

    def _image(self, index: int, size: tuple[int, int], flip: bool) -> tuple[Tensor, Target]:
        """An image at this (width, height), and its target."""
        record, (width, height) = self.records[index], size
        boxes = scale_boxes(record.boxes, width / record.width, height / record.height)
        if flip:
            boxes = flip_boxes(boxes, width)
        # A sliver far from the origin has no size left after the rounding to float32.
        kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
        target: Target = {
            "boxes": torch.from_numpy(boxes[kept]),
            "labels": torch.from_numpy(record.labels[kept]),
            "image_id": record.image_id,
            "flipped": flip,
        }
        if self.masks:
            target["masks"] = _masks(record, kept, width, height, flip)
        return self._pixels.get(index, width, height, flip), target


def _masks(record: ImageRecord, kept: np.ndarray, width: int, height: int, flip: bool) -> Tensor:
    """The masks of these objects of an image at this size, (n, height, width) uint8."""
    masks = np.zeros((len(kept), height, width), np.uint8)
    for mask, index in zip(masks, kept.tolist(), strict=True):
        mask[:] = bitmap(record.segmentations[index], record.width, record.height, width, height)
    return torch.from_numpy(masks[..., ::-1].copy() if flip else masks)


class EvalLoader:
    """All images of a split, each once, in id order, in batches of a fixed size; only the last may be shorter.

    Args:
        split: What to read.
        batch_size: Images a batch. It decides the padding and with it the result, so it belongs into the record.
        short_side, max_size: As in `resized`, pixels.
        threads, cache_bytes: As for `Loader`.
        share: The batches that this process takes; all of them if it works alone. Batches are whole, so that an image
            is padded as it would be by one process.

    Raises:
        TypeError, ValueError: An argument is no whole number, or out of range.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        short_side: int,
        max_size: int,
        *,
        threads: int = 0,
        cache_bytes: int = 0,
        share: Share = ALONE,
    ):
        _check_arguments(split, batch_size, (short_side,), max_size, threads, cache_bytes)
        self.records, self.batch_size = split.images, batch_size
        self.short_side, self.max_size = short_side, max_size
        self._pixels = _Pixels(self.records, (short_side,), max_size, cache_bytes)
        self.numbers = range(share.rank, -(-len(self.records) // batch_size), share.ranks)
        self._ahead = _Ahead(self._make, threads, len(self))

    def __len__(self) -> int:
        """How many batches this process takes."""
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Shown]]]:
        """Images, (3, H, W) uint8 RGB, and what leads from each back to its original.

        Raises:
            DataError: An image does not decode; the message names the file.
        """
        for number in range(len(self)):
            yield self._ahead(number)

    def close(self) -> None:
        """End the threads, if there are any."""
        self._ahead.close()

    def _make(self, number: int) -> tuple[list[Tensor], list[Shown]]:
        images, shown = [], []
        start = self.numbers[number] * self.batch_size
        for index in range(start, min(start + self.batch_size, len(self.records))):
            record = self.records[index]
            width, height = resized(record.width, record.height, self.short_side, self.max_size)
            images.append(self._pixels.get(index, width, height))
            ratio = (height / record.height, width / record.width)
            shown.append(Shown(record.image_id, record.width, record.height, ratio))
        return images, shown


def _check_arguments(
    split: Split, batch_size: int, short_sides: Sequence[int], max_size: int, threads: int, cache_bytes: int
) -> None:
    if not split.images:
        raise ValueError("split has no images, expected at least one")
    check_integer("batch_size", batch_size, 1)
    check_integer("threads", threads, 0)
    check_integer("cache_bytes", cache_bytes, 0)
    if not len(short_sides):
        raise ValueError("short_sides is empty, expected at least one side")
    for side in short_sides:
        check_integer("a side of short_sides", side, 1)
    check_integer("max_size", max_size, 1)
