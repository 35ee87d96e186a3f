"""DETR (Carion et al., ECCV 2020): a set of boxes from a transformer, without anchors and without NMS.

Ingredients, as published (mmdetection 3.3's 150-epoch configuration):
- C5 through a 1×1 convolution, six encoder layers, six decoder layers on 100 learned queries; 8 heads, layers of 2,048,
  dropout 0.1, sine positions that know the padding; one norm behind every decoder layer;
- each query predicts a class or background, and through three layers a box: centre and sides as fractions of the
  image's;
- the queries are paired with the boxes at the least cost, for every decoder layer anew: - probability of the class,
  + 5 L1 of the fractions, - 2 GIoU in pixels;
- losses of every decoder layer: cross-entropy in which background weighs 0.1, divided by the sum of the weights;
  5 L1 and 2 (1 - GIoU) of the pairs, divided by their number;
- detections: each query's best class, the 100 best of an image.

Where DyHead sits: DETR has no pyramid. With DyHead, P3–P7 are built from C3–C5, DyHead replaces the encoder, and the
decoder attends to the cells of all levels, each with its position and a learned vector for its level. The cells pass
a norm first, as those of the encoder do in its last layer: DyHead leaves them so small that a decoder that starts from
zeros divides by next to nothing. Plain DETR is the baseline.

Deviations: the numbers of heads, layers and queries, the layers' width and the dropout are proportional to the
channels, and the published ones at 256, but there are at least 2 layers and 25 queries, and no more dropout than
published: at 32 channels, 0.1 keeps the classes of even four images from being learned. Where an image has more boxes
than there are queries, the boxes that cost most stay without one. Published DETR trains for 150 epochs or more; the
project's schedules are much shorter, and its numbers are not comparable.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.backbones.fpn import FPN
from heads.backbones.resnet import Backbone
from heads.boxes.boxes import clip_boxes, giou, pairwise_giou
from heads.boxes.fixed import FixedDetections, best_of, image_index
from heads.boxes.selection import ImageDetections
from heads.detector import Detector, PredictionHead
from heads.dyhead.dyhead import DyHead
from heads.precision import at_least_float32
from heads.query.hungarian import least_cost_assignment
from heads.query.transformer import DecoderLayer, EncoderLayer, padding_mask, sine_positions, xavier
from heads.ranks import normaliser
from heads.targets import Target

DROPOUT = 0.1
CLASS_COST, BOX_COST, GIOU_COST = 1.0, 5.0, 2.0
BACKGROUND_WEIGHT = 0.1


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre and sides to x1, y1, x2, y2."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def to_centres(boxes: Tensor) -> Tensor:
    """(..., 4) x1, y1, x2, y2 to centre and sides."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)


class DETROutputs(NamedTuple):
    """Predictions of D decoder layers for N images with Q queries.

    Attributes:
        logits: (D, N, Q, K + 1), background last.
        boxes: (D, N, Q, 4), centre and sides as fractions of the image's.
    """

    logits: Tensor
    boxes: Tensor


class Encoder(nn.Module):
    """DETR's own trunk: layers in which the cells of one map attend to each other."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*layer_sizes(channels)) for _ in range(depth(channels)))
        xavier(self)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        for layer in self.layers:
            x = layer(x, positions, mask)
        return x


def layer_sizes(channels: int) -> tuple[int, int, int, float]:
    """Channels, heads, width of the feed-forward part, dropout."""
    return channels, max(1, channels // 32), 8 * channels, DROPOUT * min(1.0, channels / 256)


def depth(channels: int) -> int:
    """Layers of the encoder, and of the decoder."""
    return max(2, 6 * channels // 256)


class SingleMap(nn.Module):
    """What plain DETR has for a pyramid: C5 through a 1×1 convolution."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.projection = nn.Conv2d(in_channels, channels, 1)
        nn.init.xavier_uniform_(self.projection.weight)
        if self.projection.bias is not None:
            nn.init.zeros_(self.projection.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """C3, C4, C5 -> [(N, C, H, W)] of C5."""
        return [self.projection(features[-1])]


class DETRHead(PredictionHead[DETROutputs]):
    """Decoder and predictors; see the top of this file.

    Args:
        in_channels: Channels of the tokens.
        num_classes: K, without background.
        queries: Number of learned queries, each of which predicts a box; None for 100 at 256 channels, in proportion,
            but 25 at least.
        layers: Layers of the decoder; None for `depth(in_channels)`.
        max_detections: The most detections of an image.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        queries: int | None = None,
        layers: int | None = None,
        max_detections: int = 100,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.max_detections = max_detections
        layers = depth(in_channels) if layers is None else layers
        queries = max(25, 100 * in_channels // 256) if queries is None else queries
        self.layers = nn.ModuleList(DecoderLayer(*layer_sizes(in_channels)) for _ in range(layers))
        self.norm = nn.LayerNorm(in_channels)
        self.queries = nn.Embedding(queries, in_channels)
        self.class_logits = nn.Linear(in_channels, num_classes + 1)
        self.box_layers = nn.ModuleList(nn.Linear(in_channels, outputs) for outputs in (in_channels, in_channels, 4))
        xavier(self)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> DETROutputs:
        """Predict from tokens; arguments as in `Tokens`, and no mask where there is no padding."""
        queries = self.queries.weight.expand(tokens.shape[0], -1, -1)
        x, states = torch.zeros_like(queries), []
        for layer in self.layers:
            x = layer(x, queries, tokens, positions, mask)
            states.append(self.norm(x))
        return self.predictions(torch.stack(states))

    def predictions(self, states: Tensor) -> DETROutputs:
        """(D, N, Q, C) to classes and boxes."""
        boxes = states
        for layer in self.box_layers[:-1]:
            boxes = F.relu(layer(boxes))
        logits, boxes = self.class_logits(states), self.box_layers[-1](boxes)
        return DETROutputs(at_least_float32(logits), at_least_float32(boxes).sigmoid())

    @torch.no_grad()
    def pairs(
        self, outputs: DETROutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Pair predictions with boxes at the least cost.

        Returns:
            (D * M,) int64 indices into the D * N * Q predictions and (D * M,) int64 indices into the boxes of the
            batch, decoder layer by decoder layer; M boxes of the batch are paired in each.
        """
        layers, images, queries, _ = outputs.boxes.shape
        per_image = []
        for image, (target, size) in enumerate(zip(targets, image_sizes, strict=True)):
            parts = self.costs(outputs.logits[:, image], outputs.boxes[:, image], target, size)
            per_image.append(parts[0] + parts[1] + parts[2])
        # One copy for the batch: each waits for the device. Weights that are not finite show in the loss; here they
        # only must not end the run.
        costs = torch.cat(per_image, -1).nan_to_num(1e6, 1e6, -1e6).cpu().numpy()
        lasts = np.cumsum([len(target["boxes"]) for target in targets])
        predictions, boxes = [], []
        for layer in range(layers):
            for image, (target, last) in enumerate(zip(targets, lasts, strict=True)):
                first = last - len(target["boxes"])
                rows, columns = least_cost_assignment(costs[layer, :, first:last])
                predictions.append(rows + (layer * images + image) * queries)
                boxes.append(columns + first)
        pairs = torch.from_numpy(np.stack([np.concatenate(predictions), np.concatenate(boxes)]))
        prediction, box = pairs.to(outputs.boxes.device)
        return prediction, box

    def costs(
        self, logits: Tensor, boxes: Tensor, target: Target, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Costs of pairing each query of one image with each of its n boxes.

        Args:
            logits: (D, Q, K + 1).
            boxes: (D, Q, 4), centre and sides as fractions of the image's.
            target: `boxes` (n, 4) xyxy in pixels and `labels` (n,).
            size: (height, width) of the image.

        Returns:
            Cost of the class, of the L1 distance, and of the GIoU, (D, Q, n) each.
        """
        scale = boxes.new_tensor([size[1], size[0]] * 2)
        fractions = to_centres(target["boxes"].to(boxes.dtype) / scale)
        return (
            -CLASS_COST * logits.softmax(-1)[..., target["labels"]],
            BOX_COST * (boxes[..., :, None, :] - fractions).abs().sum(-1),
            -GIOU_COST * pairwise_giou(to_corners(boxes) * scale, target["boxes"].to(boxes.dtype)),
        )

    def loss(
        self, outputs: DETROutputs, targets: list[Target], image_sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """The three losses of each decoder layer, to be summed.

        Args:
            outputs: What `forward` returned.
            targets: One dict an image: `boxes` (n, 4) xyxy in pixels, `labels` (n,) int64 below K; n may be 0.
            image_sizes: (height, width) of each image before padding.

        Returns:
            `loss_cls`, `loss_bbox`, `loss_iou` of the last layer, and of those before it `d0.loss_cls` and so on.
        """
        layers, _, queries, classes = outputs.logits.shape
        prediction, box = self.pairs(outputs, targets, image_sizes)
        paired = len(box) // layers
        labels = prediction.new_full((outputs.logits.shape[:-1].numel(),), self.num_classes)
        labels[prediction] = torch.cat([t["labels"] for t in targets])[box]
        weight = outputs.logits.new_ones(classes)
        weight[-1] = BACKGROUND_WEIGHT
        entropy = F.cross_entropy(outputs.logits.flatten(0, 2), labels, weight, reduction="none").view(layers, -1)
        background = len(labels) // layers - paired

        scale = outputs.boxes.new_tensor([[w, h, w, h] for h, w in image_sizes])
        scale = scale[prediction // queries % len(image_sizes)]
        fractions = outputs.boxes.flatten(0, 2)[prediction]
        goals = torch.cat([t["boxes"] for t in targets])[box].to(fractions.dtype)
        distance = (fractions - to_centres(goals / scale)).abs().view(layers, -1)
        overlap = giou(to_corners(fractions) * scale, goals).view(layers, -1)
        boxes = normaliser(paired, 1, entropy)
        sums = {
            "loss_cls": entropy.sum(1) / normaliser(paired + BACKGROUND_WEIGHT * background, 1, entropy),
            "loss_bbox": BOX_COST * distance.sum(1) / boxes,
            "loss_iou": GIOU_COST * (1 - overlap).sum(1) / boxes,
        }
        prefixes = [*(f"d{layer}." for layer in range(layers - 1)), ""]
        return {f"{prefix}{name}": sums[name][layer] for layer, prefix in enumerate(prefixes) for name in sums}

    @torch.no_grad()
    def predict(self, outputs: DETROutputs, image_sizes: list[tuple[int, int]]) -> list[ImageDetections]:
        """Detections, one dict an image, by falling score: `boxes` (K, 4) clipped, `scores` (K,), `labels` (K,)."""
        scores, labels = outputs.logits[-1].softmax(-1)[..., :-1].max(-1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        results: list[ImageDetections] = []
        for image, (height, width) in enumerate(image_sizes):
            best = order[image, : self.max_detections]
            boxes = to_corners(outputs.boxes[-1, image, best])
            boxes = clip_boxes(boxes * boxes.new_tensor([width, height] * 2), (height, width))
            results.append({"boxes": boxes, "scores": scores[image, : len(best)], "labels": labels[image, best]})
        return results

    @torch.no_grad()
    def predict_fixed(self, outputs: DETROutputs, size: tuple[int, int]) -> FixedDetections:
        """Detections in tensors of fixed shapes; see `PredictionHead.predict_fixed`."""
        scores, labels = outputs.logits[-1].softmax(-1)[..., :-1].max(-1)
        image, best = image_index(scores), best_of(scores, self.max_detections)
        corners = to_corners(outputs.boxes[-1][image, best])
        height, width = size
        # Factors one by one: no tensor can be made of sizes that are symbols.
        sides = (side * factor for side, factor in zip(corners.unbind(-1), (width, height) * 2, strict=True))
        boxes = clip_boxes(torch.stack(list(sides), -1), size)
        return FixedDetections(boxes, scores[image, best], labels[image, best])


class Tokens(NamedTuple):
    """The cells of one or several maps in a row, T of them.

    Attributes:
        values: (N, T, C).
        positions: (N, T, C), added to queries and keys.
        mask: (N, T) bool, true in the padding.
    """

    values: Tensor
    positions: Tensor
    mask: Tensor


def tokens_of(
    maps: list[Tensor],
    sizes: list[tuple[int, int]],
    padded: tuple[int, int],
    dtype: torch.dtype,
    levels: Tensor | None = None,
) -> Tokens:
    """The tokens of a batch.

    Args:
        maps: One (N, C, H_l, W_l) a level.
        sizes: (height, width) of each image before padding; a single one is that of all.
        padded: (height, width) of the batch.
        dtype: Of the positions: that of the weights which read them.
        levels: (L, C), added to the positions of each level; None for nothing.
    """
    masks = [padding_mask(sizes, padded, (m.shape[2], m.shape[3]), m.device).expand(m.shape[0], -1, -1) for m in maps]
    positions = [sine_positions(mask, m.shape[1]).flatten(1, 2).to(dtype) for mask, m in zip(masks, maps, strict=True)]
    if levels is not None:
        positions = [p + level for p, level in zip(positions, levels, strict=True)]
    return Tokens(
        torch.cat([m.flatten(2).mT for m in maps], 1),
        torch.cat(positions, 1),
        torch.cat([mask.flatten(1) for mask in masks], 1),
    )


class DETR(Detector):
    """Backbone, one map, encoder and `DETRHead`: the published detector; see the top of this file."""

    def raw_from(
        self, features: list[Tensor], padded: tuple[int, int], sizes: list[tuple[int, int]] | None = None
    ) -> DETROutputs:
        """Head outputs from the backbone's maps of a batch of images of these sizes; None says that all are full."""
        sizes = [padded] if sizes is None else sizes
        return self.head(*self.encode(self.fpn(features), sizes, padded))

    def encode(self, maps: list[Tensor], sizes: list[tuple[int, int]], padded: tuple[int, int]) -> Tokens:
        """What the decoder attends to. Arguments as in `tokens_of`."""
        tokens = tokens_of(maps, sizes, padded, self.mean.dtype)
        return tokens._replace(values=self.trunk(*tokens))


class DyHeadDETR(DETR):
    """DETR with a pyramid and a DyHead in place of the encoder; see the top of this file.

    Args:
        backbone: (N, 3, H, W) -> C3, C4, C5.
        fpn: These maps -> a pyramid.
        dyhead: Pyramid -> pyramid.
        head: Decoder and predictors.
        channels: Channels of the pyramid.
    """

    def __init__(self, backbone: nn.Module, fpn: FPN, dyhead: DyHead, head: DETRHead, channels: int):
        super().__init__(backbone, fpn, dyhead, head)
        self.levels = nn.Parameter(torch.zeros(len(fpn.strides), channels))
        self.norm = nn.LayerNorm(channels)

    def encode(self, maps: list[Tensor], sizes: list[tuple[int, int]], padded: tuple[int, int]) -> Tokens:
        """What the decoder attends to: the cells of all levels. Arguments as in `tokens_of`."""
        tokens = tokens_of(self.trunk(maps), sizes, padded, self.levels.dtype, self.levels)
        return tokens._replace(values=self.norm(tokens.values))


def detr(backbone: Backbone, num_classes: int, channels: int, dyhead: DyHead | None) -> Detector:
    """DETR; see the top of this file."""
    head = DETRHead(in_channels=channels, num_classes=num_classes)
    if dyhead is None:
        return DETR(backbone, SingleMap(backbone.channels[-1], channels), Encoder(channels), head)
    return DyHeadDETR(backbone, FPN(backbone.channels, channels), dyhead, head, channels)
