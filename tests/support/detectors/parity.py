"""What a detector computes as a program of another kind, against what it computes in PyTorch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from heads.boxes.selection import ImageDetections
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
        swapped: Detections at another place in the order, by scores that differ by less than both programs' rounding.
        same: Whether number, labels and order of the detections are equal, but for the swapped ones.
    """

    raw: float
    boxes: float
    scores: float
    found: int
    swapped: int
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
    raw, boxes, scores, count, swapped, same = 0.0, 0.0, 0.0, 0, 0, True
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
            if int(there.sum()) != len(wanted["labels"]):
                same = False
                continue
            scores = max(scores, _difference(found["scores"][number][there], wanted["scores"]))
            place = places(found["boxes"][number][there], found["labels"][number][there], wanted)
            if place is None:
                same = False
                continue
            moved = (wanted["scores"] - wanted["scores"][place]).abs()
            swapped += int((place != torch.arange(len(place))).sum())
            same = same and bool((moved <= 2 * scores).all())
            boxes = max(boxes, _difference(found["boxes"][number][there], wanted["boxes"][place]))
            if "masks" in found:
                masks = wanted["mask_probabilities"][place]
                scores = max(scores, _difference(found["masks"][number][there], masks))
    return Parity(raw, boxes, scores, count, swapped, same)


def _difference(found: np.ndarray, wanted: Tensor) -> float:
    return float(np.abs(found - wanted.numpy()).max(initial=0))


def places(boxes: np.ndarray, labels: np.ndarray, wanted: ImageDetections) -> Tensor | None:
    """(K,) which detection of `wanted` each one is, by label and box to a quarter pixel; None where one is none."""
    apart = (torch.from_numpy(boxes)[:, None] - wanted["boxes"]).abs().amax(-1)
    apart[torch.from_numpy(labels)[:, None] != wanted["labels"]] = torch.inf
    # Its own place first, where that is as near as any: several boxes may be one.
    place = torch.arange(len(boxes))
    place = torch.where(apart.diagonal() < 0.25, place, apart.argmin(1)) if len(boxes) else place
    known = bool((apart[torch.arange(len(boxes)), place] < 0.25).all())
    return place if known and len(place.unique()) == len(place) else None
