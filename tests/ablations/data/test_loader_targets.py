"""What the loader says of the objects of an image: boxes of positive size, each with its label and its mask."""

import numpy as np
import pytest
import torch
from tiny_coco import annotation, edited, write

from ablations.data.coco import read_split
from ablations.data.loader import Loader
from ablations.data.segments import bitmap

# pycocotools' masks are of before numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")


def test_masks_are_scaled_and_flipped_with_their_image(tmp_path):
    """A rectangle as polygon and as run lengths; masks and boxes must stay on top of each other."""
    runs = {"size": [16, 20], "counts": [4 * 16 + 2, *([8, 8] * 5 + [8]), 320 - 4 * 16 - 2 - 88]}

    def change(document):
        first = next(a for a in document["annotations"] if a["id"] == 101)
        first |= {"bbox": [4, 2, 6, 8], "segmentation": [[4, 2, 10, 2, 10, 10, 4, 10]]}
        second = next(a for a in document["annotations"] if a["id"] == 56)
        second |= {"bbox": [4, 2, 6, 8], "segmentation": runs}

    split = read_split(write(tmp_path / "data", edited(change)), "train")
    for short_side in (16, 32):
        for flip in (0.0, 1.0):
            images, targets, _ = Loader(split, 2, 0, (short_side,), 100, flip=flip, masks=True).batch(0)
            for image, target in zip(images, targets, strict=True):
                assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
                if target["image_id"] != 31:
                    continue
                assert target["masks"].dtype == torch.uint8
                for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
                    x1, y1, x2, y2 = box
                    want = torch.zeros_like(mask)
                    want[y1:y2, x1:x2] = 1
                    assert torch.equal(mask, want), (short_side, flip)
    assert "masks" not in Loader(split, 2, 0, (16,), 100).batch(0)[1][0]


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_box_that_scaling_leaves_without_size_is_no_target(tmp_path, flip):
    """Two neighbours in float32 lie closer than those near a larger number: scaled or mirrored, they are one."""
    sliver = float(np.spacing(np.float32(0.3)))

    def change(document):
        for number, box in enumerate([[0.3, 2, sliver, 4], [3, 2, 4, 4], [2, 0.3, 4, sliver]]):
            polygon = [[1, 1, 1 + number, 1, 1 + number, 5]]
            document["annotations"].append(annotation(200 + number, 25, 7, box, segmentation=polygon))

    split = read_split(write(tmp_path, edited(change)), "train")
    record = split.images[1]
    assert len(record.boxes) == 3 and (record.boxes[:, 2:] > record.boxes[:, :2]).all()
    lost = 0
    for short_side in (7, 18, 19, 23, 31, 50):
        loader = Loader(split, 2, 0, (short_side,), 100, flip=flip, masks=True)
        batches = [loader.batch(step)[1] for step in range(2)]
        target = next(target for targets in batches for target in targets if target["image_id"] == 25)
        boxes = target["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.isfinite().all()
        assert len(boxes) == len(target["labels"]) == len(target["masks"])
        lost += 3 - len(boxes)
        # The box that stays has its own mask, the second one.
        middle = 18 - 5 if flip else 5
        place = int(((boxes[:, 0] + boxes[:, 2]) / 2 - middle * short_side / 18).abs().argmin())
        assert (boxes[place, 2:] - boxes[place, :2]).min() > 1
        expected = bitmap(record.segmentations[1], 18, 18, short_side, short_side)
        assert np.array_equal(target["masks"][place].numpy(), expected[:, ::-1] if flip else expected)
    assert lost > 0
