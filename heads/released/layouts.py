"""The detector that a release computes, with random weights or with those of a checkpoint."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from heads.backbones.fpn import FPN, FPNFromC2
from heads.backbones.resnet import (
    BACKBONES,
    Backbone,
    BasicBlock,
    Bottleneck,
    CaffeBottleneck,
    FrozenBatchNorm2d,
    ResNet,
)
from heads.backbones.swin import Swin
from heads.dense.atss import ATSSHead
from heads.dense.retinanet import RetinaNetHead
from heads.dense.towers import ConvTowers, DyHeadBeforeTowers
from heads.detector import MEAN, Detector, PredictionHead
from heads.dyhead.dyhead import DyHead
from heads.released.names import Contents, load_released, recognise, translate
from heads.released.settings import LAYOUTS, Layout, layout_of
from heads.released.weights import bare_state
from heads.two_stage.faster_rcnn import FasterRCNNHead


def build_released(
    name: str,
    num_classes: int = 80,
    *,
    depth: int = 6,
    channels: int = 256,
    backbone: Backbone | None = None,
) -> Detector:
    """A detector with DyHead as one of the releases computes it, ready for `load_released`.

    Args:
        name: One of `LAYOUTS`.
        num_classes: Object classes, without a background class.
        depth: DyHead blocks.
        channels: Channels of the pyramid, and of the towers behind it; see also the top of
            `heads/two_stage/faster_rcnn.py`.
        backbone: A backbone that returns C3 to C5, or C2 to C5 for Faster R-CNN; None for the layout's.

    Raises:
        ValueError: The name is unknown; the known ones are listed. Or the backbone returns other maps.
    """
    layout = layout_of(name)
    if backbone is None:
        backbone = default_backbone(layout)
    maps = 4 if layout.kind == "faster_rcnn" else 3
    if len(backbone.channels) != maps:
        raise ValueError(f"layout {name!r} needs a backbone of {maps} maps, with finest={6 - maps}")
    trunk: nn.Module = DyHead(channels, depth, coarse_offsets="prefix")
    fpn: FPN | FPNFromC2
    head: PredictionHead[Any]
    if layout.kind == "faster_rcnn":
        fpn = FPNFromC2(backbone.channels, channels)
        head = FasterRCNNHead(
            in_channels=channels,
            num_classes=num_classes,
            strides=FPNFromC2.strides,
            convention=layout.convention,
            anchor_offset=layout.anchor_offset,
        )
    else:
        fpn = FPN(backbone.channels, channels, relu_before_p7=layout.relu_before_p7)
    if layout.kind == "atss":
        head = ATSSHead(
            in_channels=channels,
            num_classes=num_classes,
            strides=FPN.strides,
            kernel_size=layout.kernel_size,
            convention=layout.convention,
            anchor_offset=layout.anchor_offset,
            pad_divisor=layout.divisor,
        )
    elif layout.kind == "retinanet":
        head = RetinaNetHead(
            in_channels=channels,
            num_classes=num_classes,
            strides=FPN.strides,
            convention=layout.convention,
            anchor_offset=layout.anchor_offset,
            pad_divisor=layout.divisor,
        )
        trunk = DyHeadBeforeTowers(DyHead(channels, depth, coarse_offsets="prefix"), ConvTowers(channels, norm=False))
    return Detector(backbone, fpn, trunk, head, layout.divisor, mean=MEAN, std=layout.std, bgr=layout.bgr)


def open_released(name: str, checkpoint: Mapping[str, Any]) -> Detector:
    """The detector of a released checkpoint with its weights; its sizes and classes are read off the weights.

    Args:
        name: One of `LAYOUTS`.
        checkpoint: State dict, or a checkpoint that holds it; see `heads.released.weights.bare_state`.

    Raises:
        ValueError: The name is unknown, the keys are another layout's, or `load_released` finds a misfit. The message
            says what does not fit, and which layouts the keys may be of.
    """
    layout, state = layout_of(name), bare_state(checkpoint)
    contents = recognise(state)
    fitting = [other for other, known in LAYOUTS.items() if known.fits(contents)]
    said = f"the layouts that have such keys are {', '.join(fitting)}" if fitting else "no layout has such keys"
    if name not in fitting:
        raise ValueError(f"layout {name!r} does not fit: the keys are {contents}; {said}")
    names = {translate(key, contents.rules): value.shape for key, value in state.items() if isinstance(value, Tensor)}
    shapes = {key: tuple(shape) for key, shape in names.items() if key is not None}
    detector = build_released(
        name,
        classes_of(layout, shapes),
        depth=count(shapes, r"trunk\.blocks\.\d+\."),
        channels=width(shapes, "fpn.lateral.0.weight", 256),
        backbone=backbone_of(layout, contents, shapes),
    )
    try:
        load_released(detector, state)
    except ValueError as error:
        if len(fitting) == 1:
            raise
        raise ValueError(f"{error}\n{said}") from error
    return detector


# Our names of the weights in a file, and their shapes.
Shapes = Mapping[str, tuple[int, ...]]


def count(shapes: Shapes, pattern: str) -> int:
    """How many different beginnings of names match a pattern."""
    return len({match[0] for key in shapes if (match := re.match(pattern, key))})


def width(shapes: Shapes, key: str, default: int) -> int:
    """The first axis of a weight, or the default where there is none."""
    return (shapes.get(key) or (default,))[0]


def classes_of(layout: Layout, shapes: Shapes) -> int:
    """How many classes the weights of a layout tell apart, background aside."""
    if layout.kind == "retinanet":
        # Nine anchors in a cell.
        return width(shapes, "head.cls_score.weight", 9 * 80) // 9
    if layout.kind == "faster_rcnn":
        return width(shapes, "head.box.cls_score.weight", 81) - 1
    return width(shapes, "head.cls_logits.weight", 80)


def default_backbone(layout: Layout) -> Backbone:
    """The backbone of a layout with random weights."""
    finest = 2 if layout.kind == "faster_rcnn" else 3
    if layout.stride_in_1x1:
        return ResNet(CaffeBottleneck, (3, 4, 6, 3), 64, FrozenBatchNorm2d, finest=finest)
    return BACKBONES[layout.backbone](finest=finest)


def backbone_of(layout: Layout, contents: Contents, shapes: Shapes) -> Backbone:
    """A backbone of a layout's kind, as wide and deep as the weights; the layout's own where they have none."""
    finest = 2 if layout.kind == "faster_rcnn" else 3
    if contents.body == "resnet":
        blocks = tuple(count(shapes, rf"backbone\.layer{stage}\.\d+\.") for stage in range(1, 5))
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock
        if count(shapes, r"backbone\.layer1\.0\.conv3\."):
            block = CaffeBottleneck if layout.stride_in_1x1 else Bottleneck
        return ResNet(block, blocks, width(shapes, "backbone.conv1.weight", 64), FrozenBatchNorm2d, finest=finest)
    if contents.body == "swin":
        depths = tuple(count(shapes, rf"backbone\.layers\.{stage}\.blocks\.\d+\.") for stage in range(4))
        table = "backbone.layers.{}.blocks.0.attn.relative_position_bias_table"
        tables = [shapes.get(table.format(stage), (1, 1)) for stage in range(4)]
        # A table has a row for each difference of two positions in a window, and a column for each attention head.
        side = (math.isqrt(tables[0][0]) + 1) // 2
        heads = tuple(shape[-1] for shape in tables)
        return Swin(width(shapes, "backbone.patch_embed.proj.weight", 96), depths, heads, side, finest=finest)
    return default_backbone(layout)
