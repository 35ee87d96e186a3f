"""Which stacks of DyHead blocks `kernels.dyhead_blocks` runs, and what it takes of their modules."""

import torch
from torch import Tensor, nn

from heads.dyhead.attention import GROUPS, ScaleAttention, SpatialAttention, TaskAttention
from kernels import BlockParameters
from kernels.block.dyhead_block import unfused_reason


def reason_against(blocks: nn.ModuleList, features: list[Tensor]) -> str | None:
    """Why these blocks, of the released formulation, cannot run fused on these levels; None if they can."""
    device = features[0].device
    reason = unfused_reason(features)
    if reason is not None:
        return reason
    parameters = [p for block in blocks for p in block.parameters()]
    # A kernel would read the memory of another device; PyTorch's operators say what is wrong.
    if any(p.device != device for p in parameters):
        return "parameters are on another device than the levels"
    kinds = {x.dtype for x in features} | {p.dtype for p in parameters}
    if not torch.is_autocast_enabled(device.type) and len(kinds) > 1:
        return f"levels and parameters have several types: {', '.join(sorted(map(str, kinds)))}"
    for block in blocks:
        spatial, scale, task = block.spatial, block.scale, block.task
        if (
            type(spatial) is not SpatialAttention
            or type(scale) is not ScaleAttention
            or not isinstance(task, TaskAttention | nn.Identity)
        ):
            return f"a block is made of {', '.join(type(part).__name__ for part in (spatial, scale, task))}"
        layers = [scale.gate, *(getattr(task, name, None) for name in ("reduce", "expand"))]
        pairs: list[tuple[object, type]] = [(layer, nn.Linear) for layer in layers] + [(spatial.offset, nn.Conv2d)]
        for layer, kind in pairs:
            if layer is not None and type(layer) is not kind:
                return f"a layer of a block is a {type(layer).__name__} and not a {kind.__name__}"
        if len({branch.norm.eps for branch in spatial.branches}) > 1:
            return "the GroupNorms of a block differ in eps"
    return None


def parameters(block: nn.Module) -> BlockParameters:
    """What `kernels.dyhead_blocks` takes of a `ReleasedBlock`."""
    spatial, scale, task = block.spatial, block.scale, block.task
    assert isinstance(spatial, SpatialAttention) and isinstance(scale, ScaleAttention)
    branches = spatial.branches
    dynamic_relu = None
    if isinstance(task, TaskAttention) and task.learned:
        dynamic_relu = (*_layer(task.reduce), *_layer(task.expand))
    return BlockParameters(
        weights=[branch.weight for branch in branches],
        norm_weights=[branch.norm.weight for branch in branches],
        norm_biases=[branch.norm.bias for branch in branches],
        biases=[branch.bias for branch in branches],
        offset=None if spatial.offset is None else _layer(spatial.offset),
        gate=None if scale.gate is None else _layer(scale.gate),
        dynamic_relu=dynamic_relu,
        relu=isinstance(task, TaskAttention),
        coarse_offsets=spatial.coarse_offsets,
        groups=GROUPS,
        eps=branches[0].norm.eps,
    )


def _layer(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight, layer.bias
