"""`build_detector` puts a detector together by name, with its own towers or with DyHead instead of them."""

from collections.abc import Callable

from heads.backbones.resnet import BACKBONES
from heads.dense.atss import atss
from heads.dense.borderdet import borderdet
from heads.dense.fcos import fcos
from heads.dense.reppoints import reppoints
from heads.dense.retinanet import retinanet
from heads.detector import Detector
from heads.dyhead.dyhead import DyHead
from heads.query.detr import detr
from heads.two_stage.cascade_rcnn import cascade_rcnn
from heads.two_stage.faster_rcnn import PLACEMENTS, faster_rcnn
from heads.two_stage.mask_rcnn import mask_rcnn

# Name -> (backbone, number of classes, channels of the pyramid, DyHead or None for the detector's own towers) -> model.
# Those of `TWO_STAGE` also take the placement.
DETECTORS: dict[str, Callable[..., Detector]] = {
    "atss": atss,
    "borderdet": borderdet,
    "fcos": fcos,
    "reppoints": reppoints,
    "retinanet": retinanet,
    "faster_rcnn": faster_rcnn,
    "mask_rcnn": mask_rcnn,
    "cascade_rcnn": cascade_rcnn,
    "detr": detr,
}
# Those of them with a second stage, which may be told to split the DyHead's last block around RoIAlign.
TWO_STAGE = ("faster_rcnn", "mask_rcnn", "cascade_rcnn")
# Those that learn masks, and need them in their targets: `Detector.needs_masks` of what they build.
WITH_MASKS = ("mask_rcnn",)


def build_detector(
    name: str,
    num_classes: int = 80,
    backbone: str = "resnet50",
    attentions: str | None = "LSC",
    depth: int = 6,
    formulation: str = "released",
    coarse_offsets: str = "crop",
    channels: int = 256,
    placement: str = "trunk",
) -> Detector:
    """Build a detector with random weights.

    Args:
        name: One of `DETECTORS`.
        num_classes: Number of object classes, without a background class.
        backbone: One of `BACKBONES`.
        attentions: Subset of the letters L, S, C for DyHead, or None for the detector's own towers, its baseline.
        depth: Number of DyHead blocks.
        formulation, coarse_offsets: See `DyHead`.
        channels: Channels of the pyramid, a multiple of 16.
        placement: Where the DyHead sits: `"trunk"`, or, in a two-stage detector, `"around_roi"`; see
            `heads/two_stage/faster_rcnn.py`.

    Returns:
        A module called as torchvision's detectors are: `model(images, targets)` -> losses in training, `model(images)`
        -> detections in evaluation; see `Detector`.

    Raises:
        ValueError: A name is unknown, and the known ones are listed; or the placement does not fit.

    Example:
        >>> import torch
        >>> from heads import build_detector
        >>> model = build_detector("fcos", num_classes=3, backbone="tiny", attentions="SC", depth=1, channels=16)
        >>> with torch.inference_mode():
        ...     (found,) = model.eval()([torch.rand(3, 64, 96)])
        >>> found["boxes"].shape[1]
        4
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown detector {name!r}; the detectors are {', '.join(DETECTORS)}")
    if backbone not in BACKBONES:
        raise ValueError(f"unknown backbone {backbone!r}; the backbones are {', '.join(BACKBONES)}")
    dyhead = None if attentions is None else DyHead(channels, depth, attentions, formulation, coarse_offsets)
    # The pyramid of a two-stage detector begins with C2, that of the others with C3.
    parts = (BACKBONES[backbone](finest=2 if name in TWO_STAGE else 3), num_classes, channels, dyhead)
    if name in TWO_STAGE:
        return DETECTORS[name](*parts, placement)
    if placement != PLACEMENTS[0]:
        raise ValueError(f"placement {placement!r} is for detectors with a second stage: {', '.join(TWO_STAGE)}")
    return DETECTORS[name](*parts)
