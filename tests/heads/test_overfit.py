"""Every detector, with its own towers and with DyHead, learns four images of large objects by heart."""

import numpy as np
import pytest
import torch

from ablations.evaluation.detections import run_lengths
from ablations.evaluation.evaluate import evaluate
from heads import build_detector
from heads.build import DETECTORS

SIDE = 96
COLOURS = torch.tensor([[200, 60, 40], [40, 190, 70], [60, 80, 220]])
# x1, y1, x2, y2 and label of the objects of each image. No two overlap.
SCENES = [
    [(8, 10, 56, 82, 0)],
    [(22, 6, 88, 42, 1), (15, 50, 60, 92, 2)],
    [(4, 30, 45, 75, 2), (51, 15, 93, 87, 0)],
    [(18, 18, 78, 81, 1)],
]
# Steps of training, and the rate at their height. Second stages begin to learn when there are proposals; RepPoints has
# one positive a box and takes longer, and so does DETR: its queries first have to settle which of them takes which box,
# and at a higher rate they do not.
STEPS = dict.fromkeys(DETECTORS, 60) | dict.fromkeys(("faster_rcnn", "mask_rcnn", "cascade_rcnn"), 80)
STEPS |= {"reppoints": 120, "detr": 350}
RATES = dict.fromkeys(DETECTORS, 4e-3) | {"detr": 1e-3}


def dataset() -> tuple[list[torch.Tensor], list[dict], dict]:
    """Images of coloured ellipses and boxes over noise, their targets, and the same as a COCO ground truth."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    images, targets, annotations = [], [], []
    for number, scene in enumerate(SCENES):
        image = torch.randint(90, 150, (3, SIDE, SIDE), generator=generator)
        masks = []
        for x1, y1, x2, y2, label in scene:
            reach_x, reach_y = (2 * x - x1 - x2).abs() / (x2 - x1), (2 * y - y1 - y2).abs() / (y2 - y1)
            inside = reach_x.maximum(reach_y) < 1 if label == 1 else reach_x**2 + reach_y**2 < 1
            image = torch.where(inside, COLOURS[label][:, None, None], image)
            masks.append(inside)
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "bbox": box})
            annotations[-1]["segmentation"] = run_lengths(inside[None])[0]
        images.append(image.to(torch.uint8))
        scene = torch.tensor(scene)
        targets.append({"boxes": scene[:, :4].float(), "labels": scene[:, 4], "masks": torch.stack(masks)})
    for annotation in annotations:
        annotation |= {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0}
    truth = {
        "images": [{"id": i, "width": SIDE, "height": SIDE} for i in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
    }
    return images, targets, truth


@pytest.mark.parametrize("attentions", [None, "LSC"], ids=["baseline", "LSC"])
@pytest.mark.parametrize("name", STEPS)
def test_a_detector_learns_four_images_by_heart(name, attentions):
    images, targets, truth = dataset()
    torch.manual_seed(0)
    model = build_detector(name, 3, "tiny", attentions, depth=1, channels=32)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES[name], STEPS[name])
    losses = []
    for _ in range(STEPS[name]):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    model.eval()
    with torch.inference_mode():
        results = model(images)
    metrics = evaluate(enumerate(results), truth, [1, 2, 3])
    assert metrics["AP50"] >= 90, (metrics, losses[::10])
    if "masks" in results[0]:
        metrics = evaluate(enumerate(results), truth, [1, 2, 3], "segm")
        assert metrics["AP50"] >= 90, (metrics, losses[::10])
