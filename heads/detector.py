"""A detector is backbone → FPN → trunk → prediction head; what a second stage does is its head's affair."""

from typing import Any

import torch
from torch import Tensor, nn

from heads.targets import usable_targets
from kernels.runtime.checks import check_device, kind_of

# ImageNet's channel statistics, RGB in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class PredictionHead(nn.Module):
    """The last part of a detector: it predicts from the trunk's maps, and knows the losses and the detections.

    A subclass has `forward(classification maps, regression maps)`, whatever it returns, and of that
    `loss(outputs, targets, image_sizes)` and `predict(outputs, image_sizes)`.

    Attributes:
        num_classes: Object classes, without background.
        needs_masks: Whether the targets of `loss` must have `masks`.
    """

    num_classes: int
    needs_masks = False


class Detector(nn.Module):
    """The parts of a detector in a row, with torchvision's calling convention.

    Args:
        backbone: (N, 3, H, W) -> C3, C4, C5, and C2 before them for pyramids that begin with it.
        fpn: These maps -> a pyramid of (N, C, H_l, W_l).
        trunk: The detector's own towers (pyramid -> classification maps, regression maps), or a `DyHead` or nothing
            (pyramid -> pyramid, which serves both).
        head: Makes losses and detections of the trunk's maps.
        divisor: Batches are padded to a multiple of this many pixels.
        mean, std: What the channels are normalised with, in the order red, green, blue, for pixels in 0…1.
        bgr: Whether the backbone gets the channels in the order blue, green, red. Images are RGB all the same.
    """

    def __init__(
        self,
        backbone: nn.Module,
        fpn: nn.Module,
        trunk: nn.Module,
        head: PredictionHead,
        divisor: int = 32,
        *,
        mean: tuple[float, float, float] = MEAN,
        std: tuple[float, float, float] = STD,
        bgr: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.trunk = trunk
        self.head = head
        self.divisor = divisor
        self.bgr = bgr
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def needs_masks(self) -> bool:
        """Whether the targets must have `masks`."""
        return self.head.needs_masks

    def forward(
        self, images: list[Tensor], targets: list[dict] | None = None, *, check_targets: bool = True
    ) -> dict[str, Tensor] | list[dict]:
        """Losses in training, detections in evaluation.

        Args:
            images: RGB, (3, H, W) each, uint8 in 0…255 or floating point in 0…1; sizes may differ.
            targets: In training one dict an image: `boxes` (n, 4) floating point, x1, y1, x2, y2 in pixels with x2 > x1
                and y2 > y1, which may overhang the image, `labels` (n,) integers in 0 … C - 1, and, where the detector
                `needs_masks`, `masks`: a tensor (n, H, W), or for each object a list of polygons; n may be 0.
            check_targets: Whether the targets are looked at first. On a GPU this waits once for what is on its way
                there. Without it they must be right, `boxes` float32 and `labels` int64: a wrong one may train to
                nothing without a word.

        Returns:
            In training a dict of scalar losses whose sum is minimised. In evaluation one dict an image: `boxes` (K, 4)
            xyxy in pixels of that image, `scores` (K,), `labels` (K,), and `masks` where the head has them.

        Raises:
            TypeError: Images or targets are of the wrong Python type, or a target lacks a key.
            ValueError: Shapes, dtypes, devices or numbers of images or objects do not fit, or a box or a label is
                none; the message names the image and the first wrong box.
        """
        check_images(images, self.mean)
        sizes = [tuple(image.shape[-2:]) for image in images]
        if self.training and check_targets:
            targets = usable_targets(targets, sizes, self.head.num_classes, self.needs_masks, self.mean)
        outputs = self.raw(self.batch(images), sizes)
        if self.training:
            return self.head.loss(outputs, targets, sizes)
        return self.head.predict(outputs, sizes)

    def batch(self, images: list[Tensor]) -> Tensor:
        """Normalise and pad images at the bottom and right to one (N, 3, H, W) tensor, with zeros after normalising."""
        height, width = (max(image.shape[d] for image in images) for d in (-2, -1))
        height, width = (-(-side // self.divisor) * self.divisor for side in (height, width))
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for slot, image in zip(batch, images, strict=True):
            unit = image / 255 if image.dtype == torch.uint8 else image
            slot[:, : image.shape[1], : image.shape[2]] = (unit - self.mean) / self.std
        return batch.flip(1) if self.bgr else batch

    def raw(self, batch: Tensor, sizes: list[tuple[int, int]] | None = None):
        """Head outputs for a normalised, padded batch (N, 3, H, W): everything but target assignment and decoding.

        `sizes` are the images' own, for detectors to whom padding is something else than black; None: all are full.
        """
        # Channels last is the layout that convolutions, pooling and our kernels run fastest in, on a CPU too.
        batch = batch.contiguous(memory_format=torch.channels_last)
        maps = self.trunk(self.fpn(self.backbone(batch)))
        return self.head(*maps) if isinstance(maps, tuple) else self.head(maps, maps)


def check_images(images: Any, like: Tensor) -> None:
    """Images must be a list or tuple of tensors (3, H, W), uint8 or floating point, on the device of `like`.

    Raises:
        TypeError: They are no list or tuple, or one is no tensor.
        ValueError: There is none, or one has another shape, dtype or device; the message names it.
    """
    if not isinstance(images, list | tuple):
        raise TypeError(f"images must be a list of tensors (3, H, W), got {kind_of(images)}")
    if not images:
        raise ValueError("images must be a list of one or more tensors (3, H, W), got none")
    for number, image in enumerate(images):
        if not isinstance(image, Tensor):
            raise TypeError(f"image {number} must be a tensor (3, H, W), got {kind_of(image)}")
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"image {number} must be (3, H, W), red, green and blue, got shape {tuple(image.shape)}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(f"image {number} must be uint8 or floating point, got {image.dtype}")
        check_device(f"image {number}", image, "the model", like)
