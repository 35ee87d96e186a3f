"""A stack of released DyHead blocks on the fused kernels: all levels in one launch, pyramids as one matrix in between.

GroupNorm, scale attention, the mean over a level's maps and dynamic ReLU depend on the maps through their means and
variances only, so that between a convolution and one elementwise kernel stands a small computation on (N, C) tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heads.dyhead.attention import GROUPS, TAPS, ScaleAttention, SpatialAttention, TaskAttention
from kernels.backend import INTERPRET, resolve_backend


def reason_against(blocks: Sequence[nn.Module], features: list[Tensor]) -> str | None:
    """Why these blocks, of the released formulation, cannot run fused on these levels; None if they can."""
    device = features[0].device
    if not (device.type == "cuda" or (device.type == "cpu" and INTERPRET)) or resolve_backend(device) != "triton":
        return f"tensors on the device {device.type!r} take the plain PyTorch path; kernels.use_backend selects another"
    if torch.compiler.is_compiling():
        return "torch.compile traces the separate operators"
    if any(x.shape[:2] != features[0].shape[:2] or x.device != device or x.numel() == 0 for x in features):
        return "the levels differ in batch, channels or device, or are empty"
    parameters = [p for block in blocks for p in block.parameters()]
    # A kernel would read the memory of another device; PyTorch's operators say what is wrong.
    if any(p.device != device for p in parameters):
        return "parameters are on another device than the levels"
    kinds = {x.dtype for x in features} | {p.dtype for p in parameters}
    if not torch.is_autocast_enabled(device.type) and len(kinds) > 1:
        return f"levels and parameters have several types: {', '.join(sorted(map(str, kinds)))}"
    for block in blocks:
        parts = (block.spatial, block.scale, block.task)
        if [type(part) for part in parts[:2]] != [SpatialAttention, ScaleAttention] or not isinstance(
            block.task, TaskAttention | nn.Identity
        ):
            return f"a block is made of {', '.join(type(part).__name__ for part in parts)}"
        layers = [block.scale.gate, *(getattr(block.task, name, None) for name in ("reduce", "expand"))]
        pairs = [(layer, nn.Linear) for layer in layers] + [(block.spatial.offset, nn.Conv2d)]
        for layer, kind in pairs:
            if layer is not None and type(layer) is not kind:
                return f"a layer of a block is a {type(layer).__name__} and not a {kind.__name__}"
        if len({branch.norm.eps for branch in block.spatial.branches}) > 1:
            return "the GroupNorms of a block differ in eps"
    from kernels.block.layout import pyramid_mismatch

    return pyramid_mismatch(tuple(x.shape[-2:] for x in features))


def forward(blocks: Sequence[nn.Module], features: list[Tensor]) -> list[Tensor]:
    """What the blocks compute one after another: a list of (N, C, H_l, W_l) -> the same shapes, channels last.

    Under autocast maps are in its type, while statistics, gates and coefficients stay float32.
    """
    from kernels.block.conv import tile
    from kernels.block.layout import join, layout
    from kernels.runtime.launch import real

    device = features[0].device
    if torch.is_autocast_enabled(device.type):
        features = [x.to(torch.get_autocast_dtype(device.type)) for x in features]
    sizes = tuple(tuple(x.shape[-2:]) for x in features)
    batch, channels, dtype = *features[0].shape[:2], features[0].dtype
    tiles = tile(dtype, device, channels)
    tables = layout(sizes, batch, device, real(dtype), (tiles.height, tiles.width))
    pyramid = join(features)
    for block in blocks:
        pyramid = _block(block, pyramid, tables)
    return tables.split(pyramid)


def _block(block: nn.Module, pyramid: Tensor, tables) -> Tensor:
    from kernels.block.tail import Link, statistics, tail

    sampled, partial = _convolve(block.spatial, pyramid, tables)
    link = Link()
    numbers = statistics(sampled, partial, tables, link)
    coefficients = _coefficients(block, numbers, tables.share)
    return tail(sampled, coefficients, isinstance(block.task, TaskAttention), tables, link)


def _convolve(spatial: SpatialAttention, pyramid: Tensor, tables) -> tuple[Tensor, Tensor | None]:
    """The sampled maps, without the convolutions' biases, and what `statistics` needs of them where it is known."""
    from kernels.block.conv import convolve
    from kernels.block.layout import join
    from kernels.block.offset import predict

    same, finer, coarser = spatial.branches
    if spatial.offset is None:
        features = tables.split(pyramid)
        maps = same.convolve(features, None, None, None) + finer.convolve(features[:-1], None, None, None)
        return join(maps + coarser.convolve(features[1:], None, None, None)), None
    predicted = predict(pyramid, spatial.offset.weight, spatial.offset.bias, tables)
    crop = spatial.coarse_offsets == "crop"
    # Offsets and masks of a coarser neighbour that are no corner of the level's get rows of their own.
    if not crop:
        offsets, masks = predicted[:, : 2 * TAPS], predicted[:, 2 * TAPS :].sigmoid()
        coarser_maps = zip(*spatial.for_coarser(tables.split(offsets), tables.split(masks)), strict=True)
        own = tables.split(torch.cat([offsets, masks], 1))
        predicted = join(own + [torch.cat(pair, 1) for pair in coarser_maps])
    weights = [branch.weight for branch in spatial.branches]
    return convolve(pyramid, predicted, weights, crop, crop, tables)


def _coefficients(block: nn.Module, numbers: Tensor, share: Tensor) -> Tensor:
    """From (3, L, 3, N, C) means, variances, means after upsampling to the (L, N, 8 or 4, C) that `tail` takes."""
    from kernels.block.coefficients import coefficients

    norms = [(branch.norm.weight, branch.norm.bias, branch.bias) for branch in block.spatial.branches]
    gate, task, network = block.scale.gate, block.task, None
    if isinstance(task, TaskAttention) and not task.static:
        network = task.reduce.weight, task.reduce.bias, task.expand.weight, task.expand.bias
    gate = None if gate is None else (gate.weight, gate.bias)
    return coefficients(numbers, share, norms, gate, network, GROUPS, block.spatial.from_same.norm.eps)
