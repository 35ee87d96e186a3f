"""`python -m ablations.pretrain FILE`: the backbone of the `tiny` preset, trained once on objects of generated images.

What ImageNet's weights are to a detector on COCO, these are to one on the generated set: a grid of minutes on two cores
can begin with features that tell the classes apart. They are learned from images of another seed than any grid draws,
and without a detector: every cell of the strides 8, 16 and 32 that lies in the middle of an object is classified by a
1×1 convolution, every other one as background. The convolutions are thrown away, the backbone is kept.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ablations.data.batch import Target
from ablations.data.coco import read_split
from ablations.data.loader import Loader
from ablations.data.split import Split
from ablations.files import atomic_write_bytes
from ablations.generate import generate
from heads.backbones.resnet import BACKBONES
from heads.detector import Detector, PredictionHead

# The seed of the images is none that a grid draws its own from.
SEED, IMAGES, HELD_OUT = 1000, 6000, 500
SIDE = 128
STEPS, BATCH = 3000, 64
LR, WEIGHT_DECAY, MAX_GRADIENT_NORM = 3e-3, 0.02, 5.0
STRIDES = (8, 16, 32)
# The middle of an object: this share of its width and height to either side of its centre, at least half a cell.
MIDDLE = 0.3
# An object shorter than this many cells is left to a finer level.
LEAST_CELLS = 0.8
# Weight of background in the cross-entropy: five sixths of the cells are background.
BACKGROUND = 0.35


def cell_classes(targets: Sequence[Target], stride: int, classes: int) -> Tensor:
    """The class of every cell: (N, SIDE / stride, SIDE / stride) int64, `classes` for background.

    Of several objects that a cell lies in the middle of, the smallest counts.
    """
    centres = (torch.arange(SIDE // stride) + 0.5) * stride
    cells = torch.full((len(targets), len(centres), len(centres)), classes)
    for own, target in zip(cells, targets, strict=True):
        sizes = target["boxes"][:, 2:] - target["boxes"][:, :2]
        for index in sizes.prod(1).argsort(descending=True).tolist():
            size = sizes[index]
            if size.max() < LEAST_CELLS * stride:
                continue
            reach_x, reach_y = (MIDDLE * size).clamp(min=stride / 2).tolist()
            x, y = (target["boxes"][index, :2] + size / 2).tolist()
            inside = ((centres - y).abs() <= reach_y)[:, None] & ((centres - x).abs() <= reach_x)
            own[inside] = int(target["labels"][index])
    return cells


def turned(maps: Tensor, which: int) -> Tensor:
    """One of the eight ways (0 … 7) to mirror and turn a square map in its last two dimensions."""
    maps = maps.flip(-1) if which & 1 else maps
    maps = maps.flip(-2) if which & 2 else maps
    return maps.transpose(-1, -2) if which & 4 else maps


class Classifier(nn.Module):
    """A backbone, and the 1×1 convolutions that classify the cells of its maps."""

    weight: Tensor

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.backbone = BACKBONES["tiny"]()
        # For how it normalises and pads images alone.
        self.detector = Detector(self.backbone, nn.Identity(), nn.Identity(), PredictionHead(), divisor=SIDE)
        self.heads = nn.ModuleList(nn.Conv2d(channels, classes + 1, 1) for channels in self.backbone.channels)
        self.register_buffer("weight", torch.tensor([1.0] * classes + [BACKGROUND]), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Class logits (N, classes + 1, h, w) of every stride, of a batch (N, 3, SIDE, SIDE)."""
        maps = self.detector.features(images)
        return [head(x) for head, x in zip(self.heads, maps, strict=True)]

    def loss(self, images: Sequence[Tensor], targets: Sequence[Target], which: int) -> Tensor:
        """Cross-entropy of all cells, summed over the strides, of images turned in one of eight ways."""
        logits = self(turned(self.detector.batch(list(images)), which))
        cells = [turned(cell_classes(targets, stride, self.classes), which) for stride in STRIDES]
        pairs = zip(logits, cells, strict=True)
        return torch.stack([F.cross_entropy(each, wanted, weight=self.weight) for each, wanted in pairs]).sum()


def pretrain(split: Split, held_out: Split, steps: int) -> nn.Module:
    """Train a backbone for this many steps, and print how many cells within held-out objects it classifies rightly."""
    torch.manual_seed(0)
    model = Classifier(len(split.category_ids)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    began = time.monotonic()
    with closing(Loader(split, BATCH, 0, (SIDE,), SIDE)) as batches:
        for step in range(steps):
            images, targets, _ = batches.batch(step)
            loss = model.loss(images, targets, int(torch.randint(8, ())))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            if (step + 1) % 250 == 0 or step + 1 == steps:
                right = ", ".join(
                    f"{share:.3f} at stride {s}" for s, share in zip(STRIDES, judge(model, held_out), strict=True)
                )
                print(
                    f"step {step + 1}/{steps}, {time.monotonic() - began:.0f} s, loss {loss:.3f}; right: {right}",
                    flush=True,
                )
    return model.backbone


@torch.no_grad()
def judge(model: Classifier, split: Split) -> list[float]:
    """For every stride, the share of cells in the middle of an object whose best class, but background, is right."""
    model.eval()
    right = [[0, 0] for _ in STRIDES]
    with closing(Loader(split, 100, 0, (SIDE,), SIDE, flip=0.0)) as batches:
        for step in range(len(split.images) // 100):
            images, targets, _ = batches.batch(step)
            for logits, stride, count in zip(model(model.detector.batch(images)), STRIDES, right, strict=True):
                cells = cell_classes(targets, stride, model.classes)
                objects = cells < model.classes
                count[0] += int((logits[:, :-1].argmax(1) == cells)[objects].sum())
                count[1] += int(objects.sum())
    model.train()
    return [hits / max(total, 1) for hits, total in right]


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ablations.pretrain", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.safetensors", help="where the weights go")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="folder of generated sets")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    root = generate(options.data, "tiny", SEED, train=IMAGES, val=HELD_OUT, processes=2)
    backbone = pretrain(read_split(root, "train"), read_split(root, "val"), options.steps)
    state = {name: value.contiguous() for name, value in backbone.state_dict().items() if value.is_floating_point()}
    atomic_write_bytes(options.file, save(state))
    print(f"{options.file}: {sum(value.numel() for value in state.values()):,} numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
