"""The inference loop: a detector's detections on every image of a split, in pixels of the original images.

A cell's evaluation and a released checkpoint go through it alike.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import NamedTuple, cast

import torch

from ablations.data.batch import ALONE, Share
from ablations.data.loader import EvalLoader
from ablations.data.split import Split
from ablations.evaluation.detections import Detections, run_lengths
from ablations.experiment.augment import merge, mirrored
from ablations.experiment.precision import autocast
from heads.detector import Detector
from heads.two_stage.masks import paste

MOST_THREADS = 8


class View(NamedTuple):
    """A way to show an image to a detector: its shorter side in pixels, and whether it is mirrored."""

    short_side: int
    flip: bool = False


def detect(
    model: Detector,
    split: Split,
    views: Sequence[View],
    *,
    batch_size: int,
    max_size: int,
    device: torch.device,
    precision: str = "fp32",
    threads: int = 0,
    busy: Callable[[], AbstractContextManager[object]] = nullcontext,
    report: Callable[[int], None] = lambda images: None,
    share: Share = ALONE,
) -> list[tuple[int | str, Detections]]:
    """Run a detector on every image of a split.

    Args:
        model: On `device`; put into evaluation mode.
        split: The images.
        views: How each image is shown; the detections of several views are merged.
        batch_size: Images a batch. They are padded together, so it decides the result.
        max_size: Cap of the longer side in pixels.
        device: Where to run.
        precision: `"fp32"` or `"bf16"`.
        threads: Threads that decode ahead of the detector (`loader_threads`).
        busy: Context manager around every batch; latency is measured only while no batch runs.
        report: Called after every batch with the number of images of this view that are done.
        share: The batches that this process takes.

    Returns:
        For every image of them its id and its detections, on the CPU: `boxes` (K, 4) xyxy float32 in pixels of the
        original image, `scores` (K,), `labels` (K,), and of a detector with masks `masks`, K compressed run lengths of
        that image.

    Raises:
        DataError: An image does not decode; the message names the file.
        ValueError: Several views of a detector with masks.
    """
    model.eval()
    shown: dict[int | str, list[Detections]] = {}
    for short_side, flip in views:
        done = 0
        with closing(EvalLoader(split, batch_size, short_side, max_size, threads=threads, share=share)) as batches:
            for images, origins in batches:
                with busy(), torch.inference_mode(), autocast(device, precision):
                    images = [(image.flip(-1) if flip else image).to(device) for image in images]
                    for image, found, origin in zip(images, model(images), origins, strict=True):
                        boxes = found["boxes"].float()
                        boxes = origin.to_original(mirrored(boxes, image.shape[-1]) if flip else boxes)
                        detections: Detections = {"boxes": boxes, "scores": found["scores"], "labels": found["labels"]}
                        if "masks" in found:
                            pasted = paste(found["mask_probabilities"], boxes, (origin.height, origin.width))
                            detections["masks"] = run_lengths(pasted)
                        shown.setdefault(origin.image_id, []).append(detections)
                done += len(images)
                report(done)
    return [(image_id, on_cpu(seen[0] if len(seen) == 1 else merge(seen))) for image_id, seen in shown.items()]


def on_cpu(detections: Detections) -> Detections:
    """The detections of an image with their tensors on the CPU."""
    moved = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in detections.items()}
    return cast(Detections, moved)


def loader_threads(device: torch.device, cores: int) -> int:
    """How many threads decode ahead: on a GPU one a core, up to 8; on a CPU none, they would take the model's cores."""
    return 0 if device.type == "cpu" else min(MOST_THREADS, cores)


def move(model: Detector, device: torch.device) -> Detector:
    """Put a detector on a device, its weights channels last, which convolutions run fastest in."""
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # absent from its stub
