"""The outputs of dense heads as rows, one per anchor, instead of maps by level."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.precision import at_least_float32


def flatten_levels(maps: Sequence[Tensor], values: int) -> Tensor:
    """Flatten the maps of all levels into rows, in the order of `heads.boxes.anchors`.

    Args:
        maps: L maps (N, a * values, H_l, W_l); channels are read anchor by anchor. Half precision becomes float32.
        values: Values of an anchor.

    Returns:
        (N, A, values) with A = a * sum of H_l * W_l.

    Example:
        >>> import torch
        >>> from heads.boxes.rows import flatten_levels
        >>> flatten_levels([torch.zeros(2, 12, 4, 6), torch.zeros(2, 12, 2, 3)], 4).shape
        torch.Size([2, 90, 4])
    """
    flat = at_least_float32(torch.cat([m.flatten(2) for m in maps], 2))
    batch, channels, cells = flat.shape
    if channels == values:
        return flat.transpose(1, 2).contiguous()
    return flat.view(batch, channels // values, values, cells).permute(0, 3, 1, 2).reshape(batch, -1, values)


def predict_rows(features: Sequence[Tensor], *predictors: nn.Conv2d, anchors: int = 1) -> tuple[Tensor, ...]:
    """Apply predictors that read the same maps as one convolution.

    Args:
        features: L maps (N, channels, H_l, W_l).
        *predictors: Convolutions with bias, of one kernel size and padding.
        anchors: Anchors of a cell; a predictor's channels are read anchor by anchor.

    Returns:
        One (N, A, channels / anchors) a predictor, as `flatten_levels` gives them.
    """
    weights, biases = [p.weight for p in predictors], [bias_of(p) for p in predictors]
    weight = weights[0] if len(predictors) == 1 else torch.cat(weights)
    bias = biases[0] if len(predictors) == 1 else torch.cat(biases)
    maps = [F.conv2d(f, weight, bias, padding=predictors[0].padding) for f in features]
    channels = [len(b) for b in biases]
    if anchors == 1:
        return flatten_levels(maps, len(bias)).split(channels, -1)
    by_predictor = zip(*(m.split(channels, 1) for m in maps), strict=True)
    return tuple(flatten_levels(part, c // anchors) for part, c in zip(by_predictor, channels, strict=True))


def initialise_predictors(classification: nn.Conv2d, *others: nn.Conv2d, prior: float) -> None:
    """Draw the weights of the last layers as RetinaNet does (Lin et al., 2017): standard deviation 0.01, biases 0.

    Args:
        classification: The layer of the class logits, whose biases are `log(prior / (1 - prior))` instead.
        *others: The other last layers; weights are drawn in this order.
        prior: Class probability that the untrained layer predicts; in (0, 1).
    """
    for predictor in (classification, *others):
        nn.init.normal_(predictor.weight, std=0.01)
        nn.init.zeros_(bias_of(predictor))
    nn.init.constant_(bias_of(classification), -math.log((1 - prior) / prior))


def bias_of(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The bias of a layer that has one.

    Raises:
        ValueError: It has none.
    """
    # Stubs of PyTorch say that every layer may lack it.
    bias: Tensor | None = layer.bias
    if bias is None:
        raise ValueError(f"{layer} must have a bias")
    return bias
