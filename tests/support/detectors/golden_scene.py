"""The scene behind the golden vectors of the detectors, and what every test of a dense detector asks of it."""

import json

import numpy as np
import torch

from heads.boxes.boxes import clip_boxes
from heads.boxes.rows import flatten_levels

STRIDES = (8, 16, 32, 64, 128)
SIZES = ((16, 20), (8, 10), (4, 5), (2, 3), (1, 2))
IMAGES = [(128, 160), (88, 120)]
CLASSES = 20
CASES = ("full", "one_empty", "all_empty", "no_ties")


def rows(vectors: dict, kind: str, values: int, dtype: torch.dtype, grad: bool = False) -> torch.Tensor:
    """Maps stored by level as (N, A, values)."""
    maps = [torch.from_numpy(vectors[f"{kind}.{level}"]).to(dtype) for level in range(5)]
    return flatten_levels(maps, values).requires_grad_(grad)


def targets_of(vectors: dict, case: str, dtype: torch.dtype = torch.float32) -> list[dict]:
    return [
        {
            "boxes": torch.from_numpy(vectors[f"{case}.gt_bboxes.{image}"]).to(dtype).reshape(-1, 4),
            "labels": torch.from_numpy(vectors[f"{case}.gt_labels.{image}"]),
        }
        for image in range(2)
    ]


def assigned(matched: torch.Tensor, targets: list[dict]) -> np.ndarray:
    """An assignment in mmdetection's numbers: k for box k - 1 of the image, 0 for background, -1 for ignored."""
    first = torch.tensor([0, len(targets[0]["boxes"])])[:, None]
    return torch.where(matched >= 0, matched - first + 1, matched + 1).numpy()


def difference(got: torch.Tensor, want: np.ndarray) -> float:
    assert tuple(got.shape) == want.shape
    return float(np.abs(got.detach().double().numpy() - want).max(initial=0))


def float32_loss(vectors: dict, *keys: str) -> dict[str, float]:
    """Ten times what the released code itself lost in float32, by quantity."""
    measured = json.loads(str(vectors["meta"]))["fp32_vs_f64"]
    return {key: 10 * measured[key] for key in keys}


def check_detections(vectors: dict, test_set: str, results: list[dict[str, torch.Tensor]]) -> None:
    """The detections are the stored ones, scaled to the original image where these are."""
    tolerance = float32_loss(vectors, f"det_{test_set}")[f"det_{test_set}"]
    factors = json.loads(str(vectors["meta"]))["scene"]["scale_factor_wh"]
    for image, got in enumerate(results):
        boxes, scores, labels = (vectors[f"det_{test_set}.{image}.{k}"] for k in ("bboxes", "scores", "labels"))
        scale = torch.tensor(factors[image] * 2) if test_set == "rescaled" else 1
        np.testing.assert_array_equal(got["labels"].numpy(), labels)
        assert difference(got["boxes"] / scale, boxes) <= tolerance
        assert difference(got["scores"], scores) <= tolerance
        assert got["boxes"].dtype == got["scores"].dtype == torch.float32


def random_boxes(count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 4) boxes of all sizes within a square image."""
    centre = torch.rand(count, 2, generator=generator) * side
    half = torch.exp(torch.rand(count, 2, generator=generator) * 4 + 0.3)
    return clip_boxes(torch.cat([centre - half, centre + half], 1), (side, side))


# Images of 128 × 128 pixels that a data set may hold, by name: a list of boxes an image, or how many random ones.
EDGES = {
    "no box": [[]],
    "one image without": [[], [[10.0, 10.0, 60.0, 90.0]]],
    "thinner than a pixel": [[[30.2, 5.0, 30.5, 120.0]], [[4.0, 64.0, 100.0, 64.001]]],
    "no area": [[[50.0, 50.0, 50.0, 80.0]]],
    "the same box three times": [[[0.0, 0.0, 128.0, 128.0]] * 3],
    "1500 boxes": [1500, 2],
}


def check_edges(head: torch.nn.Module, channels: int, name: str) -> None:
    """Losses and gradients of `head` are finite for the images `EDGES[name]`, and detections can be made of them."""
    generator = torch.Generator().manual_seed(2)
    boxes = [
        random_boxes(b, 128, generator) if isinstance(b, int) else torch.tensor(b).reshape(-1, 4) for b in EDGES[name]
    ]
    features = [torch.randn(len(boxes), channels, 128 // s, 128 // s, generator=generator) for s in STRIDES]
    # Of three classes the last two never occur.
    targets = [{"boxes": b, "labels": torch.zeros(len(b), dtype=torch.long)} for b in boxes]
    sizes = [(128, 128)] * len(boxes)
    losses = head.loss(head(features, features), targets, sizes)
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values()), losses
    sum(losses.values()).backward()
    for parameter_name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
    for result in head.predict(head(features, features), sizes):
        assert all(value.isfinite().all() for value in result.values())
