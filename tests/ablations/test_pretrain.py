"""The backbone of the tiny preset: what its cells are taught, and that what is shipped fits and tells shapes apart."""

from contextlib import closing

import torch

from ablations.data.coco import read_split
from ablations.data.loader import Loader
from ablations.generate import generate
from ablations.grid import SHIPPED
from ablations.pretrain import STRIDES, Classifier, cell_classes, main, turned
from heads.backbones.resnet import BACKBONES, load_imagenet


def target(*objects):
    boxes = torch.tensor([box for box, _ in objects], dtype=torch.float32).reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.tensor([label for _, label in objects], dtype=torch.int64)}


def test_the_cells_in_the_middle_of_an_object_have_its_class_and_the_smaller_object_wins():
    large, small = ([0, 0, 80, 40], 1), ([36, 16, 52, 32], 0)
    (cells,) = cell_classes([target(small, large)], 8, 2)
    # Of the large one 24 pixels to either side of x = 40 and 12 of y = 20; of the small one, at (44, 24), 4.8 each.
    expected = torch.full((16, 16), 2)
    expected[1:4, 2:8] = 1
    expected[2:3, 5:6] = 0
    expected[3, 5] = 0 if abs(28 - 24) <= 4.8 else 1
    assert torch.equal(cells, expected)
    # Too small for the coarsest stride: 16 pixels are half a cell.
    assert (cell_classes([target(small)], 32, 2) == 2).all()


def test_images_and_cells_are_turned_alike():
    cells = cell_classes([target(([8, 40, 40, 120], 1))], 8, 2)
    pixels = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    ways = {tuple(turned(cells, which).flatten().tolist()) for which in range(8)}
    assert len(ways) == 8
    for which in range(8):
        assert torch.equal(turned(pixels, which)[:, 4::8, 4::8], turned(cells, which))


def test_a_run_leaves_weights_that_a_detector_takes(tmp_path, monkeypatch):
    monkeypatch.setattr("ablations.pretrain.IMAGES", 8)
    monkeypatch.setattr("ablations.pretrain.HELD_OUT", 100)
    monkeypatch.setattr("ablations.pretrain.BATCH", 4)
    assert main([str(tmp_path / "w.safetensors"), "--data", str(tmp_path), "--steps", "2"]) == 0
    fresh, trained = BACKBONES["tiny"](), BACKBONES["tiny"]()
    trained.load_state_dict(fresh.state_dict())
    load_imagenet(trained, tmp_path / "w.safetensors")
    assert not torch.equal(trained.conv1.weight, fresh.conv1.weight)


def test_the_shipped_weights_tell_apart_shapes_they_never_saw(tmp_path):
    split = read_split(generate(tmp_path, "tiny", 77, train=1, val=100), "val")
    model = Classifier(len(split.category_ids))
    load_imagenet(model.backbone, SHIPPED["tiny"])
    # One convolution for each stride, fitted to the half of the cells by least squares, judged on the other half.
    model.eval()
    with closing(Loader(split, 100, 0, (128,), 128, flip=0.0)) as batches, torch.no_grad():
        images, targets, _ = batches.batch(0)
        maps = model.detector.features(model.detector.batch(images))
    for stride, features in zip(STRIDES, maps, strict=True):
        cells = cell_classes(targets, stride, model.classes)
        inside = cells < model.classes
        x = torch.cat([features.movedim(1, -1)[inside], torch.ones(int(inside.sum()), 1)], 1)
        y = torch.nn.functional.one_hot(cells[inside], model.classes).float()
        weights = torch.linalg.lstsq(x[::2], y[::2]).solution
        right = ((x[1::2] @ weights).argmax(1) == cells[inside][1::2]).float().mean()
        assert right > 0.6, (stride, right)
