"""Our operators for PyTorch's older exporter to ONNX (`torch.onnx.export(dynamo=False)`), which traces TorchScript.

Forks of YOLO and many tools call it still. What a DyHead has is here: deformable convolution and dynamic ReLU. Whole
detectors, and the paper's formulation with open sizes, whose pooling it refuses, are for the newer exporter
(`heads/onnx/translation.py`).
"""

from typing import Any

import torch
from torch.onnx import register_custom_op_symbolic, symbolic_helper

# The first with DeformConv, and the last that this exporter writes for most models; 20 is its very last.
OPSET = 19


def register_symbolics() -> None:
    """Make `torch.onnx.export(..., dynamo=False, opset_version=19)` know our operators, for the rest of the process.

    Example:
        >>> import io, torch
        >>> from heads import DyHead
        >>> from heads.onnx import register_symbolics
        >>> register_symbolics()
        >>> head, pyramid = DyHead(16, depth=1).eval(), [torch.rand(1, 16, s, s) for s in (8, 4)]
        >>> torch.onnx.export(head, (pyramid,), io.BytesIO(), dynamo=False, opset_version=19)
    """
    # Registers the operators.
    import kernels  # noqa: F401

    register_custom_op_symbolic("dyhead::deform_conv2d", _deform_conv2d, OPSET)
    register_custom_op_symbolic("dyhead::dynamic_relu", _dynamic_relu, OPSET)


def _deform_conv2d(
    g: Any,
    inputs: Any,
    offsets: Any,
    masks: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    backend: Any,
) -> Any:
    levels, all_offsets, all_masks = (symbolic_helper._unpack_list(values) for values in (inputs, offsets, masks))
    stride, padding, dilation = (symbolic_helper._maybe_get_const(pair, "is") for pair in (stride, padding, dilation))
    outputs, share, *kernel = symbolic_helper._get_tensor_sizes(weight)
    if symbolic_helper._is_none(bias):
        bias = g.op("CastLike", g.op("Constant", value_t=torch.zeros(outputs)), weight)
    found = []
    for level, (x, offset) in enumerate(zip(levels, all_offsets, strict=True)):
        # With open sizes this exporter loses those that are known, too. One group is what nearly all have; a model
        # with more is then refused by what runs it, as its sizes do not fit.
        channels = symbolic_helper._get_tensor_dim_size(x, 1) or share
        own = symbolic_helper._get_tensor_dim_size(offset, 1) or 2 * kernel[0] * kernel[1]
        found.append(
            g.op(
                "DeformConv",
                *(x, weight, offset, bias, *all_masks[level : level + 1]),
                kernel_shape_i=kernel,
                strides_i=stride,
                pads_i=list(padding) * 2,
                dilations_i=dilation,
                group_i=channels // share,
                offset_group_i=own // (2 * kernel[0] * kernel[1]),
            )
        )
    return g.op("prim::ListConstruct", *found)


def _dynamic_relu(g: Any, input: Any, coefficients: Any, backend: Any) -> Any:
    x, lines = (g.op("Cast", value, to_i=1) for value in (input, coefficients))
    lines = g.op("Unsqueeze", lines, g.op("Constant", value_t=torch.tensor([3, 4])))
    rows = [g.op("Gather", lines, g.op("Constant", value_t=torch.tensor(i)), axis_i=1) for i in range(4)]
    a1, b1, a2, b2 = rows
    first, second = (g.op("Add", g.op("Mul", a, x), b) for a, b in ((a1, b1), (a2, b2)))
    return g.op("CastLike", g.op("Max", first, second), input)
