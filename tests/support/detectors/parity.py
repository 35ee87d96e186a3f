"""What a detector computes as a program of another kind, against what it computes in PyTorch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from heads.detector import Detector
from heads.onnx.model import ExportedDetector, to_onnx


class WithRaw(ExportedDetector):
    """A detector that returns its detections and behind them what its head predicts: one export shows both."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        self.raw = True
        raw = super().forward(images)
        self.raw = False
        return (*super().forward(images), *raw)

    def output_names(self) -> list[str]:
        names = super().output_names()
        self.raw = True
        names += [f"raw.{name}" for name in super().output_names()]
        self.raw = False
        return names


class Parity(NamedTuple):
    """How far a program is from PyTorch, over some images.

    Attributes:
        raw: Largest difference of what the head predicts, by the largest number of its tensor.
        boxes: Largest difference of a detection's side, in pixels.
        scores: Largest difference of a detection's score.
        found: Detections in PyTorch.
        same: Whether number, order and labels of the detections are equal.
    """

    raw: float
    boxes: float
    scores: float
    found: int
    same: bool


def relative_error(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference in any tensor, by the largest number of that tensor."""
    assert [x.shape for x in wanted] == [x.shape for x in found]
    errors = [(a.double() - b.double()).abs().max() / a.abs().max() for a, b in zip(wanted, found, strict=True)]
    return float(max(errors))


class RawAlone(ExportedDetector):
    """A detector that returns what its head predicts alone, under the names of `WithRaw`."""

    def __init__(self, detector: Detector, half: bool = False) -> None:
        super().__init__(detector, raw=True, half=half)

    def output_names(self) -> list[str]:
        return [f"raw.{name}" for name in super().output_names()]


def session(
    detector: Detector, example: Tensor | None = None, *, decoded: bool = True, half: bool = False
) -> onnxruntime.InferenceSession:
    """onnxruntime's session of a detector, with its raw outputs; see `to_onnx`.

    Args:
        detector, example, half: As for `to_onnx` and `ExportedDetector`.
        decoded: Whether the detections are outputs, too.
    """
    program = to_onnx((WithRaw if decoded else RawAlone)(detector, half=half), example)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)


@torch.inference_mode()
def onnx_parity(detector: Detector, run: onnxruntime.InferenceSession, batches: Sequence[Tensor]) -> Parity:
    """Compare a session with the detector itself, as its users call it.

    Args:
        detector: In evaluation mode.
        run: Its `session`.
        batches: Images (N, 3, H, W) each.
    """
    names = [output.name for output in run.get_outputs()]
    raw, boxes, scores, count, same = 0.0, 0.0, 0.0, 0, True
    for images in batches:
        found = dict(zip(names, run.run(None, {"images": images.numpy()}), strict=True))
        predicted = ExportedDetector(detector, raw=True)
        values = [torch.from_numpy(found[f"raw.{name}"]) for name in predicted.output_names()]
        raw = max(raw, relative_error(predicted(images), values))
        if "labels" not in found:
            continue
        for number, wanted in enumerate(detector(list(images))):
            there = found["labels"][number] >= 0
            count += len(wanted["labels"])
            if not np.array_equal(found["labels"][number][there], wanted["labels"].numpy()):
                same = False
                continue
            boxes = max(boxes, _difference(found["boxes"][number][there], wanted["boxes"]))
            scores = max(scores, _difference(found["scores"][number][there], wanted["scores"]))
            if "masks" in found:
                scores = max(scores, _difference(found["masks"][number][there], wanted["mask_probabilities"]))
    return Parity(raw, boxes, scores, count, same)


def _difference(found: np.ndarray, wanted: Tensor) -> float:
    return float(np.abs(found - wanted.numpy()).max(initial=0))
