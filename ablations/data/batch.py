"""What a loader gives: the images of a training step or of an evaluation, and whose they are of several processes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

# What a detector trains on (`ablations.data.loader.Loader.batch`).
Target = dict[str, Any]


class Batch(NamedTuple):
    """The images of a training step, or a rank's share of them.

    Attributes:
        images: (3, H, W) uint8 RGB each, of differing sizes.
        targets: One an image; see `ablations.data.loader.Loader.batch`.
        extent: The largest height and the largest width among all images of the step, whoever has them.
    """

    images: list[Tensor]
    targets: list[Target]
    extent: tuple[int, int]


class Share(NamedTuple):
    """Which images of a step or of an evaluation a process takes, of several that work on it together.

    A training step is trained on in `parts`, one after the other; each rank takes an equal share of every part. Of an
    evaluation's batches each rank takes every `ranks`th.

    Attributes:
        rank: The number of this process, from 0.
        ranks: How many there are.
        parts: Parts of a step.
    """

    rank: int = 0
    ranks: int = 1
    parts: int = 1

    def positions(self, batch_size: int) -> np.ndarray:
        """Which of a step's images this rank takes, part by part.

        Example:
            >>> Share(rank=1, ranks=2, parts=2).positions(8).tolist()
            [2, 3, 6, 7]
        """
        return np.arange(batch_size).reshape(self.parts, self.ranks, -1)[:, self.rank].ravel()


ALONE = Share()


@dataclass(frozen=True, slots=True)
class Shown:
    """An image as evaluation shows it to a model.

    Attributes:
        image_id: COCO's id.
        width, height: Size of the original image in pixels.
        ratio: Height and width of the shown image over those of the original.
    """

    image_id: int | str
    width: int
    height: int
    ratio: tuple[float, float]

    def to_original(self, boxes: Tensor) -> Tensor:
        """Boxes (K, 4) xyxy from pixels of the shown image to pixels of the original one."""
        ratio_y, ratio_x = self.ratio
        return boxes / boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])
