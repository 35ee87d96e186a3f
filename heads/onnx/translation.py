"""The table that `torch.onnx.export(dynamo=True)` takes; what stands in it is written in `heads/onnx/operators.py`."""

from collections.abc import Callable
from typing import Any

import torch

# Registers the operators of the table.
import kernels  # noqa: F401


def onnx_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What to give `torch.onnx.export(..., dynamo=True, opset_version=20, custom_translation_table=...)`.

    The name is the one that torchvision proposes for the table of its own operators; the two can be joined with `|`.

    Returns:
        From each operator to the function that writes it in ONNX.

    Raises:
        ImportError: onnxscript is not installed.

    Example:
        >>> import torch
        >>> from heads import DyHead
        >>> from heads.onnx import onnx_translation_table
        >>> head, pyramid = DyHead(16, depth=1).eval(), [torch.rand(1, 16, s, s) for s in (8, 4)]
        >>> table = onnx_translation_table()
        >>> program = torch.onnx.export(
        ...     head, (pyramid,), dynamo=True, opset_version=20, verbose=False, custom_translation_table=table
        ... )
        >>> sum(node.op_type == "DeformConv" for node in program.model.graph)
        4
    """
    try:
        from heads.onnx import operators
    except ImportError as error:
        raise ImportError("export to ONNX needs onnxscript: pip install 'dyhead-lab[onnx]'") from error
    ours, aten = torch.ops.dyhead, torch.ops.aten
    return {
        ours.deform_conv2d.default: operators.deform_conv2d,
        ours.dynamic_relu.default: operators.dynamic_relu,
        ours.roi_align.default: operators.roi_align,
        ours.border_align.default: operators.border_align,
        ours.nms.default: operators.nms,
        ours.nms_mask.default: operators.nms_mask,
        aten._adaptive_avg_pool2d.default: operators.adaptive_average_pool,
        aten.sort.stable: operators.stable_sort,
        aten.scaled_dot_product_attention.default: operators.attention,
    }
