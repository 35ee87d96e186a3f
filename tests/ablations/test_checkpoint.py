"""A released checkpoint in a file is evaluated from the command line; what does not fit is one clear line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from places import GOLDEN
from release_keys import SMALL, keys, random_state

from ablations.checkpoint import main, parse
from ablations.evaluation.evaluate import METRICS
from heads import load_released
from heads.backbones.resnet import BasicBlock, FrozenBatchNorm2d, ResNet
from heads.released.layouts import build_released, open_released
from heads.released.settings import LAYOUTS

# Original sizes (width, height) and what they become with a shorter side of 128 and at most 170 pixels.
SIZES = {(96, 80): (154, 128), (160, 100): (170, 106)}
ARGUMENTS = ["--short-side", "128", "--max-size", "170", "--device", "cpu"]


def write_truth(root, model):
    """Data in COCO's layout, whose ground truth is what a detector should find."""
    generator, found = np.random.default_rng(0), {}
    document = {"images": [], "annotations": [], "categories": [{"id": 3 * c + 1, "name": f"{c}"} for c in range(20)]}
    for number, ((width, height), (shown_width, shown_height)) in enumerate(SIZES.items(), start=1):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for split in ("train", "val"):
            (root / f"{split}2017").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / f"{split}2017" / f"{number}.png")
        document["images"].append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        shown = Image.fromarray(pixels).resize((shown_width, shown_height), Image.Resampling.BILINEAR)
        with torch.no_grad():
            (found[number],) = model([torch.from_numpy(np.array(shown)).permute(2, 0, 1)])
    # What is in the ground truth outscores, in both images, everything that is not.
    least = torch.cat([f["scores"] for f in found.values()]).sort(descending=True).values[12]
    for number, ((width, height), (shown_width, shown_height)) in enumerate(SIZES.items(), start=1):
        kept = found[number]["scores"] > least
        assert kept.any()
        scale = [width / shown_width, height / shown_height] * 2
        for box, label in zip(*(found[number][k][kept].tolist() for k in ("boxes", "labels")), strict=True):
            x1, y1, x2, y2 = (value * factor for value, factor in zip(box, scale, strict=True))
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 3 * label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint file in mmdetection's layout, and data whose ground truth is what its detector should find."""
    root = tmp_path_factory.mktemp("released")
    with np.load(GOLDEN / "whole_atss_dyhead_r18.npz") as vectors:
        state = {k.removeprefix("param."): torch.from_numpy(vectors[k]) for k in vectors if k.startswith("param.")}
    torch.save({"meta": {"CLASSES": ["thing"] * 20}, "state_dict": state}, root / "tiny.pth")
    body = ResNet(BasicBlock, (1, 1, 1, 1), 8, FrozenBatchNorm2d)
    model = build_released("mmdet-r50-caffe", 20, depth=2, channels=32, backbone=body).eval()
    load_released(model, state)
    write_truth(root, model)
    return root


def test_the_twelve_numbers_of_a_checkpoint(released, tmp_path, capsys):
    """All its own best detections are the ground truth, so a detector that is put together right is perfect."""
    out = tmp_path / "result.json"
    file = str(released / "tiny.pth")
    assert main([file, "--layout", "mmdet-r50-caffe", "--data", str(released), "--out", str(out), *ARGUMENTS]) == 0
    result = json.loads(out.read_text())
    assert list(result["metrics"]) == list(METRICS)
    assert result["metrics"]["AP"] > 99.9 and result["metrics"]["AR100"] > 99.9
    assert result["images"] == 2 and result["layout"] == "mmdet-r50-caffe" and len(result["sha256"]) == 64
    assert "AP 100.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layout", "message"),
    [("official", "the keys are mmdetection's"), ("mmdet-r50", "shape of head.cls_logits.weight")],
)
def test_a_layout_that_does_not_fit_is_an_error(released, layout, message, capsys):
    arguments = [str(released / "tiny.pth"), "--layout", layout, "--data", str(released), *ARGUMENTS]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_file_of_any_layout_is_evaluated(tmp_path, capsys, name):
    """A file of random weights, which finds what its own detector found."""
    state = random_state(keys(name, replace(SMALL[name], classes=20)))
    # Weights by which maps neither grow nor vanish; variances stay positive.
    state = {k: value + 0.5 if k.endswith("running_var") else (value - 0.5) / 2 for k, value in state.items()}
    torch.save({"model": state}, tmp_path / "any.pth")
    write_truth(tmp_path, open_released(name, state).eval())
    out = tmp_path / "result.json"
    command = [str(tmp_path / "any.pth"), "--layout", name, "--data", str(tmp_path), "--out", str(out)]
    assert main([*command, *ARGUMENTS]) == 0
    result, published = json.loads(out.read_text()), LAYOUTS[name].published_ap
    assert result["metrics"]["AP"] > 99.9 and result["metrics"]["AR100"] > 99.9
    assert result["layout"] == name and result["published_AP_on_COCO"] == published
    said = capsys.readouterr().out
    assert f"published on COCO val2017: {f'AP {published}' if published else 'nothing'}; written to" in said
    options = parse(command)
    assert (options.short_side, options.max_size) == ((1200, 2000) if name == "mmdet-swin-l" else (800, 1333))


def test_files_that_cannot_be_read_and_data_that_does_not_fit(released, tmp_path, capsys):
    def error(file, data=released):
        assert main([str(file), "--layout", "mmdet-r50-caffe", "--data", str(data), *ARGUMENTS]) == 2
        return capsys.readouterr().err

    assert "no weights at" in error(tmp_path / "absent.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 not a zip")
    assert "broken.pth cannot be read" in error(tmp_path / "broken.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    assert "not a whole safetensors file" in error(tmp_path / "broken.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds a list" in error(tmp_path / "list.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert "neither the authors' layout" in error(tmp_path / "other.pth")

    place = tmp_path / "fewer"
    place.mkdir()
    for folder in ("train2017", "val2017"):
        (place / folder).symlink_to(released / folder)
    (place / "annotations").mkdir()
    for split in ("train", "val"):
        document = json.loads((released / "annotations" / f"instances_{split}2017.json").read_text())
        document["categories"] = document["categories"][:-1]
        kept = {category["id"] for category in document["categories"]}
        document["annotations"] = [a for a in document["annotations"] if a["category_id"] in kept]
        (place / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(document))
    assert "tells 20 classes apart" in error(released / "tiny.pth", place)
