"""Detectors as programs: detections of fixed shapes, torch.compile, torch.export, ONNX.

Every detector, head and program is compared by `make parity`, for any size, whose table is in results/export; here is a
part of it.
"""

import os

import pytest
import torch
from lively import lively_detector
from parity import onnx_parity, relative_error, session

from heads.build import DETECTORS
from heads.onnx.model import EXAMPLE, ExportedDetector, export

SIZE = (100, 130)


def images(count, size=SIZE, seed=3):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("attentions", ["LSC", None])
@pytest.mark.parametrize("name", DETECTORS)
@torch.inference_mode()
def test_detections_of_fixed_shapes_are_those_of_the_detector(name, attentions):
    detector, batch = lively_detector(name, attentions), images(2)
    boxes, scores, labels, *masks = ExportedDetector(detector)(batch)
    found = detector(list(batch))
    assert min(len(each["scores"]) for each in found) > 5
    for number, wanted in enumerate(found):
        count = len(wanted["scores"])
        assert torch.equal(labels[number, :count], wanted["labels"])
        torch.testing.assert_close(boxes[number, :count], wanted["boxes"])
        torch.testing.assert_close(scores[number, :count], wanted["scores"])
        assert (labels[number, count:] == -1).all() and not scores[number, count:].any()
        assert not boxes[number, count:].any()
        if masks:
            torch.testing.assert_close(masks[0][number, :count], wanted["mask_probabilities"])


@torch.inference_mode()
def test_what_there_is_too_little_of_is_filled_up():
    """An image so small that its levels hold fewer candidates than may be taken, and one without any detection."""
    detector = lively_detector("atss")
    boxes, _, labels = ExportedDetector(detector)(images(1, (8, 8)))
    assert int((labels >= 0).sum()) == len(detector([images(1, (8, 8))[0]])[0]["labels"])
    detector.head.cls_logits.bias.fill_(-100)
    boxes, scores, labels = ExportedDetector(detector)(images(1))
    assert (labels == -1).all() and not scores.any() and not boxes.any()


@pytest.mark.parametrize("name", DETECTORS)
def test_compiled_without_a_graph_break(name):
    torch.compiler.reset()
    model, batch = ExportedDetector(lively_detector(name), raw=True), images(2)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
        assert relative_error(model(batch), compiled(batch)) == 0


@pytest.mark.parametrize("name", DETECTORS)
def test_exported_by_pytorch(name):
    """For one size, or for all where there is time."""
    detector, opened = lively_detector(name), "DYHEAD_EXPORTS" in os.environ
    model = ExportedDetector(detector, raw=True)
    auto = torch.export.Dim.AUTO
    axes = ({0: auto, 2: auto, 3: auto},) if opened else None
    with torch.no_grad():
        program = torch.export.export(model, (torch.rand(EXAMPLE),), dynamic_shapes=axes).module()
        batch = images(3, (300, 400)) if opened else images(*EXAMPLE[:1], EXAMPLE[2:])
        assert relative_error(model(batch), program(batch)) == 0


@pytest.mark.skipif(
    "DYHEAD_EXPORTS" not in os.environ, reason="takes minutes: DYHEAD_EXPORTS=1 or `make parity` runs it"
)
def test_onnx_with_proposals_regions_and_masks():
    detector, batch = lively_detector("mask_rcnn"), images(2)
    found = onnx_parity(detector, session(detector, batch), [batch])
    assert found.same and found.found > 50 and not found.swapped
    assert found.raw < 1e-4 and found.boxes < 1e-3 and found.scores < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("name", ["atss", "mask_rcnn", "cascade_rcnn", "detr"])
def test_half_precision_is_near(name):
    batch = images(1)
    wanted = ExportedDetector(lively_detector(name), raw=True)(batch)
    found = ExportedDetector(lively_detector(name), raw=True, half=True)(batch)
    # Eleven bits, of some dozen layers.
    assert 0 < relative_error(wanted, found) < 2e-2
    boxes, scores, labels, *_ = ExportedDetector(lively_detector(name), half=True)(batch)
    assert boxes.dtype == scores.dtype == torch.float32 and labels.dtype == torch.int64


def test_names_must_be_as_many_as_classes(tmp_path):
    with pytest.raises(ValueError, match="class_names must be 3, as many as the detector's classes, got 2"):
        export(lively_detector("fcos"), tmp_path / "model.onnx", class_names=["a", "b"])
    assert not list(tmp_path.iterdir())
