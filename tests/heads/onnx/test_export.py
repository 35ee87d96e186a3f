"""`python -m heads.export`: from a file of weights to a model that onnxruntime runs, as a user types it."""

import json
import os
import re

import onnx
import onnxruntime
import pytest
import torch
from lively import lively_detector
from official_weights import official_state
from parity import relative_error

from heads.backbones.resnet import BACKBONES
from heads.detector import MEAN, STD
from heads.export import OK, USAGE, main
from heads.onnx.model import ExportedDetector
from heads.released.layouts import build_released, open_released

CLASSES = ("car", "dog", "sea urchin")


def weights_in(folder):
    """An ATSS that finds something, and a checkpoint of it."""
    detector = lively_detector("atss")
    torch.save({"model": detector.state_dict()}, folder / "weights.pth")
    return detector, str(folder / "weights.pth")


def test_images_of_any_number_and_size_to_detections(tmp_path):
    """One export, which takes half a minute: what the model finds, and what it says of itself."""
    detector, weights = weights_in(tmp_path)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    arguments = ["--detector", "atss", "--weights", weights, "--out", str(tmp_path / "model.onnx")]
    assert main([*arguments, "--classes", str(tmp_path / "classes.txt")]) == OK
    run = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [(each.name, each.shape) for each in run.get_inputs()] == [("images", ["batch", 3, "height", "width"])]
    assert [each.name for each in run.get_outputs()] == ["boxes", "scores", "labels"]
    generator = torch.Generator().manual_seed(3)
    for shape in ((1, 3, 100, 130), (3, 3, 270, 200)):
        images = torch.rand(shape, generator=generator)
        boxes, scores, labels = (torch.from_numpy(x) for x in run.run(None, {"images": images.numpy()}))
        with torch.inference_mode():
            wanted = detector(list(images))
        for number, found in enumerate(wanted):
            there = labels[number] >= 0
            assert len(found["labels"]) > 20
            assert torch.equal(labels[number][there], found["labels"])
            torch.testing.assert_close(boxes[number][there], found["boxes"], rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(scores[number][there], found["scores"], rtol=1e-4, atol=1e-5)

    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [each.version for each in model.opset_import if each.domain == ""] == [20]
    said = {each.key: each.value for each in model.metadata_props}
    assert json.loads(said["class_names"]) == list(CLASSES)
    normalisation = json.loads(said["normalisation"])
    assert normalisation["mean"] == pytest.approx(MEAN) and normalisation["std"] == pytest.approx(STD)
    assert (normalisation["channels"], normalisation["in_graph"], said["padded_to"]) == ("RGB", True, "32")
    assert (said["detector"], said["weights"], said["precision"]) == ("atss", "weights.pth", "float32")


@pytest.mark.skipif(
    "DYHEAD_EXPORTS" not in os.environ, reason="takes minutes: DYHEAD_EXPORTS=1 or `make parity` runs it"
)
def test_a_released_checkpoint_in_half_precision_and_raw(tmp_path, capsys):
    """An official one's keys, settings and colours: of blue, green and red in 0 … 255, padded to 128."""
    state = official_state(build_released("official", 3, depth=1, channels=32, backbone=BACKBONES["tiny"]()))
    # Weights that leave numbers as large as they are, of pixels in 0 … 255 made numbers of about 1.
    for name, value in state.items():
        if value.dim() > 1:
            state[name] = (value - 1) * (0.05 if "stem" in name else 3) / value[0].numel() ** 0.5
    torch.save(state, tmp_path / "weights.pth")
    out = tmp_path / "model.onnx"
    arguments = ["--layout", "official", "--weights", str(tmp_path / "weights.pth"), "--out", str(out)]
    assert main([*arguments, "--raw", "--fp16"]) == OK
    assert re.search(r"the first output differ by at most \d", capsys.readouterr().out)
    run = onnxruntime.InferenceSession(out)
    images = torch.rand(2, 3, 90, 150, generator=torch.Generator().manual_seed(3))
    model = ExportedDetector(open_released("official", state), raw=True)
    assert [each.name for each in run.get_outputs()] == model.output_names() == ["logits", "deltas", "centerness"]
    with torch.inference_mode():
        wanted = model(images)
    found = [torch.from_numpy(x) for x in run.run(None, {"images": images.numpy()})]
    assert 0 < relative_error(wanted, found) < 2e-2
    said = {each.key: each.value for each in onnx.load(out).metadata_props}
    normalisation = json.loads(said["normalisation"])
    assert (said["padded_to"], said["precision"], normalisation["channels"]) == ("128", "float16", "BGR")


@pytest.mark.parametrize("option, name", [("--paste-masks", "mask pasting"), ("--augment", "test-time augmentation")])
def test_what_is_not_exported_is_refused_by_name(option, name, tmp_path, capsys):
    arguments = ["--detector", "mask_rcnn", "--weights", str(tmp_path / "no.pth"), "--out", str(tmp_path / "m.onnx")]
    assert main([*arguments, option]) == USAGE
    assert re.match(f"error: {name} is not exported: .*[Ww]ithout {option}", capsys.readouterr().err)


def test_what_does_not_fit_is_said(tmp_path, capsys):
    (_, weights), out = weights_in(tmp_path), str(tmp_path / "m.onnx")
    wrong = {
        "no weights at": ["--detector", "atss", "--weights", str(tmp_path / "no.pth")],
        "these are no weights of 'fcos' as build_detector makes it": ["--detector", "fcos", "--weights", weights],
        "neither the authors' layout": [
            "--layout",
            "official",
            "--weights",
            weights,
        ],
        "class_names must be 3": ["--detector", "atss", "--weights", weights, "--classes", str(tmp_path / "two.txt")],
        "holds no names of classes": [
            "--detector",
            "atss",
            "--weights",
            weights,
            "--classes",
            str(tmp_path / "c.json"),
        ],
    }
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "c.json").write_text('{"images": []}')
    for message, arguments in wrong.items():
        assert main([*arguments, "--out", out]) == USAGE
        assert re.search(message, capsys.readouterr().err), message
    assert not (tmp_path / "m.onnx").exists()
