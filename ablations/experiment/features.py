"""The maps of a frozen backbone: computed once for each image of a data set, for every cell that a process runs.

A backbone that is not trained gives the same maps in every step, every epoch and every cell. What depends on the image
alone is then kept; a step begins behind it. Every image is computed by itself, whatever batch it is in, so that a batch
has the same bits wherever a run was resumed.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ablations.data.batch import Target
from ablations.experiment.precision import autocast
from heads.detector import Detector

# Of a set larger than this, what does not fit is computed anew.
MOST_BYTES = 1 << 30


class Features:
    """Maps by what they are of; those of another backbone or data set than the last one's take their place."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self._owner: Hashable = None
        self._kept: dict[Hashable, list[Tensor]] = {}
        self._bytes = 0

    def of(
        self,
        owner: Hashable,
        model: Detector,
        images: Sequence[Tensor],
        targets: Sequence[Target],
        precision: str,
        extent: tuple[int, int] = (0, 0),
    ) -> list[Tensor]:
        """The backbone's maps of a batch, as `Detector.features` gives them.

        Args:
            owner: Tells backbone, data and precision apart.
            model: Its backbone is frozen.
            images: (3, H, W) each, on the model's device.
            targets: Their targets; image and view are told by `image_id` and `flipped`.
            precision: `"fp32"` or `"bf16"`.
            extent: (height, width) that the images are padded to at least.
        """
        if owner != self._owner:
            self._owner, self._kept, self._bytes = owner, {}, 0
        padded = model.padded(list(images), extent)
        maps = [
            self._one(
                (target["image_id"], target["flipped"], image.shape[-2:], padded), model, image, padded, precision
            )
            for image, target in zip(images, targets, strict=True)
        ]
        return [torch.cat(level).contiguous(memory_format=torch.channels_last) for level in zip(*maps, strict=True)]

    def _one(
        self, view: Hashable, model: Detector, image: Tensor, padded: tuple[int, int], precision: str
    ) -> list[Tensor]:
        if view not in self._kept:
            with torch.no_grad(), autocast(image.device, precision):
                maps = model.features(model.batch([image], padded))
            size = sum(level.numel() * level.element_size() for level in maps)
            if self._bytes + size > self.most_bytes:
                return maps
            self._kept[view] = maps
            self._bytes += size
        return self._kept[view]


def is_frozen(model: Detector) -> bool:
    """Whether no parameter of the backbone is trained."""
    return not any(parameter.requires_grad for parameter in model.backbone.parameters())
