"""A DyHead behind the pyramid of a torchvision detector: RetinaNet, FCOS, Faster or Mask R-CNN.

    python examples/torchvision_detector.py [retinanet_resnet50_fpn | fasterrcnn_resnet50_fpn | ...]

prints the losses of one step on a random image, and the largest gradient in the DyHead. It needs a torchvision that
fits torch, and says so in a line where there is none (exit code 1).

The detector's own backbone and pyramid stay as they are; what reads the pyramid reads the DyHead's maps instead. Load
weights into the detector first and wrap its backbone then: a wrapped one has other keys, `backbone.pyramid.…`.
"""

import importlib
import sys
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from heads import DyHead


class WithDyHead(nn.Module):
    """A torchvision backbone with its pyramid, and a DyHead on the pyramid's maps; called as the backbone is.

    Args:
        pyramid: (N, 3, H, W) -> an OrderedDict of maps (N, C, H_l, W_l), finest first, with C as `out_channels`; C is a
            multiple of 16 (256 in all of torchvision's).
        depth: Blocks of the DyHead.
    """

    def __init__(self, pyramid: Any, depth: int = 6):
        super().__init__()
        self.out_channels: int = pyramid.out_channels
        self.pyramid = pyramid
        self.dyhead = DyHead(self.out_channels, depth)

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        maps = self.pyramid(x)
        return OrderedDict(zip(maps, self.dyhead(list(maps.values())), strict=True))


def add_dyhead(detector: Any, depth: int = 6) -> Any:
    """Put a DyHead behind the pyramid of a torchvision detector, in place; its heads and anchors stay."""
    detector.backbone = WithDyHead(detector.backbone, depth)
    return detector


def main(name: str = "retinanet_resnet50_fpn") -> None:
    try:
        detection = importlib.import_module("torchvision.models.detection")
    # Not only ImportError: one that was built for another torch raises what it comes to first.
    except Exception as error:
        sys.exit(f"this example needs a torchvision that fits torch {torch.__version__}: {error}")
    torch.manual_seed(0)
    sizes = {"min_size": 128, "max_size": 160, "num_classes": 3}
    detector = getattr(detection, name)(weights=None, weights_backbone=None, **sizes)
    add_dyhead(detector, depth=1).train()
    target = {"boxes": torch.tensor([[20.0, 30.0, 90.0, 100.0]]), "labels": torch.tensor([1])}
    losses = detector([torch.rand(3, 128, 160)], [target])
    sum(losses.values()).backward()
    print({key: round(loss.item(), 3) for key, loss in losses.items()})
    gradients = [p.grad for p in detector.backbone.dyhead.parameters()]
    print(f"largest gradient of the DyHead: {max(g.abs().max().item() for g in gradients if g is not None):.3g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
