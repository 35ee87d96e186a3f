"""A detector on a timm backbone: its maps of strides 8, 16 and 32, a feature pyramid, a DyHead and ATSS.

    python examples/timm_pyramid.py [resnet18 | convnext_tiny | swinv2_tiny_window8_256 | ...]

prints the channels that the backbone gives, the losses of one step on a random image, and the shapes of what is
detected there (nothing: the weights are random, and `pretrained=True` is yours to give to `timm.create_model`). It
needs timm, and says so in a line where there is none (exit code 1).
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heads import Detector, DyHead
from heads.backbones.fpn import FPN
from heads.dense.atss import ATSSHead

STRIDES = (8, 16, 32)


class TimmBackbone(nn.Module):
    """C3, C4 and C5 of a model that timm made with `features_only=True`.

    Which of the model's maps have strides 8, 16 and 32 differs from family to family; `feature_info` says it.

    Args:
        body: (N, 3, H, W) -> a list of maps, with `feature_info.reduction()` and `.channels()` for each, and with
            `output_fmt` where maps may be (N, H, W, C), as those of Swin.

    Raises:
        ValueError: A stride is missing, as in a plain ViT, whose maps all have stride 16.

    Attributes:
        channels: Channels of C3, C4 and C5.
    """

    def __init__(self, body: Any):
        super().__init__()
        strides, channels = body.feature_info.reduction(), body.feature_info.channels()
        if not set(STRIDES) <= set(strides):
            raise ValueError(f"the backbone must have maps of strides 8, 16 and 32; its maps have {list(strides)}")
        self.body = body
        self.places = [strides.index(stride) for stride in STRIDES]
        self.channels = tuple(channels[place] for place in self.places)
        self.channels_behind = getattr(body, "output_fmt", "NCHW") == "NHWC"

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.body(x)
        maps = [maps[place] for place in self.places]
        return [x.movedim(3, 1) for x in maps] if self.channels_behind else maps


def build(body: Any, num_classes: int = 80, channels: int = 256, depth: int = 6) -> Detector:
    """ATSS with a DyHead on a timm model; images are normalised as the model's weights want it."""
    backbone = TimmBackbone(body)
    head = ATSSHead(in_channels=channels, num_classes=num_classes, strides=FPN.strides)
    config: Mapping[str, Any] = getattr(body, "pretrained_cfg", None) or {}
    statistics = {key: config[key] for key in ("mean", "std") if key in config}
    return Detector(backbone, FPN(backbone.channels, channels), DyHead(channels, depth), head, **statistics)


def main(name: str = "resnet18") -> None:
    try:
        timm = importlib.import_module("timm")
    # timm imports torchvision, which raises what it comes to first where it was built for another torch.
    except Exception as error:
        sys.exit(f"this example needs timm, and a torchvision that fits torch {torch.__version__}: {error}")
    torch.manual_seed(0)
    model = build(timm.create_model(name, features_only=True), num_classes=3, channels=64, depth=2)
    print("channels", model.backbone.channels)
    images = [torch.rand(3, 256, 256)]
    losses = model(images, [{"boxes": torch.tensor([[20.0, 30.0, 190.0, 200.0]]), "labels": torch.tensor([1])}])
    sum(losses.values()).backward()
    print({key: round(loss.item(), 3) for key, loss in losses.items()})
    (found,) = model.eval()(images)
    print({key: tuple(x.shape) for key, x in found.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
