"""What all dense heads share: from the rows that they predict to detections."""

from typing import TypeVar

import torch

from heads.boxes.fixed import FixedDetections, fixed_detections
from heads.boxes.selection import Candidates, ImageDetections, Selection
from heads.detector import PredictionHead

Outputs = TypeVar("Outputs")


class DenseHead(PredictionHead[Outputs]):
    """A head that predicts a row of class logits and a box for every anchor or point.

    A subclass implements `forward`, `loss` and `candidates_of`, and sets `num_classes` and `selection`.

    Attributes:
        selection: Which predictions become detections.
    """

    selection: Selection

    def candidates_of(self, outputs: Outputs) -> Candidates:
        """How probable each class of each anchor is, and how its box and its score are read.

        Args:
            outputs: What `forward` returned.
        """
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, outputs: Outputs, image_sizes: list[tuple[int, int]]) -> list[ImageDetections]:
        """Detections of each image, by falling score; see `PredictionHead.predict`."""
        return self.selection.detections(self.candidates_of(outputs), image_sizes)

    @torch.no_grad()
    def predict_fixed(self, outputs: Outputs, size: tuple[int, int]) -> FixedDetections:
        """Detections in tensors of fixed shapes; see `PredictionHead.predict_fixed`."""
        return fixed_detections(self.candidates_of(outputs), self.selection, size)
