"""A DyHead in the neck of a YOLO-like detector: P3, P4 and P5, each with channels of its own, in front of any `Detect`.

    python examples/yolo_dyhead.py

prints the shapes that the head predicts for an image of 128x160 pixels, and a loss that falls in ten steps.

For your fork, take `DyHeadNeck` and `DyHeadDetect`, and derive the second one from the fork's own `Detect`: beside it,
in the file of the heads, and named where `parse_model` lists `Detect`. Its line in the model's YAML is then

    - [[15, 18, 21], 1, DyHeadDetect, [nc, 256, 2]]    # classes, channels of the DyHead, blocks

`Backbone` and `Detect` below stand in for the fork's, so that this file runs alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads import DyHead


class DyHeadNeck(nn.Module):
    """Maps of different channels to maps of `hidden` channels that have passed a DyHead.

    Args:
        channels: Channels of each level, finest first; any numbers, as many as there are levels.
        hidden: Channels behind it, a multiple of 16; `DyHead` says so where it is none.
        depth: Blocks of the DyHead.
    """

    def __init__(self, channels: Sequence[int], hidden: int = 256, depth: int = 2):
        super().__init__()
        self.dyhead = DyHead(hidden, depth, levels=len(channels))
        self.project = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU()) for c in channels
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """(N, C_l, H_l, W_l) a level, each half the size of the one before -> (N, hidden, H_l, W_l)."""
        return self.dyhead([project(x) for project, x in zip(self.project, features, strict=True)])


class Detect(nn.Module):
    """Stands in for the fork's: box distributions of 16 bins a side, then class logits, a level."""

    def __init__(self, nc: int = 80, ch: Sequence[int] = ()):
        super().__init__()
        self.nc = nc
        self.boxes = nn.ModuleList(nn.Conv2d(c, 4 * 16, 3, padding=1) for c in ch)
        self.classes = nn.ModuleList(nn.Conv2d(c, nc, 3, padding=1) for c in ch)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        towers = zip(self.boxes, self.classes, features, strict=True)
        return [torch.cat((box(x), cls(x)), 1) for box, cls, x in towers]


class DyHeadDetect(Detect):
    """The fork's `Detect` behind a DyHead: losses, decoding and export are the fork's.

    The channels of the levels come last, as `parse_model` gives them. What newer versions put before them (`reg_max`,
    `end2end`) goes on to `Detect`.
    """

    def __init__(self, nc: int = 80, hidden: int = 256, depth: int = 2, *rest: Any):
        *between, channels = rest
        arguments = (nc, *between, (hidden,) * len(channels))
        super().__init__(*arguments)
        self.neck = DyHeadNeck(channels, hidden, depth)

    def forward(self, features: list[Tensor]) -> Any:
        return super().forward(self.neck(features))


class Backbone(nn.Module):
    """Stands in for the fork's backbone and neck: an image to P3, P4 and P5, strides 8, 16 and 32."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        sizes = zip((3, *channels), channels, (8, 2, 2), strict=False)
        self.stages = nn.ModuleList(nn.Conv2d(c, o, stride, stride) for c, o, stride in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = F.silu(stage(x))
            maps.append(x)
        return maps


def main() -> None:
    torch.manual_seed(0)
    channels = (24, 40, 72)
    model = nn.Sequential(Backbone(channels), DyHeadDetect(3, 32, 2, channels))
    image = torch.rand(1, 3, 128, 160)
    # An object of class 0 in the first cell of each level; YOLO's own losses go here.
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(10):
        logits = [x[:, -3:] for x in model(image)]
        targets = [torch.zeros_like(x) for x in logits]
        for target in targets:
            target[:, 0, 0, 0] = 1
        pairs = zip(logits, targets, strict=True)
        loss = torch.stack([F.binary_cross_entropy_with_logits(*pair) for pair in pairs]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print("predictions", *(tuple(x.shape) for x in model(image)))
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
