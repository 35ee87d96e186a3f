"""A detector as one graph from images to detections, and that graph as a file of ONNX."""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from heads.detector import Detector
from heads.onnx.translation import onnx_translation_table
from kernels import use_backend
from kernels.version import __version__

OPSET = 20
# No side is a multiple of what a detector pads to, and every level of its pyramid has two rows and columns.
EXAMPLE = (2, 3, 270, 330)
DETECTIONS = ("boxes", "scores", "labels")


class ExportedDetector(nn.Module):
    """A detector with tensors in and tensors out, for `torch.export`, `torch.compile` and ONNX.

    Unlike `Detector`, it takes images of one size as one tensor, and every shape that it returns follows from theirs.

    Args:
        detector: The detector; it is put in evaluation mode.
        raw: Whether the outputs are the head's predictions, before they are decoded, instead of detections.
        half: Whether to compute in float16, except for normalising and decoding, which stay in float32.

    Example:
        >>> import torch
        >>> from heads import build_detector
        >>> from heads.onnx.model import ExportedDetector
        >>> detector = build_detector("atss", num_classes=3, backbone="tiny", depth=1, channels=16)
        >>> with torch.inference_mode():
        ...     boxes, scores, labels = ExportedDetector(detector)(torch.rand(2, 3, 70, 90))
        >>> boxes.shape, scores.shape, labels.shape
        (torch.Size([2, 100, 4]), torch.Size([2, 100]), torch.Size([2, 100]))
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: Detector, *, raw: bool = False, half: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", detector.mean.detach().float(), persistent=False)
        self.register_buffer("std", detector.std.detach().float(), persistent=False)
        self.detector = (detector.half() if half else detector).eval()
        self.raw, self.half_precision = raw, half

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detections of images.

        Args:
            images: (N, 3, H, W) float32, red, green and blue in 0 … 1.

        Returns:
            `boxes` (N, M, 4) x1, y1, x2, y2 in pixels, `scores` (N, M), `labels` (N, M) int64, by falling score, filled
            up with scores of 0 and labels of -1, and of Mask R-CNN `masks` (N, M, 28, 28), probabilities inside the
            box. With `raw` the tensors that the head predicts, in the order of `output_names`.
        """
        outputs, size = self.predicted(images)
        if self.raw:
            return tuple(value for _, value in _named(outputs))
        found = self.detector.head.predict_fixed(outputs, size)
        return tuple(value for value in found if value is not None)

    def predicted(self, images: Tensor) -> tuple[Any, tuple[int, int]]:
        """What the head predicts, and (height, width) of the images."""
        detector, size = self.detector, (images.shape[2], images.shape[3])
        # ONNX divides negative integers otherwise than Python, so not `-(-side // divisor)`.
        height, width = ((side + detector.divisor - 1) // detector.divisor * detector.divisor for side in size)
        batch = (images - self.mean) / self.std
        batch = F.pad(batch, (0, width - size[1], 0, height - size[0]))
        batch = batch.flip(1) if detector.bgr else batch
        features = detector.features(batch.half() if self.half_precision else batch)
        # One size for all images, however many there are.
        return detector.raw_from(features, (height, width), [size]), size

    def output_names(self) -> list[str]:
        """The names of what `forward` returns."""
        if not self.raw:
            return [*DETECTIONS, "masks"] if self.detector.needs_masks else list(DETECTIONS)
        with torch.inference_mode():
            outputs, _ = self.predicted(self.mean.new_zeros(1, 3, 64, 64))
        return [name for name, _ in _named(outputs)]


def _named(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a head's outputs, under the names of their fields."""
    for path, value in tree_flatten_with_path(outputs)[0]:
        if isinstance(value, Tensor):
            yield ".".join(str(key).strip(".[]'\"") for key in path), value


def export(
    detector: Detector,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    raw: bool = False,
    half: bool = False,
    about: dict[str, str] | None = None,
) -> None:
    """Write a detector as a model of ONNX, with batch, height and width left open.

    Args:
        detector: Any detector of this package. With `half` its weights become float16.
        path: Of the file; it appears only when it is whole.
        class_names: For the metadata; None for their numbers.
        raw, half: See `ExportedDetector`, whose inputs and outputs are those of the model.
        about: More entries of the metadata.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: There are not as many names as classes.
        OSError: The file cannot be written.
    """
    classes = detector.head.num_classes
    names = [str(number) for number in range(classes)] if class_names is None else list(class_names)
    if len(names) != classes:
        raise ValueError(f"class_names must be {classes}, as many as the detector's classes, got {len(names)}")
    model = ExportedDetector(detector, raw=raw, half=half)
    program = to_onnx(model)
    normalisation = {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    program.model.producer_name, program.model.producer_version = "dyhead-lab", __version__
    program.model.metadata_props.update(
        {
            "class_names": json.dumps(names),
            "input": "images (batch, 3, height, width) float32, RGB in 0 ... 1, not normalised, not padded",
            "normalisation": json.dumps(
                normalisation | {"channels": "BGR" if detector.bgr else "RGB", "in_graph": True}
            ),
            "padded_to": str(detector.divisor),
            "precision": "float16" if half else "float32",
            **(about or {}),
        }
    )
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        program.save(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def to_onnx(model: ExportedDetector, example: Tensor | None = None) -> torch.onnx.ONNXProgram:
    """The graph of a detector in ONNX.

    Args:
        model: The detector.
        example: (N, 3, H, W) images; the graph is for this size and number alone. None leaves all three open.

    Raises:
        ImportError: onnx or onnxscript is not installed.
    """
    table = onnx_translation_table()
    images = torch.rand(EXAMPLE, device=model.mean.device) if example is None else example
    with torch.no_grad(), use_backend("torch"), _quiet():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=model.output_names(),
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},) if example is None else None,
            custom_translation_table=table,
            verbose=False,
        )
    assert program is not None
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about itself: that torchvision is missing, and what it will change one day."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
