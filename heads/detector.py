"""A detector is backbone → FPN → trunk → prediction head, and a prediction head is what `PredictionHead` says."""

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from heads.boxes.fixed import FixedDetections
from heads.boxes.selection import ImageDetections
from heads.parameters import SpecialParameters
from heads.targets import Target, usable_targets
from kernels.runtime.checks import check_device, kind_of

# ImageNet's channel statistics, RGB in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Batches are padded to a multiple of this many pixels, the stride of the coarsest map that a pyramid is given.
DIVISOR = 32

# What a head's `forward` returns and its `loss` and `predict` take: a NamedTuple of the head's own.
Outputs = TypeVar("Outputs")


class PredictionHead(SpecialParameters, Generic[Outputs]):
    """The last part of a detector: it predicts from the trunk's maps, and knows the losses and the detections.

    A subclass implements `forward`, `loss` and `predict`, and sets `num_classes`. Nobody asks a head for its class:
    what a detector, a measurement or a data loader wants to know of it stands here, with an answer that fits most.

    Attributes:
        num_classes: Object classes, without background.
        needs_masks: Whether the targets of `loss` must have `masks`.
    """

    num_classes: int
    needs_masks: bool = False

    def forward(self, *features: Any, **options: Any) -> Outputs:
        """Predict from the maps of the trunk.

        Args:
            *features: Two lists of L maps (N, C, H_l, W_l), finest level first, for classes and for boxes; one and the
                same list where the trunk has no towers. A detector that overrides `Detector.raw` may give others.
            **options: None, unless the detector gives some.

        Returns:
            All that losses and detections are made of. It must not depend on the targets.
        """
        raise NotImplementedError

    def loss(self, outputs: Outputs, targets: list[Target], image_sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
        """Losses of a batch of N images.

        Args:
            outputs: What `forward` returned.
            targets: One dict an image: `boxes` (n, 4) float32, x1, y1, x2, y2 in pixels, `labels` (n,) int64 in
                0 … C - 1, and `masks` where the head `needs_masks`; n may be 0.
            image_sizes: (height, width) of each image before padding.

        Returns:
            Scalars whose sum is minimised, by name; every name begins with `loss` or has it behind a dot.
        """
        raise NotImplementedError

    def predict(self, outputs: Outputs, image_sizes: list[tuple[int, int]]) -> list[ImageDetections]:
        """Detections of a batch of N images, without gradients.

        Args:
            outputs: What `forward` returned.
            image_sizes: (height, width) of each image before padding.

        Returns:
            One dict an image, by falling score: `boxes` (K, 4) xyxy in pixels, clipped to the image, `scores` (K,),
            `labels` (K,) int64, and `masks` (K, height, width) where the head has them.
        """
        raise NotImplementedError

    def predict_fixed(self, outputs: Outputs, size: tuple[int, int]) -> FixedDetections:
        """The detections of `predict` in tensors of fixed shapes, for graphs that are exported.

        Args:
            outputs: What `forward` returned.
            size: (height, width) of all images before padding, ints or symbols for them.

        Returns:
            The same detections in the same order, every image filled up to as many as there may be at most.
        """
        raise NotImplementedError

    def full_image(self, outputs: Outputs) -> None:
        """Compute what `predict` computes beside `forward` on an image full of objects, to count its operations.

        Most heads have nothing to compute: their layers all run in `forward`. A second stage runs once for each
        proposal, and here for as many as an image may have.

        Args:
            outputs: What `forward` returned.
        """


class Detector(nn.Module):
    """The parts of a detector in a row, with torchvision's calling convention.

    In training the model takes images and targets and returns a dict of losses; in evaluation it takes images and
    returns their detections. Images may have different sizes: they are normalised, padded at the bottom and right to
    one size, a multiple of `divisor`, and detections come in pixels of the image as it was given. Nothing is resized.

    Where `torch.distributed` has been initialised, losses are normalised over the batches of all ranks, so that the
    mean of the ranks' gradients, which `DistributedDataParallel` takes, is that of one whole batch (`heads/ranks.py`).
    In training every rank must then call the model, with equally many images.

    Input, a list with one tensor an image: RGB, (3, H, W), uint8 in 0 … 255 or floating point in 0 … 1.

    Targets, in training, a list with one dict an image:

    - `boxes` (n, 4), floating point: x1, y1, x2, y2 in pixels, x2 > x1 and y2 > y1; n may be 0;
    - `labels` (n,), any integer type: classes counted from 0, without background;
    - `masks`, only where the detector `needs_masks`: a tensor (n, H, W), or for each object a list of polygons.

    Output in training, a dict of scalar losses to be summed. Output in evaluation, a list with one dict an image, by
    falling score:

    - `boxes` (K, 4), floating point: x1, y1, x2, y2 in pixels, inside the image;
    - `scores` (K,) in 0 … 1;
    - `labels` (K,), int64;
    - `masks` (K, H, W) bool, of detectors that `needs_masks`.

    Args:
        backbone: (N, 3, H, W) -> C3, C4, C5, and C2 before them for pyramids that begin with it.
        fpn: These maps -> a pyramid of (N, C, H_l, W_l).
        trunk: The detector's own towers (pyramid -> classification maps, regression maps), or a `DyHead` or nothing
            (pyramid -> pyramid, which serves both).
        head: Makes losses and detections of the trunk's maps.
        divisor: Batches are padded to a multiple of this many pixels.
        mean, std: What the channels are normalised with, in the order red, green, blue, for pixels in 0 … 1.
        bgr: Whether the backbone gets the channels in the order blue, green, red. Images are RGB all the same.

    Example:
        >>> import torch
        >>> from heads import build_detector
        >>> model = build_detector("atss", num_classes=3, backbone="tiny", depth=1, channels=16)
        >>> images = [torch.rand(3, 64, 96), torch.rand(3, 70, 50)]
        >>> objects = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([2])}
        >>> nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        >>> losses = model(images, [objects, nothing])
        >>> sorted(losses)
        ['loss_bbox', 'loss_centerness', 'loss_cls']
        >>> sum(losses.values()).backward()
        >>> detections = model.eval()(images)
        >>> [sorted(found) for found in detections]
        [['boxes', 'labels', 'scores'], ['boxes', 'labels', 'scores']]
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        fpn: nn.Module,
        trunk: nn.Module,
        head: PredictionHead[Any],
        divisor: int = DIVISOR,
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
        self,
        images: list[Tensor],
        targets: list[Target] | None = None,
        *,
        check_targets: bool = True,
        features: list[Tensor] | None = None,
        extent: tuple[int, int] = (0, 0),
    ) -> dict[str, Tensor] | list[ImageDetections]:
        """Losses in training, detections in evaluation; the class's docstring has both formats.

        Args:
            images: RGB, (3, H, W) each, uint8 in 0 … 255 or floating point in 0 … 1; sizes may differ.
            targets: In training one dict an image. Boxes may overhang the image. In evaluation they are not looked at.
            check_targets: Whether the targets are looked at first. On a GPU this waits once for what is on its way
                there. Without it they must be right, `boxes` float32 and `labels` int64: a wrong one may train to
                nothing without a word.
            features: What the backbone gives for the padded images, where that is known already: of a frozen backbone
                it need be computed once. The images then only say their sizes.
            extent: (height, width) that the images are padded to at least, where they are a part of a larger batch.

        Returns:
            In training a dict of scalar losses whose sum is minimised, in evaluation one dict of detections an image.

        Raises:
            TypeError: Images or targets are of the wrong Python type, or a target lacks a key.
            ValueError: Shapes, dtypes, devices or numbers of images or objects do not fit, or a box or a label is
                none; the message names the image and the first wrong box.
        """
        check_images(images, self.mean)
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        if self.training and check_targets:
            targets = usable_targets(targets, sizes, self.head.num_classes, self.needs_masks, self.mean)
        padded = self.padded(images, extent)
        if features is None:
            features = self.features(self.batch(images, padded))
        outputs = self.raw_from(features, padded, sizes)
        if self.training:
            if targets is None:
                raise ValueError("targets must be given in training: a list with one dict an image")
            return self.head.loss(outputs, targets, sizes)
        return self.head.predict(outputs, sizes)

    def batch(self, images: list[Tensor], padded: tuple[int, int] | None = None) -> Tensor:
        """Normalise images and pad them at the bottom and right to one size.

        Args:
            images: RGB, (3, H, W) each, uint8 in 0 … 255 or floating point in 0 … 1.
            padded: (height, width) to pad to; None for those of `padded`.

        Returns:
            (N, 3, H, W), a multiple of `divisor` high and wide, 0 in the padding.
        """
        batch = self.mean.new_zeros(len(images), 3, *(padded or self.padded(images)))
        for slot, image in zip(batch, images, strict=True):
            unit = image / 255 if image.dtype == torch.uint8 else image
            slot[:, : image.shape[1], : image.shape[2]] = (unit - self.mean) / self.std
        return batch.flip(1) if self.bgr else batch

    def padded(self, images: list[Tensor], extent: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Height and width to which images (3, H, W) of any sizes are padded, `extent` at least."""
        height, width = (max(extent[side], *(image.shape[side] for image in images)) for side in (-2, -1))
        return -(-height // self.divisor) * self.divisor, -(-width // self.divisor) * self.divisor

    def raw(self, batch: Tensor, sizes: list[tuple[int, int]] | None = None) -> Any:
        """Everything but target assignment and decoding.

        Args:
            batch: (N, 3, H, W), as `batch` gives it.
            sizes: (height, width) of each image before padding, for detectors to whom padding is not just black; None
                where every image fills the batch.

        Returns:
            What the head's `forward` returns.
        """
        return self.raw_from(self.features(batch), (batch.shape[2], batch.shape[3]), sizes)

    def features(self, batch: Tensor) -> list[Tensor]:
        """The backbone's maps of a batch (N, 3, H, W), as `batch` gives it."""
        # Channels last is the layout that convolutions, pooling and our kernels run fastest in, on a CPU too.
        return self.backbone(batch.contiguous(memory_format=torch.channels_last))

    def raw_from(
        self, features: list[Tensor], padded: tuple[int, int], sizes: list[tuple[int, int]] | None = None
    ) -> Any:
        """What `raw` does behind the backbone.

        Args:
            features: What `features` gives.
            padded: (height, width) of the batch.
            sizes: As for `raw`.
        """
        maps = self.trunk(self.fpn(features))
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
