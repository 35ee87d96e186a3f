"""The losses of detection, each a sum over elements divided by a normaliser that the caller states.

Papers and code bases differ most in what they divide by, so no loss here averages by itself. A `normaliser` is a number
or a scalar tensor; it is never differentiated.
"""

from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from heads.boxes.boxes import giou, iou
from heads.precision import at_least_float32


class Focal(TypedDict):
    """The two constants of the focal loss: the weight of the target class's term, and the focusing exponent."""

    alpha: float
    gamma: float


class _FocalSum(torch.autograd.Function):
    """Sum of the focal loss with the gradient made in the forward, where all its parts are at hand.

    With x the logit of an element, s = -x where the class is the target and s = x elsewhere, p = sigmoid(s):
    loss = weight * p**gamma * softplus(s), and d loss / d s = weight * p**gamma * (gamma * (1 - p) * softplus(s) + p).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, is_target: Tensor, weight: Tensor | None, alpha: float, gamma: float
    ) -> Tensor:
        signed = torch.where(is_target, -logits, logits)
        p = signed.sigmoid()
        cross_entropy = F.softplus(signed)
        # alpha for targets, 1 - alpha for the rest.
        scale = is_target.to(logits.dtype).mul_(2 * alpha - 1).add_(1 - alpha)
        if weight is not None:
            scale = scale * weight
        scale.mul_(p * p if gamma == 2 else p**gamma)
        loss = (scale * cross_entropy).sum()
        if ctx.needs_input_grad[0]:
            slope = cross_entropy.mul_(gamma * (1 - p)).add_(p).mul_(scale)
            ctx.save_for_backward(torch.where(is_target, -slope, slope))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None, None


def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    normaliser: Tensor | float,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Focal loss on independent sigmoids (Lin et al., 2017): `-alpha_t (1 - p_t)^gamma log p_t`, summed, normalised.

    Args:
        logits: (..., C) floating point; half precision is computed in float32.
        labels: (...) int64, the target class; a value outside 0…C-1 is background.
        normaliser: What the sum is divided by.
        alpha: Weight of the target class's term; the others weigh `1 - alpha`.
        gamma: Focusing exponent, at least 0.
        weight: (...) weights of the rows, or None for ones; not differentiated.

    Returns:
        A scalar. It can be differentiated once.

    Example:
        >>> import torch
        >>> from heads.boxes.losses import sigmoid_focal_loss
        >>> sigmoid_focal_loss(torch.zeros(2, 3), torch.tensor([0, 3]), normaliser=1)
        tensor(0.6931)
    """
    logits = at_least_float32(logits)
    is_target = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    weight = None if weight is None else weight[..., None].to(logits.dtype)
    return _FocalSum.apply(logits, is_target, weight, alpha, gamma) / normaliser


def giou_loss(
    predicted: Tensor,
    target: Tensor,
    *,
    normaliser: Tensor | float,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    eps_rule: Literal["max", "add"] = "max",
) -> Tensor:
    """`1 - GIoU` of pairs of boxes, weighted, summed, normalised.

    Args:
        predicted, target: (n, 4) in pixels.
        normaliser: What the sum is divided by.
        weight: (n,), or None for ones.
        eps, eps_rule: See `giou`.

    Returns:
        A scalar.
    """
    return _total(1 - giou(predicted, target, eps, eps_rule), weight) / normaliser


def iou_loss(
    predicted: Tensor,
    target: Tensor,
    *,
    normaliser: Tensor | float,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`-log(IoU)` of pairs of boxes (UnitBox, Yu et al., 2016), weighted, summed, normalised.

    Args:
        predicted, target: (n, 4) in pixels.
        normaliser: What the sum is divided by.
        weight: (n,), or None for ones.
        eps: The least that a union counts as, in square pixels, and the least that an IoU counts as.

    Returns:
        A scalar.
    """
    return _total(-iou(predicted, target, eps).clamp(min=eps).log(), weight) / normaliser


def centerness_loss(logits: Tensor, target: Tensor, *, normaliser: Tensor | float) -> Tensor:
    """Binary cross-entropy, summed, normalised.

    Args:
        logits: (n,).
        target: (n,) in [0, 1].
        normaliser: What the sum is divided by.

    Returns:
        A scalar.
    """
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / normaliser


def smooth_l1_loss(
    predicted: Tensor,
    target: Tensor,
    *,
    normaliser: Tensor | float,
    beta: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Huber's loss over `beta`: `0.5 d² / beta` below `beta`, `|d| - 0.5 beta` above; 0 gives L1. Summed, normalised.

    Args:
        predicted, target: (..., k).
        normaliser: What the sum is divided by.
        beta: Where the loss becomes linear.
        weight: (...) weights of the rows, or None for ones.

    Returns:
        A scalar.
    """
    if weight is None:
        return F.smooth_l1_loss(predicted, target, reduction="sum", beta=beta) / normaliser
    return _total(F.smooth_l1_loss(predicted, target, reduction="none", beta=beta), weight[..., None]) / normaliser


def _total(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss.sum() if weight is None else (loss * weight).sum()
