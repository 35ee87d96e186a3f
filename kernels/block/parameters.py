"""The parameters of a DyHead block, and what its public functions ask of their arguments."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.checks import (
    FLOATING,
    check_device,
    check_flag,
    check_integer,
    check_number,
    check_tensor,
    kind_of,
)

TAPS = 9
COARSE_OFFSETS = ("crop", "prefix", "resize")
# Of the convolutions of a level itself, its finer and its coarser neighbour.
STRIDES = (1, 2, 1)


@dataclass(frozen=True)
class BlockParameters:
    """The tensors and settings of one block for maps of C channels.

    Three entries are for the maps that a level samples: the level itself, its finer and its coarser neighbour. What is
    None is switched off: without `offset` the convolutions are ordinary ones, without `gate` a level's maps have equal
    weights, without `dynamic_relu` there is an ordinary ReLU.

    Attributes:
        weights: Three (C, C, 3, 3), of the convolutions; that from the finer neighbour has stride 2.
        norm_weights: Three (C,), scales of the GroupNorms that follow the convolutions.
        norm_biases: Three (C,), shifts of the GroupNorms.
        biases: Three (C,) or None, of the convolutions.
        offset: Weight (27, C, 3, 3) and bias (27,) of the convolution that predicts, for each of nine taps, dy and dx
            in pixels (18 channels, interleaved) and a mask in front of its sigmoid (9 channels).
        gate: Weight (1, C) and bias (1,) of scale attention.
        dynamic_relu: Weight and bias of the two layers that compute the coefficients of dynamic ReLU: (R, C), (R,),
            (4C, R), (4C,).
        relu: Whether an ordinary ReLU ends the block where there is no `dynamic_relu`; False for none at all.
        coarse_offsets: How offsets and masks of a level (H, W) serve its coarser neighbour (about H/2, W/2). `"crop"`
            takes the top left corner; `"prefix"` the first elements of the flattened tensor, as the released code does
            by mistake; `"resize"` interpolates bilinearly.
        groups: Groups of the GroupNorms, a power of two that divides C.
        eps: What the GroupNorms add to the variances.
    """

    weights: Sequence[Tensor]
    norm_weights: Sequence[Tensor]
    norm_biases: Sequence[Tensor]
    biases: Sequence[Tensor | None] = (None, None, None)
    offset: Sequence[Tensor] | None = None
    gate: Sequence[Tensor] | None = None
    dynamic_relu: Sequence[Tensor] | None = None
    relu: bool = True
    coarse_offsets: str = "crop"
    groups: int = 16
    eps: float = 1e-5


def coarser_offsets(maps: Sequence[Tensor], mode: str) -> list[Tensor]:
    """Offsets or masks of every level that has a coarser neighbour, in the size of that neighbour.

    Args:
        maps: One (N, K, H_l, W_l) a level, finest first.
        mode: As in `BlockParameters.coarse_offsets`.
    """
    return [_resized(fine, coarse.shape[2], coarse.shape[3], mode) for fine, coarse in pairwise(maps)]


def _resized(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    if mode == "crop":
        return x[:, :, :height, :width]
    if mode == "prefix":
        batch, channels = x.shape[:2]
        return x.flatten(1)[:, : channels * height * width].reshape(batch, channels, height, width)
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


def pyramid_mismatch(sizes: Sequence[Sequence[int]]) -> str | None:
    """Why levels of these heights and widths are no pyramid whose levels halve, rounded up; None if they are."""
    for level, (fine, coarse) in enumerate(pairwise(sizes)):
        expected = [(size + 1) // 2 for size in fine]
        if list(coarse) != expected:
            return f"level {level + 1} is {coarse[0]}x{coarse[1]}, half of level {level} is {expected[0]}x{expected[1]}"
    return None


def check_features(features: Any) -> None:
    """A pyramid: maps (N, C, H_l, W_l) of one N, C, type and device, every level half as large as the one before."""
    if not isinstance(features, list | tuple):
        raise TypeError(f"features must be a list with one tensor a level, got {kind_of(features)}")
    if not features:
        raise ValueError("features must be a list with one tensor a level, got none")
    for level, x in enumerate(features):
        name = f"features[{level}]"
        check_tensor(name, x, "(N, C, H, W)", 4)
        check_device(name, x, "features[0]", features[0])
        if x.shape[:2] != features[0].shape[:2]:
            first = tuple(features[0].shape)
            raise ValueError(f"{name} must have batch and channels of features[0], {first}, got shape {tuple(x.shape)}")
        if x.dtype != features[0].dtype and not _is_cast(x):
            raise ValueError(f"{name} must be of the type of features[0], {features[0].dtype}, got {x.dtype}")
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} must have a channel and a pixel or more, got shape {tuple(x.shape)}")
    mismatch = pyramid_mismatch([x.shape[2:] for x in features])
    if mismatch is not None:
        raise ValueError(f"features must halve from level to level, rounded up: {mismatch}")


def check_parameters(name: str, parameters: Any, like: Tensor) -> None:
    """The parameters of a block for maps as `like`, which `check_features` has passed."""
    if not isinstance(parameters, BlockParameters):
        raise TypeError(f"{name} must be kernels.BlockParameters, got {kind_of(parameters)}")
    channels, groups = like.shape[1], check_integer(f"{name}.groups", parameters.groups, 1)
    if groups & (groups - 1) or channels % groups:
        raise ValueError(f"{name}.groups must be a power of two that divides the {channels} channels, got {groups}")
    check_number(f"{name}.eps", parameters.eps)
    check_flag(f"{name}.relu", parameters.relu)
    if parameters.coarse_offsets not in COARSE_OFFSETS:
        names = ", ".join(COARSE_OFFSETS)
        raise ValueError(f"{name}.coarse_offsets must be one of {names}, got {parameters.coarse_offsets!r}")
    cast = _is_cast(like)
    for field, shapes in _shapes(parameters, channels):
        tensors = getattr(parameters, field)
        if not isinstance(tensors, list | tuple) or len(tensors) != len(shapes):
            wanted = f"{name}.{field} must be {len(shapes)} tensors"
            got = f"{len(tensors)} of them" if isinstance(tensors, list | tuple) else kind_of(tensors)
            raise (ValueError if isinstance(tensors, list | tuple) else TypeError)(f"{wanted}, got {got}")
        for i, (x, shape) in enumerate(zip(tensors, shapes, strict=True)):
            if not _fits(x, shape, like, cast) and not (x is None and field == "biases"):
                _refuse(f"{name}.{field}[{i}]", x, shape, like)


def _shapes(parameters: BlockParameters, channels: int) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """The fields that are there, with the shapes of their tensors."""
    yield "weights", [(channels, channels, 3, 3)] * 3
    for field in ("norm_weights", "norm_biases", "biases"):
        yield field, [(channels,)] * 3
    if parameters.offset is not None:
        yield "offset", [(3 * TAPS, channels, 3, 3), (3 * TAPS,)]
    if parameters.gate is not None:
        yield "gate", [(1, channels), (1,)]
    if parameters.dynamic_relu is not None:
        layers = parameters.dynamic_relu
        first = layers[0] if isinstance(layers, list | tuple) and layers else None
        hidden = first.shape[0] if isinstance(first, Tensor) and first.dim() and first.shape[0] else 1
        yield "dynamic_relu", [(hidden, channels), (hidden,), (4 * channels, hidden), (4 * channels,)]


def _is_cast(x: Tensor) -> bool:
    """Whether autocast rounds tensors beside this one, so that they may have several types."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _fits(x: Any, shape: tuple[int, ...], like: Tensor, cast: bool) -> bool:
    """Whether `_refuse` has nothing to say, asked in the fewest steps: a head has a hundred parameters."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not torch.strided or x.shape != shape:
        return False
    return x.device == like.device and (x.dtype in FLOATING if cast else x.dtype == like.dtype)


def _refuse(name: str, x: Any, shape: tuple[int, ...], like: Tensor) -> NoReturn:
    check_tensor(name, x, str(shape), len(shape))
    if x.shape != shape:
        raise ValueError(f"{name} must be {shape}, got shape {tuple(x.shape)}")
    check_device(name, x, "features", like)
    raise ValueError(f"{name} must be of features' type, {like.dtype}, got {x.dtype}")
