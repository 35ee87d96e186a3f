"""What each released detector with DyHead computes besides its weights.

A state dict does not record these settings: with a wrong one it loads all the same and loses average precision. All
were trained with `coarse_offsets="prefix"` (see `heads/dyhead/attention.py`), are padded with zeros after normalising,
and have P6, where it is convolved, from P5's output. Six blocks of 256 channels in all of them.

ATSS, DyHead in place of its towers:

| setting                      | "official"  | "official-swin-t" | "mmdet-r50-caffe" | "mmdet-r50"   | "mmdet-swin-l" |
|------------------------------|-------------|-------------------|-------------------|---------------|----------------|
| made by                      | DynamicHead | DynamicHead       | mmdetection       | mmdetection   | mmdetection    |
| published AP on COCO val2017 | 42.4        | 49.8              | 42.5              | 43.3          | 56.2           |
| backbone                     | ResNet-50   | Swin-T, windows 7 | ResNet-50         | ResNet-50     | Swin-L, 12     |
| channels                     | BGR         | RGB               | BGR               | RGB           | RGB            |
| standard deviations          | none        | ImageNet's        | none              | ImageNet's    | ImageNet's     |
| halving bottleneck's stride  | first 1×1   | –                 | first 1×1         | 3×3           | –              |
| ReLU between P6 and P7       | yes         | yes               | no                | no            | no             |
| bias before the GroupNorms   | yes         | yes               | no                | no            | no             |
| predictors                   | 1×1         | 1×1               | 1×1               | 3×3           | 1×1            |
| anchors centred at, in cells | 0.5         | 0.5               | 0.5               | 0             | 0.5            |
| padded to a multiple of      | 128         | 128               | 128               | 32            | 128            |
| shorter side, longer at most | 800, 1,333  | 800, 1,333        | 800, 1,333        | 800, 1,333    | 1,200, 2,000   |
| selection, clamps, clipping  | "official"  | "official"        | "mmdet"           | "mmdet"       | "mmdet"        |

RetinaNet, with the four convolutions of each tower behind DyHead, and Faster R-CNN, with DyHead on P2 to P6:

| setting                      | "official-retinanet-r50" | "official-faster-rcnn-r50" | "mmdet-faster-rcnn-r50" |
|------------------------------|--------------------------|----------------------------|-------------------------|
| made by                      | DynamicHead              | DynamicHead                | anyone with mmdetection |
| published AP on COCO val2017 | 39.9                     | 40.3                       | none                    |
| backbone                     | ResNet-50                | ResNet-50                  | ResNet-50               |
| channels                     | BGR                      | BGR                        | RGB                     |
| standard deviations          | none                     | none                       | ImageNet's              |
| halving bottleneck's stride  | first 1×1                | first 1×1                  | 3×3                     |
| ReLU between P6 and P7       | yes                      | – (P6 is every second cell | – (the same)            |
|                              |                          | of P5)                     |                         |
| bias before the GroupNorms   | yes                      | yes                        | no                      |
| predictors                   | 3×3                      | as in any Faster R-CNN     | the same                |
| anchors centred at, in cells | 0                        | 0                          | 0                       |
| padded to a multiple of      | 128                      | 64                         | 32                      |
| shorter side, longer at most | 800, 1,333               | 800, 1,333                 | 800, 1,333              |
| selection, clamps, clipping  | "official"               | "official"                 | "mmdet"                 |

Means are 123.675, 116.28, 103.53 for red, green, blue in all of them; ImageNet's standard deviations are 58.395, 57.12,
57.375 for pixels in 0 … 255. What the conventions are stands in `heads/dense/atss.py`, `heads/dense/retinanet.py` and
`heads/two_stage/`.

Sources: DynamicHead's four files in `configs/`, `extra/config.py`, `extra/resnet.py`, `extra/swint.py`, and
`size_divisibility` in `dyhead/dyhead.py`, over detectron2's defaults, and the table of its README; mmdetection 3.3's
`configs/dyhead/`, `configs/_base_/models/faster-rcnn_r50_fpn.py` and `configs/_base_/datasets`. mmdetection has no
configuration of Faster R-CNN with DyHead: "mmdet-faster-rcnn-r50" is its 1x one with the neck of its `configs/dyhead/`.

Deviation: "mmdet-r50" was evaluated with OpenCV's bilinear resizing, and "mmdet-faster-rcnn-r50" would be; it differs
from the one used here, Pillow's, where an image shrinks. The images of COCO are at most 640 pixels long and nearly all
grow.
"""

from dataclasses import dataclass
from typing import Literal

from heads.detector import STD
from heads.released.names import Author, Contents, Kind


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The settings of one release, row by row as in the tables at the top of this file.

    Attributes:
        kind: The detector.
        published_ap: On COCO val2017, in percent; None where there is none.
        backbone: One of `heads.backbones.resnet.BACKBONES`.
        bgr: Whether the backbone reads blue first.
        std: Of red, green, blue, for pixels in 0…1.
        stride_in_1x1: Whether a bottleneck halves in its first convolution instead of its second; of ResNets.
        relu_before_p7: As in `FPN`; of detectors with a P7.
        kernel_size: As in `ATSSHead`; of ATSS.
        anchor_offset: Centre of an anchor in its cell, in cells.
        divisor: Multiple that batches are padded to, in pixels.
        convention: The heads'; by whom the release is.
        short_side, max_size: What images are resized to before, in pixels.
    """

    kind: Kind
    published_ap: float | None
    backbone: Literal["resnet50", "swin_t", "swin_l"] = "resnet50"
    bgr: bool
    std: tuple[float, float, float]
    stride_in_1x1: bool = False
    relu_before_p7: bool = False
    kernel_size: int = 1
    anchor_offset: float
    divisor: int
    convention: Author
    short_side: int = 800
    max_size: int = 1333

    def fits(self, contents: Contents) -> bool:
        """Whether a state dict with these contents may be of this layout."""
        body = "resnet" if self.backbone == "resnet50" else "swin"
        return (
            contents.author == self.convention and contents.kind in (self.kind, None) and contents.body in (body, None)
        )


# Means are subtracted and nothing is divided where pixels are kept in 0…255.
UNSCALED = (1 / 255, 1 / 255, 1 / 255)
LAYOUTS = {
    "official": Layout(
        kind="atss",
        published_ap=42.4,
        bgr=True,
        std=UNSCALED,
        stride_in_1x1=True,
        relu_before_p7=True,
        anchor_offset=0.5,
        divisor=128,
        convention="official",
    ),
    "mmdet-r50-caffe": Layout(
        kind="atss",
        published_ap=42.5,
        bgr=True,
        std=UNSCALED,
        stride_in_1x1=True,
        anchor_offset=0.5,
        divisor=128,
        convention="mmdet",
    ),
    "mmdet-r50": Layout(
        kind="atss",
        published_ap=43.3,
        bgr=False,
        std=STD,
        kernel_size=3,
        anchor_offset=0.0,
        divisor=32,
        convention="mmdet",
    ),
    "official-swin-t": Layout(
        kind="atss",
        published_ap=49.8,
        backbone="swin_t",
        bgr=False,
        std=STD,
        relu_before_p7=True,
        anchor_offset=0.5,
        divisor=128,
        convention="official",
    ),
    "mmdet-swin-l": Layout(
        kind="atss",
        published_ap=56.2,
        backbone="swin_l",
        bgr=False,
        std=STD,
        anchor_offset=0.5,
        divisor=128,
        convention="mmdet",
        short_side=1200,
        max_size=2000,
    ),
    "official-retinanet-r50": Layout(
        kind="retinanet",
        published_ap=39.9,
        bgr=True,
        std=UNSCALED,
        stride_in_1x1=True,
        relu_before_p7=True,
        anchor_offset=0.0,
        divisor=128,
        convention="official",
    ),
    "official-faster-rcnn-r50": Layout(
        kind="faster_rcnn",
        published_ap=40.3,
        bgr=True,
        std=UNSCALED,
        stride_in_1x1=True,
        anchor_offset=0.0,
        divisor=64,
        convention="official",
    ),
    "mmdet-faster-rcnn-r50": Layout(
        kind="faster_rcnn",
        published_ap=None,
        bgr=False,
        std=STD,
        anchor_offset=0.0,
        divisor=32,
        convention="mmdet",
    ),
}


def layout_of(name: str) -> Layout:
    """The layout of this name; unknown ones are a ValueError that lists the known ones."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; the layouts are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
