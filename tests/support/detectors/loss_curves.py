"""Loss curves of a small detector on generated scenes, and whether two of them differ by more than chance."""

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from ablations.generate import DIFFICULTIES
from ablations.generated.scenes import draw_scene
from heads import build_detector
from kernels import use_backend

WINDOWS = 20


@cache
def scenes(count: int) -> list[tuple[Tensor, dict]]:
    """Images and targets of the easiest generated set; the same ones in every call."""
    found = []
    for index in range(count):
        pixels, annotations = draw_scene(DIFFICULTIES["tiny"], 0, 0, index)
        boxes = torch.tensor([a["bbox"] for a in annotations if not a["iscrowd"]], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["category_id"] for a in annotations if not a["iscrowd"]], dtype=torch.int64)
        found.append((torch.tensor(pixels).permute(2, 0, 1).contiguous(), {"boxes": boxes, "labels": labels}))
    numbers = sorted({int(label) for _, target in found for label in target["labels"]})
    for _, target in found:
        target["labels"] = torch.tensor([numbers.index(label) for label in target["labels"].tolist()]).long()
    return found


def loss_curve(
    backend: str, seed: int, steps: int, device: str, channels: int = 64, count: int = 64, nudge: int = 0
) -> np.ndarray:
    """The loss of every step of training an ATSS with one DyHead block on `count` scenes.

    `seed` decides weights and batches. `nudge` changes the weights by a hundred-thousandth, each number otherwise: as
    if they had been rounded a little differently.
    """
    data = [(image.to(device), {k: v.to(device) for k, v in target.items()}) for image, target in scenes(count)]
    classes = 1 + max(int(target["labels"].max()) for _, target in data if len(target["labels"]))
    torch.manual_seed(seed)
    model = build_detector("atss", classes, "tiny", "LSC", depth=1, channels=channels)
    if nudge:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-5 * torch.randn(parameter.shape, generator=generator))
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    order, losses = np.random.default_rng(seed), []
    with use_backend(backend):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * min(1.0, (step + 1) / 50)
            images, targets = zip(*(data[i] for i in order.choice(len(data), 8, replace=False)), strict=True)
            loss = sum(model(list(images), list(targets)).values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).double().cpu().numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far two curves are apart: the root mean square of the logarithm of the ratio of their window means.

    The means of `WINDOWS` equal stretches smooth a curve; the logarithm lets the end, where losses are small, count as
    much as the beginning.
    """
    means = [np.array([part.mean() for part in np.array_split(curve, WINDOWS)]) for curve in (a, b)]
    return float(np.sqrt(np.mean(np.log(means[0] / means[1]) ** 2)))


def noise(curves: Sequence[np.ndarray]) -> float:
    """The largest distance between two curves that differ by chance alone."""
    return max(distance(a, b) for a, b in combinations(curves, 2))
