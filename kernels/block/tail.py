"""The tail of a DyHead block: from the convolutions' outputs of all levels to the block's output, as two functions.

GroupNorm, upsampling, scale attention, the mean over a level's maps and the dynamic ReLU are, for one image and
channel, two lines of a linear combination of pixels, with coefficients that depend on the maps only through three
numbers of each: its mean, its variance, and its mean after upsampling. So the tail is `statistics`, a small computation
on (N, C) tensors, `kernels.block.coefficients`, and `tail`. On the way back `tail` gives the gradients of the
coefficients, the small computation those of the statistics, and `statistics` the whole gradient of the maps, for which
`tail` has left it the gradient in front of the coefficients. Sums are float32 (float64 for float64 maps), taken in an
order that shapes alone decide.
"""

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import INTERPRET
from kernels.block import tail_kernels as kernels
from kernels.block.layout import Layout, layout
from kernels.runtime.compile_spec import CompileSpec
from kernels.runtime.launch import Launch, real, steps, triton_real

# Elements of one program. The interpreter's time is that of its programs' number, hardly of their size.
_FORWARD, _SUMS, _MAPS = (8192, 4096, 8192) if INTERPRET else (2048, 1024, 2048)
_SUMS_STEPS = 2 if INTERPRET else 16
_MERGED = 64


class Link:
    """What the way back of `tail` leaves for that of `statistics`; one for each use of the two."""

    def __init__(self):
        self.left = None


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sampled, partial, layout, link):
        partial = _statistics(sampled, layout) if partial is None else partial
        statistics = _merge(partial, layout)
        ctx.layout, ctx.link = layout, link
        ctx.save_for_backward(sampled, statistics)
        return statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_m, coefficients = ctx.link.left
        ctx.link.left = None
        sampled, statistics = ctx.saved_tensors
        return (
            _backward_maps(grad_m, sampled, coefficients, statistics, grad.contiguous(), ctx.layout),
            None,
            None,
            None,
        )


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sampled, coefficients, rectified, layout, link):
        ctx.rectified, ctx.layout, ctx.link = rectified, layout, link
        ctx.save_for_backward(sampled, coefficients)
        return _forward(sampled, coefficients, rectified, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        sampled, coefficients = ctx.saved_tensors
        grad_m, grad_coefficients = _backward_sums(grad.contiguous(), sampled, coefficients, ctx.rectified, ctx.layout)
        ctx.link.left = grad_m, coefficients
        return None, grad_coefficients, None, None, None


def statistics(sampled: Tensor, partial: Tensor | None, layout: Layout, link: Link) -> Tensor:
    """Mean, biased variance and mean after upsampling of every channel of every sampled map.

    Its backward gives the whole gradient of `sampled`, that of the `tail` with the same `link` included, so the result
    must be used for that tail's coefficients and for nothing else.

    Args:
        sampled: (Q, C), see `kernels.block.layout`.
        partial: (tiles, 3, C) as the convolution leaves it, or None.

    Returns:
        (3, L, 3, N, C), float32 or float64: kind, level, branch, image, channel; zeros for maps that do not exist.
    """
    return _Statistics.apply(sampled, partial, layout, link)


def tail(sampled: Tensor, coefficients: Tensor, rectified: bool, layout: Layout, link: Link) -> Tensor:
    """The larger of two lines of a linear combination of a level's sampled maps, of every level.

    m = A0 * same + A1 * finer + A2 * upsampled coarser + D, bilinear with corners aligned; then max(a1 m + b1, a2 m +
    b2). A tie gives half of the gradient to each line, as in `dynamic_relu`.

    Args:
        sampled: (Q, C), see `kernels.block.layout`; its gradient comes from `statistics`.
        coefficients: (L, N, 8, C) of the statistics' type: A0, A1, A2, D, a1, b1, a2, b2; or (L, N, 4, C) for an
            ordinary ReLU, whose gradient at 0 is 0, or for none.
        rectified: whether four coefficients mean a ReLU.

    Returns:
        (P, C) in the type of `sampled`.
    """
    return _Tail.apply(sampled.detach(), coefficients, rectified, layout, link)


def _block_c(channels: int) -> int:
    return min(256, triton.next_power_of_2(channels))


def _common(sampled: Tensor, layout: Layout, elements: int) -> tuple[dict, dict, int, int]:
    channels = sampled.shape[1]
    block = _block_c(channels)
    constants = {"C": channels, "BLOCK_C": block, "REAL": triton_real(sampled.dtype)}
    return {"sampled": sampled, "axes": layout.axes}, constants, max(1, elements // block), triton.cdiv(channels, block)


def _statistics_launch(sampled: Tensor, partial: Tensor, layout: Layout) -> Launch:
    arguments, constants, _, _ = _common(sampled, layout, 1)
    constants |= {"BLOCK_C": min(32, constants["BLOCK_C"]), "TILE_H": layout.tile[0], "TILE_W": layout.tile[1]}
    work = layout.tiles()
    grid = (len(work), triton.cdiv(sampled.shape[1], constants["BLOCK_C"]))
    arguments |= {"partial": partial, "problems": layout.table, "work": work}
    return Launch(kernels.statistics_kernel, grid, arguments, constants)


def _statistics(sampled: Tensor, layout: Layout) -> Tensor:
    partial = sampled.new_empty((len(layout.tiles()), 3, sampled.shape[1]), dtype=layout.real)
    _statistics_launch(sampled, partial, layout).run()
    return partial


def _merge_launch(partial: Tensor, statistics: Tensor, layout: Layout) -> Launch:
    block = min(32, _block_c(partial.shape[2]))
    grid = (len(layout.slots), triton.cdiv(partial.shape[2], block))
    tables = {"problems": layout.table, "slots": layout.slots, "count": len(layout.slots)}
    constants = {
        "C": partial.shape[2],
        "STEPS": steps(layout.most_tiles, _MERGED),
        "TILE_H": layout.tile[0],
        "TILE_W": layout.tile[1],
        "BLOCK_T": _MERGED,
        "BLOCK_C": block,
        "REAL": triton_real(partial.dtype),
    }
    return Launch(kernels.merge_kernel, grid, {"partial": partial, "statistics": statistics} | tables, constants)


def _merge(partial: Tensor, layout: Layout) -> Tensor:
    statistics = partial.new_empty((3, len(layout.sizes), 3, layout.batch, partial.shape[2]))
    _merge_launch(partial, statistics, layout).run()
    return statistics


def _forward_launch(sampled: Tensor, coefficients: Tensor, out: Tensor, rectified: bool, layout: Layout) -> Launch:
    arguments, constants, pixels, blocks = _common(sampled, layout, _FORWARD)
    work = layout.runs(pixels)
    arguments |= {"coefficients": coefficients, "out": out, "levels": layout.levels, "work": work}
    constants |= {"KINDS": coefficients.shape[2], "RECTIFIED": rectified, "PIXELS": pixels}
    return Launch(kernels.forward_kernel, (len(work), blocks), arguments | {"batch": layout.batch}, constants)


def _forward(sampled: Tensor, coefficients: Tensor, rectified: bool, layout: Layout) -> Tensor:
    out = sampled.new_empty((layout.rows, sampled.shape[1]))
    _forward_launch(sampled, coefficients, out, rectified, layout).run()
    return out


def _sums_launch(grad, sampled, coefficients, grad_m, partial, rectified: bool, layout: Layout) -> Launch:
    arguments, constants, pixels, blocks = _common(sampled, layout, _SUMS)
    work = layout.runs(pixels * _SUMS_STEPS)
    arguments |= {"grad": grad, "coefficients": coefficients, "grad_m": grad_m, "partial": partial}
    arguments |= {"levels": layout.levels, "work": work, "batch": layout.batch}
    constants |= {"KINDS": coefficients.shape[2], "RECTIFIED": rectified, "STEPS": _SUMS_STEPS, "PIXELS": pixels}
    return Launch(kernels.backward_sums_kernel, (len(work), blocks), arguments, constants)


def _add_launch(partial: Tensor, total: Tensor, bounds: Tensor, most: int) -> Launch:
    size = partial[0].numel()
    block, rows = min(64, triton.next_power_of_2(size)), 32
    constants = {"SIZE": size, "STEPS": steps(most, rows), "BLOCK_T": rows, "BLOCK_C": block}
    constants["REAL"] = triton_real(partial.dtype)
    # The second axis of a grid ends at 65,535, which the blocks of a wide convolution's weight are beyond.
    grid = (triton.cdiv(size, block), len(bounds))
    return Launch(kernels.add_kernel, grid, {"partial": partial, "total": total, "bounds": bounds}, constants)


def add_runs(partial: Tensor, bounds: Tensor, most: int, dtype: torch.dtype) -> Tensor:
    """Sums of consecutive rows, in an order that shapes alone decide.

    Args:
        partial: (rows, ...).
        bounds: (sums, 2) int32: the first row of every sum and how many it has.
        most: how many rows a sum has at most.

    Returns:
        (sums, ...) of type `dtype`.
    """
    total = partial.new_empty((len(bounds), *partial.shape[1:]), dtype=dtype)
    _add_launch(partial, total, bounds, most).run()
    return total


def _backward_sums(grad, sampled, coefficients, rectified: bool, layout: Layout) -> tuple[Tensor, Tensor]:
    pixels = _common(sampled, layout, _SUMS)[2] * _SUMS_STEPS
    grad_m = torch.empty_like(grad)
    partial = coefficients.new_empty((len(layout.runs(pixels)), *coefficients.shape[2:]))
    _sums_launch(grad, sampled, coefficients, grad_m, partial, rectified, layout).run()
    most = max(triton.cdiv(h * w, pixels) for h, w in layout.sizes)
    total = add_runs(partial, layout.run_bounds(pixels), most, coefficients.dtype)
    return grad_m, total.view_as(coefficients)


def _maps_launch(grad_m, sampled, coefficients, statistics, grad_statistics, grad_sampled, layout: Layout) -> Launch:
    arguments, constants, pixels, blocks = _common(sampled, layout, _MAPS)
    work = layout.sampled_runs(pixels)
    arguments |= {"grad_m": grad_m, "coefficients": coefficients, "statistics": statistics}
    arguments |= {"grad_statistics": grad_statistics, "grad_sampled": grad_sampled, "firsts": layout.firsts}
    arguments |= {"problems": layout.table, "work": work, "batch": layout.batch, "slots": len(layout.slots)}
    constants |= {"KINDS": coefficients.shape[2], "SPAN": layout.span, "PIXELS": pixels}
    return Launch(kernels.backward_maps_kernel, (len(work), blocks), arguments, constants)


def _backward_maps(grad_m, sampled, coefficients, statistics, grad_statistics, layout: Layout) -> Tensor:
    grad_sampled = torch.empty_like(sampled)
    _maps_launch(grad_m, sampled, coefficients, statistics, grad_statistics, grad_sampled, layout).run()
    return grad_sampled


def compile_specs() -> list[CompileSpec]:
    """The kernels as they run on the levels of 800x1333 pixels, batch 8, with 256 channels."""
    specs = []
    sizes = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        meta = {"device": "meta", "dtype": real(dtype)}
        found = layout(sizes, 8, torch.device("meta"), real(dtype))
        sampled = torch.empty(found.sampled_rows, 256, dtype=dtype, device="meta")
        maps = torch.empty(found.rows, 256, dtype=dtype, device="meta")
        partial, statistics = torch.empty(1, 3, 256, **meta), torch.empty(3, 5, 3, 8, 256, **meta)
        specs.append(_statistics_launch(sampled, partial, found).spec("block statistics", dtype))
        if dtype == torch.float32:
            specs.append(_merge_launch(partial, statistics, found).spec("block merge", dtype))
        for kinds, rectified, name in ((8, False, ""), (4, True, " relu")):
            coefficients = torch.empty(5, 8, kinds, 256, **meta)
            sums = torch.empty(1, kinds, 256, **meta)
            launch = _forward_launch(sampled, coefficients, maps, rectified, found)
            specs.append(launch.spec(f"block tail forward{name}", dtype))
            launch = _sums_launch(maps, sampled, coefficients, maps, sums, rectified, found)
            specs.append(launch.spec(f"block tail backward sums{name}", dtype))
            if kinds == 8 and dtype == torch.float32:
                bounds = found.run_bounds(64)
                specs.append(_add_launch(sums, coefficients, bounds, 263).spec("block add", dtype))
        coefficients = torch.empty(5, 8, 8, 256, **meta)
        launch = _maps_launch(maps, sampled, coefficients, statistics, statistics, sampled, found)
        specs.append(launch.spec("block tail backward maps", dtype))
    return specs
