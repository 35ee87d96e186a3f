"""Every kernel in every configuration that is shipped, for ahead-of-time compilation: launches on `meta` tensors.

Sizes are those of images of 800x1333 pixels, batch 8, with 256 channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.block import coefficients, conv, offset, tail
from kernels.block.layout import Layout, layout
from kernels.deform_conv import launch as deform_conv
from kernels.dynamic_relu import launch as dynamic_relu
from kernels.regions import border_align_kernels as border_align
from kernels.regions import nms_kernels as nms
from kernels.regions import roi_align_kernels as roi_align
from kernels.runtime.compile_spec import CompileSpec
from kernels.runtime.launch import real
from kernels.runtime.tiles import assuming
from kernels.sampling import inverse
from kernels.sampling import launch as sampling
from kernels.sampling.inverse import Bins
from kernels.sampling.inverse_kernels import Index

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# P3 to P7, padded to a multiple of 32.
SIZES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
BATCH, CHANNELS = 8, 256


# How the GPUs that are compiled for multiply matrices, `kernels.runtime.tiles.family`.
FAMILIES = {"sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma", "sm_100": "wgmma", "sm_120": "mma", "gfx942": "mfma"}


def all_specs(target: str = "sm_90") -> list[CompileSpec]:
    """The kernels of every operator, with the tiles they have on a GPU of `FAMILIES`."""
    with assuming(FAMILIES[target]):
        specs = [spec for dtype in DTYPES for spec in _deform_conv(dtype)]
        specs += [spec for dtype in (*DTYPES, torch.float64) for spec in _dynamic_relu(dtype)]
        for operator in (_tail, _coefficients, _convolutions, _offsets, _roi_align, _border_align, _nms):
            specs += [spec for dtype in DTYPES for spec in operator(dtype)]
    return specs


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _deform_conv(dtype: torch.dtype) -> Iterator[CompileSpec]:
    """On P3, channels last, with 256 and (in pieces) 512 outputs."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)

    height, width = SIZES[0]
    x, offset, mask = (new(BATCH, channels, height, width) for channels in (CHANNELS, 18, 9))
    bins = Bins(None, 16, 0, 0)
    sums, numbers = _meta(1, 4, dtype=real(dtype)), _meta(16, dtype=torch.int32)
    for outputs, suffix in ((256, ""), (512, " in pieces")):
        weight, out = new(outputs, CHANNELS, 3, 3), new(BATCH, outputs, height, width)
        (level,) = deform_conv.levels([x], [offset], [mask], weight, [1, 1], [1, 1], [1, 1])
        plan, rest = sampling.new_plan(level.x, 1), (level.shape, level.maps)
        points = sampling.samples_launch(out, level.x, weight, plan, sums, sums, *rest)
        yield points.spec(f"deform_conv2d backward samples and map{suffix}", dtype, uses_dot=True)
        gather = inverse.gather_launch(out, weight, plan, Index(numbers, numbers), level.x, bins, 9, *rest)
        yield gather.spec(f"deform_conv2d backward gather{suffix}", dtype, uses_dot=True)
        if outputs == 256:
            geometry = (level.shape, level.geometry, level.maps)
            yield deform_conv.plan_launch(offset, mask, plan, *geometry).spec("deform_conv2d plan", dtype)
            points = deform_conv.gradients_launch(sums, offset, mask, offset, mask, *geometry)
            yield points.spec("deform_conv2d backward points", dtype)
            keys = inverse.bins_launch(level.x, plan, numbers, bins, 16, *rest)
            yield keys.spec("deform_conv2d backward bins", dtype)
            forward = sampling.forward_launch(level.x, weight, weight, plan, out, None, *rest)
            yield forward.spec("deform_conv2d forward", dtype, uses_dot=True)
            samples = sampling.samples_launch(out, level.x, weight, plan, sums, None, *rest)
            yield samples.spec("deform_conv2d backward samples", dtype, uses_dot=True)
            parts = sampling.weight_launch(out, level.x, plan, sums, None, 64, *rest)
            yield parts.spec("deform_conv2d backward weight", dtype, uses_dot=True)
            partial = _meta(4, 256, 9, 256, dtype=real(dtype))
            yield sampling.sum_launch(partial, (weight,), None).spec("deform_conv2d backward weight sum", dtype)


def _dynamic_relu(dtype: torch.dtype) -> Iterator[CompileSpec]:
    """On P3, in both layouts."""
    coefficients = _meta(BATCH, 4, CHANNELS, dtype=dtype)
    for memory, name in ((torch.channels_last, "channels_last"), (torch.contiguous_format, "contiguous")):
        x = torch.empty((BATCH, CHANNELS, *SIZES[0]), dtype=dtype, device="meta", memory_format=memory)
        yield dynamic_relu.forward_launch(x, x, coefficients).spec(f"dynamic_relu forward {name}", dtype)
        partial = _meta(1, dtype=real(dtype))
        backward = dynamic_relu.backward_launch(x, x, x, coefficients, partial)
        yield backward.spec(f"dynamic_relu backward {name}", dtype)


def _pyramid(dtype: torch.dtype, *tile: tuple[int, int]) -> tuple[Layout, Tensor, Tensor, Tensor]:
    """The layout of a block's levels; matrices of the levels, of the sampled maps and of the predictions."""
    rows = layout(SIZES, BATCH, torch.device("meta"), real(dtype), *tile)
    sizes = ((rows.rows, CHANNELS), (rows.sampled_rows, CHANNELS), (rows.rows, 27))
    pyramid, sampled, predicted = (_meta(*size, dtype=dtype) for size in sizes)
    return rows, pyramid, sampled, predicted


def _tail(dtype: torch.dtype) -> Iterator[CompileSpec]:
    rows, pyramid, sampled, _ = _pyramid(dtype)
    for name, launch in tail.launches(pyramid, sampled, rows, 8, False).items():
        yield launch.spec(f"block {name}", dtype)
    relu = tail.launches(pyramid, sampled, rows, 4, True)
    for name in ("tail forward", "tail backward sums", "tail backward maps"):
        yield relu[name].spec(f"block {name} relu", dtype)


def _coefficients(dtype: torch.dtype) -> Iterator[CompileSpec]:
    """`dtype` is that of the parameters."""

    def new(*shape: int) -> Tensor:
        return _meta(*shape, dtype=dtype)

    def sums(*shape: int) -> Tensor:
        return _meta(*shape, dtype=real(dtype))

    rows = _pyramid(dtype)[0]
    levels, hidden = len(SIZES), CHANNELS // 4
    vector, statistics = new(CHANNELS), sums(3, levels, 3, BATCH, CHANNELS)
    gate = new(1, CHANNELS), new(1)
    network = new(hidden, CHANNELS), new(hidden), new(4 * CHANNELS, hidden), new(4 * CHANNELS)
    unbiased = *[vector] * 6, None, None, None
    variants: dict[str, tuple[Tensor | None, ...]] = {"": (*unbiased, *gate, *network)}
    # The others are nearly the same code or less of it, and differ by type in their loads alone.
    if dtype == torch.float32:
        variants |= {" biased": (*[vector] * 9, *gate, *network), " relu": (*unbiased, *gate, *[None] * 4)}
    for name, parameters in variants.items():
        lines = sums(levels, BATCH, 4 if parameters[-1] is None else 8, CHANNELS)
        saved = coefficients.Saved(lines, sums(levels, BATCH, CHANNELS), statistics, parameters)
        forward = coefficients.forward_launch(sums(1), saved, 16, 1e-5, tail.counters(rows), rows)
        yield forward.spec(f"block coefficients forward{name}", dtype)
        bounds = _meta(levels * BATCH, 2, dtype=torch.int32)
        backward = coefficients.backward_launch(sums(1), bounds, saved, statistics, sums(1), 16, 1e-5, rows)
        yield backward.spec(f"block coefficients backward{name}", dtype)


def _convolutions(dtype: torch.dtype) -> Iterator[CompileSpec]:
    tile = conv.tile(_meta(1, CHANNELS, dtype=dtype))
    rows, pyramid, sampled, predicted = _pyramid(dtype, tile)
    plain = ("plan", "backward points", "backward bins", "backward weight sum")
    for name, launch in conv.launches(pyramid, predicted, sampled, rows).items():
        yield launch.spec(f"block convolutions {name}", dtype, uses_dot=name not in plain)


def _offsets(dtype: torch.dtype) -> Iterator[CompileSpec]:
    rows, pyramid, _, predicted = _pyramid(dtype)
    for name, launch in offset.launches(pyramid, predicted, rows).items():
        yield launch.spec(f"block offsets {name}", dtype, uses_dot=True)


def _roi_align(dtype: torch.dtype) -> Iterator[CompileSpec]:
    """On P2: 7x7 bins of 512 boxes for each image."""
    x, gradient = (_meta(BATCH, 200, 336, CHANNELS, dtype=kind).permute(0, 3, 1, 2) for kind in (dtype, real(dtype)))
    boxes, images = _meta(4096, 4, dtype=real(dtype)), _meta(4096, dtype=torch.int32)
    rows = _meta(4096, 7, 7, CHANNELS, dtype=real(dtype)).permute(0, 3, 1, 2)
    yield roi_align.forward_launch(x, rows, boxes, images, 0, True).spec("roi_align forward", dtype)
    # Gradients have the type of the output, which is float32 for all three.
    if dtype == torch.float32:
        yield roi_align.backward_launch(rows, gradient, boxes, images, 0, True).spec("roi_align backward", dtype)


def _border_align(dtype: torch.dtype) -> Iterator[CompileSpec]:
    """On P3, with a box for each cell and 256 channels a border."""
    height, width = SIZES[0]
    boxes = height * width
    # The features are four of five parts of a map.
    x = _meta(BATCH, height, width, 5 * CHANNELS, dtype=dtype).permute(0, 3, 1, 2)[:, : 4 * CHANNELS]
    corners = _meta(BATCH, boxes, 4, dtype=torch.float32)
    out, chosen = (_meta(BATCH, boxes, 4, CHANNELS, dtype=kind) for kind in (dtype, torch.uint8))
    yield border_align.forward_launch(x, out, chosen, corners, 10).spec("border_align forward", dtype)
    gradient = _meta(BATCH, height, width, 4 * CHANNELS, dtype=torch.float32).permute(0, 3, 1, 2)
    yield border_align.backward_launch(out, chosen, gradient, corners, 10).spec("border_align backward", dtype)


def _nms(dtype: torch.dtype) -> Iterator[CompileSpec]:
    """5,000 boxes with labels, and the walk over as many as there may be."""
    for n, suffix in ((5000, ""), (2**15, " of many")):
        boxes, order = _meta(n, 4, dtype=dtype), _meta(n, dtype=torch.int64)
        matrix = _meta(n, -(-n // 64), dtype=torch.int64)
        if not suffix:
            yield nms.overlap_launch(boxes, order, order, matrix, 0.5).spec("nms overlaps", dtype)
        # The walk has no tensor of this type.
        if dtype == torch.float32:
            yield nms.walk_launch(matrix, order, order[:1000], order[:1]).spec(f"nms walk{suffix}", dtype)
