"""A detector is backbone → FPN → trunk → prediction head; what a second stage does is its head's affair."""

import torch
from torch import Tensor, nn

# ImageNet's channel statistics, RGB in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Detector(nn.Module):
    """The parts of a detector in a row, with torchvision's calling convention.

    Args:
        backbone: (N, 3, H, W) -> C3, C4, C5, and C2 before them for pyramids that begin with it.
        fpn: These maps -> a pyramid of (N, C, H_l, W_l).
        trunk: The detector's own towers (pyramid -> classification maps, regression maps), or a `DyHead` or nothing
            (pyramid -> pyramid, which serves both).
        head: Prediction head with `forward`, `loss` and `predict`; see `heads/atss.py`.
        divisor: Batches are padded to a multiple of this many pixels.
        mean, std: What the channels are normalised with, in the order red, green, blue, for pixels in 0…1.
        bgr: Whether the backbone gets the channels in the order blue, green, red. Images are RGB all the same.
    """

    def __init__(
        self,
        backbone: nn.Module,
        fpn: nn.Module,
        trunk: nn.Module,
        head: nn.Module,
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

    def forward(self, images: list[Tensor], targets: list[dict] | None = None) -> dict[str, Tensor] | list[dict]:
        """Losses in training, detections in evaluation.

        Args:
            images: RGB, (3, H, W) each, uint8 in 0…255 or floating point in 0…1; sizes may differ.
            targets: In training one dict an image: `boxes` (n, 4) xyxy in pixels and `labels` (n,) int64; n may be 0.

        Returns:
            In training a dict of scalar losses whose sum is minimised. In evaluation one dict an image: `boxes` (K, 4)
            xyxy in pixels of that image, `scores` (K,), `labels` (K,), and `masks` where the head has them.
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        outputs = self.raw(self.batch(images))
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

    def raw(self, batch: Tensor):
        """Head outputs for a normalised, padded batch (N, 3, H, W): everything but target assignment and decoding."""
        # Channels last is the layout that convolutions, pooling and our kernels run fastest in, on a CPU too.
        batch = batch.contiguous(memory_format=torch.channels_last)
        maps = self.trunk(self.fpn(self.backbone(batch)))
        return self.head(*maps) if isinstance(maps, tuple) else self.head(maps, maps)
