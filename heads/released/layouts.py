"""What each released ATSS R-50 with DyHead computes besides its weights, and the detector that computes it.

A state dict does not record these settings: with a wrong one it loads all the same and loses average precision.
All three were trained with `coarse_offsets="prefix"` (see `heads/dyhead/attention.py`), expect a shorter side of 800
pixels and at most 1,333 for the longer one, are padded with zeros after normalising, and convolve P6 from P5's output.

| setting                          | "official"          | "mmdet-r50-caffe"    | "mmdet-r50"               |
|----------------------------------|---------------------|----------------------|---------------------------|
| made by                          | DynamicHead,        | mmdetection's        | mmdetection's             |
|                                  | detectron2          | reproduction of it   | simple setting            |
| published AP on COCO val2017     | 42.4                | 42.5                 | 43.3                      |
| channels                         | BGR                 | BGR                  | RGB                       |
| standard deviations (of 0…255)   | 1, 1, 1             | 1, 1, 1              | 58.395, 57.12, 57.375     |
| bottleneck that halves: stride in| first 1×1           | first 1×1            | 3×3                       |
| ReLU between P6 and P7           | yes                 | no                   | no                        |
| bias before DyHead's GroupNorms  | yes                 | no                   | no                        |
| predictors                       | 1×1                 | 1×1                  | 3×3                       |
| anchors centred at               | 0.5 cells           | 0.5 cells            | 0 cells                   |
| padded to a multiple of          | 128                 | 128                  | 32                        |
| selection, clamps and clipping   | "official"          | "mmdet"              | "mmdet"                   |

Means are 123.675, 116.28, 103.53 for red, green, blue in all of them.

Sources: DynamicHead's `configs/dyhead_r50_atss_fpn_1x.yaml`, `extra/resnet.py` and `size_divisibility` in
`dyhead/dyhead.py` over detectron2's defaults; mmdetection 3.3's `configs/dyhead/` and `configs/_base_/datasets`.

Deviation: "mmdet-r50" was evaluated with OpenCV's bilinear resizing, which differs from the one used here, Pillow's,
where an image shrinks; the images of COCO are at most 640 pixels long and nearly all grow.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from heads.backbones.fpn import FPN
from heads.backbones.resnet import BasicBlock, Bottleneck, CaffeBottleneck, FrozenBatchNorm2d, ResNet
from heads.dense.atss import ATSSHead
from heads.detector import MEAN, STD, Detector
from heads.dyhead.dyhead import DyHead
from heads.released.names import OFFICIAL, load_released, recognise, translate
from heads.released.weights import bare_state


@dataclass(frozen=True)
class Layout:
    """The settings of one release, row by row as in the table at the top of this file.

    Attributes:
        published_ap: On COCO val2017, in percent.
        bgr: Whether the backbone reads blue first.
        std: Of red, green, blue, for pixels in 0…1.
        stride_in_1x1: Whether a bottleneck halves in its first convolution instead of its second.
        relu_before_p7: As in `FPN`.
        kernel_size, anchor_offset, convention: As in `ATSSHead`.
        divisor: Multiple that batches are padded to, in pixels.
        short_side, max_size: What images are resized to before, in pixels.
    """

    published_ap: float
    bgr: bool
    std: tuple[float, float, float]
    stride_in_1x1: bool
    relu_before_p7: bool
    kernel_size: int
    anchor_offset: float
    divisor: int
    convention: Literal["official", "mmdet"]
    short_side: int = 800
    max_size: int = 1333


# Means are subtracted and nothing is divided where pixels are kept in 0…255.
UNSCALED = (1 / 255, 1 / 255, 1 / 255)
LAYOUTS = {
    "official": Layout(42.4, True, UNSCALED, True, True, 1, 0.5, 128, "official"),
    "mmdet-r50-caffe": Layout(42.5, True, UNSCALED, True, False, 1, 0.5, 128, "mmdet"),
    "mmdet-r50": Layout(43.3, False, STD, False, False, 3, 0.0, 32, "mmdet"),
}


def layout_of(name: str) -> Layout:
    """The layout of this name; unknown ones are a ValueError that lists the known ones."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; the layouts are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def build_released(
    name: str,
    num_classes: int = 80,
    *,
    depth: int = 6,
    channels: int = 256,
    backbone: ResNet | None = None,
) -> Detector:
    """ATSS with DyHead as one of the releases computes it, ready for `load_released`.

    Args:
        name: One of `LAYOUTS`.
        num_classes: Object classes, without a background class.
        depth: DyHead blocks.
        channels: Channels of the pyramid.
        backbone: A backbone that returns C3 to C5; None for the layout's ResNet-50.

    Raises:
        ValueError: The name is unknown; the known ones are listed.
    """
    layout = layout_of(name)
    if backbone is None:
        block = CaffeBottleneck if layout.stride_in_1x1 else Bottleneck
        backbone = ResNet(block, (3, 4, 6, 3), 64, FrozenBatchNorm2d)
    head = ATSSHead(
        in_channels=channels,
        num_classes=num_classes,
        strides=FPN.strides,
        kernel_size=layout.kernel_size,
        convention=layout.convention,
        anchor_offset=layout.anchor_offset,
        pad_divisor=layout.divisor,
    )
    fpn = FPN(backbone.channels, channels, relu_before_p7=layout.relu_before_p7)
    trunk = DyHead(channels, depth, coarse_offsets="prefix")
    return Detector(backbone, fpn, trunk, head, layout.divisor, mean=MEAN, std=layout.std, bgr=layout.bgr)


def open_released(name: str, checkpoint: Mapping[str, Any]) -> Detector:
    """The detector of a released checkpoint with its weights; depth, width and classes are read off the weights.

    Args:
        name: One of `LAYOUTS`.
        checkpoint: State dict, or a checkpoint that holds it; see `heads.released.weights.bare_state`.

    Raises:
        ValueError: The name is unknown, the keys are another layout's, or `load_released` finds a misfit.
    """
    layout, state = layout_of(name), bare_state(checkpoint)
    rules = recognise(state)
    if (rules is OFFICIAL) != (layout.convention == "official"):
        author = "the authors'" if rules is OFFICIAL else "mmdetection's"
        raise ValueError(f"layout {name!r} does not fit: the keys are {author}; the layouts are {', '.join(LAYOUTS)}")
    shapes = {translate(key, rules): value.shape for key, value in state.items() if isinstance(value, Tensor)}

    def count(pattern: str) -> int:
        return len({match[0] for key in shapes if key and (match := re.match(pattern, key))})

    def width(key: str, default: int) -> int:
        return shapes[key][0] if key in shapes else default

    blocks = tuple(count(rf"backbone\.layer{stage}\.\d+\.") for stage in range(1, 5))
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    if count(r"backbone\.layer1\.0\.conv3\."):
        block = CaffeBottleneck if layout.stride_in_1x1 else Bottleneck
    detector = build_released(
        name,
        width("head.cls_logits.weight", 80),
        depth=count(r"trunk\.blocks\.\d+\."),
        channels=width("fpn.lateral.0.weight", 256),
        backbone=ResNet(block, blocks, width("backbone.conv1.weight", 64), FrozenBatchNorm2d),
    )
    load_released(detector, state)
    return detector
