"""What PyTorch's exporter to ONNX (`torch.onnx.export(dynamo=True)`) makes of our operators: standard ones alone.

| operator | in ONNX | opset |
|---|---|---|
| `deform_conv2d` | DeformConv, one a level | 19 |
| `dynamic_relu` | Mul, Add, Max | 13 |
| `roi_align` | RoiAlign; boxes of no image are emptied before and set to 0 behind it | 16 |
| `border_align` | GridSample and Max, once for each step along a border | 20 |
| `nms` | NonMaxSuppression with a row of scores for each label, then TopK for the order | 11 |
| `nms_mask` | NonMaxSuppression and ScatterND | 13 |
| PyTorch's adaptive average pooling to a size that is not known | two matrix products | 13 |
| PyTorch's stable sort | TopK, which is stable | 11 |
| PyTorch's attention | MatMul, Softmax, MatMul | 13 |

Numbers that are not finite keep none of our promises there, but for boxes of RoIAlign, which could crash a program.
"""

from collections.abc import Sequence
from typing import Any

from onnxscript import opset20

# Its methods are typed for those who write functions in ONNX's own types.
op: Any = opset20
# Types of ONNX, by its numbers (`onnx.TensorProto`).
FLOAT, UINT8, INT64, BOOL = 1, 2, 7, 9
# Below all scores that a box may have, and below that.
LEAST, NONE = -3e38, -3.4e38


def ints(*numbers: Any) -> Any:
    """(n,) int64 of numbers, some of which may be values."""
    if all(isinstance(number, int) for number in numbers):
        return op.Constant(value_ints=list(numbers))
    return op.Concat(
        *(
            op.Constant(value_ints=[number]) if isinstance(number, int) else op.Reshape(number, [-1])
            for number in numbers
        ),
        axis=0,
    )


def number(value: Any) -> Any:
    """() int64 of a number."""
    return op.Constant(value_int=value) if isinstance(value, int) else op.Squeeze(value)


def size(value: Any, axis: int) -> Any:
    """() int64, the size of an axis."""
    return op.Squeeze(op.Shape(value, start=axis, end=axis + 1))


def floats(value: Any) -> Any:
    """The value in float32."""
    return op.Cast(value, to=FLOAT)


def deform_conv2d(
    inputs: Sequence[Any],
    offsets: Sequence[Any],
    masks: Sequence[Any],
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> list[Any]:
    outputs, _, *kernel = weight.shape
    if bias is None and masks:
        # An input that is left out in front of one that is there is read wrongly by some programs.
        bias = op.CastLike(op.Constant(value_floats=[0.0] * outputs), weight)
    found = []
    for level, (x, offset) in enumerate(zip(inputs, offsets, strict=True)):
        inputs_of_node = [x, weight, offset, bias, masks[level] if masks else None]
        while inputs_of_node[-1] is None:
            inputs_of_node.pop()
        found.append(
            op.DeformConv(
                *inputs_of_node,
                kernel_shape=list(kernel),
                strides=list(stride),
                pads=list(padding) * 2,
                dilations=list(dilation),
                group=int(x.shape[1]) // int(weight.shape[1]),
                offset_group=int(offset.shape[1]) // (2 * kernel[0] * kernel[1]),
            )
        )
    return found


def dynamic_relu(input: Any, coefficients: Any, backend: str) -> Any:
    x = floats(input)
    lines = op.Unsqueeze(floats(coefficients), [3, 4])
    a1, b1, a2, b2 = (op.Gather(lines, op.Constant(value_int=i), axis=1) for i in range(4))
    return op.CastLike(op.Max(op.Add(op.Mul(a1, x), b1), op.Add(op.Mul(a2, x), b2)), input)


def roi_align(
    features: Any,
    boxes: Any,
    images: Any,
    counts: Sequence[Any],
    output_size: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    backend: str,
) -> tuple[Any, Any, Any]:
    boxes = floats(boxes)
    if images is None:
        rows = [op.Expand(op.Constant(value_ints=[i]), ints(count)) for i, count in enumerate(counts)]
        images = op.Concat(*rows, axis=0)
    images = op.Cast(images, to=INT64)
    zero = op.Constant(value_int=0)
    # What is not finite is not equal to itself once 0 times it is added.
    finite = op.Equal(op.ReduceSum(op.Mul(boxes, 0.0), [1], keepdims=0), op.Constant(value_float=0.0))
    known = op.And(op.Not(op.Less(images, zero)), finite)
    inside = op.Unsqueeze(known, [1])
    pooled = op.RoiAlign(
        floats(features),
        op.Where(inside, boxes, op.Constant(value_float=0.0)),
        op.Where(known, images, zero),
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        output_height=int(output_size[0]),
        output_width=int(output_size[1]),
        sampling_ratio=sampling_ratio,
    )
    pooled = op.Where(op.Unsqueeze(known, [1, 2, 3]), pooled, op.Constant(value_float=0.0))
    # The weights of bins are for the backward alone: what nobody asks for is left out of the graph.
    rows, columns = (
        op.ConstantOfShape(ints(size(boxes, 0), int(bins), size(features, axis)))
        for axis, bins in zip((2, 3), output_size, strict=True)
    )
    return pooled, rows, columns


def border_align(features: Any, boxes: Any, pool_size: int, backend: str) -> tuple[Any, Any]:
    maps = floats(features)
    channels = int(features.shape[1]) // 4
    height, width = size(features, 2), size(features, 3)
    # Each border of each image reads its own channels: (N * 4, C, H, W).
    maps = op.Reshape(maps, ints(-1, channels, height, width))
    x1, y1, x2, y2 = op.Split(floats(boxes), num_outputs=4, axis=2)
    wide, high = (op.Mul(op.Sub(b, a), 1 / pool_size) for a, b in ((x1, x2), (y1, y2)))
    still = op.Mul(wide, 0.0)
    # Where each border begins and where it goes: (N, 4, n, 2), and then one image a border.
    walk = op.Concat(wide, still, still, high, op.Neg(wide), still, still, op.Neg(high), axis=2)
    begin = op.Concat(x1, y1, x1, y1, x2, y2, x2, y2, axis=2)
    walk, begin = (
        op.Reshape(op.Transpose(op.Reshape(x, [0, 0, 4, 2]), perm=[0, 2, 1, 3]), ints(-1, 1, size(boxes, 1), 2))
        for x in (walk, begin)
    )
    sizes = floats(ints(width, height))
    one = op.Constant(value_floats=[1.0])
    # From cells to -1 … 1 between the middles of the first and the last cell.
    scale = op.Div(op.Constant(value_float=2.0), op.Max(op.Sub(sizes, one), one))
    # All steps in a row, (N * 4, steps, n, 2), then one of them at a time: the samples of all would fill a memory.
    steps = op.Reshape(op.Constant(value_floats=[float(i) for i in range(pool_size + 1)]), [1, -1, 1, 1])
    place = op.Add(begin, op.Mul(walk, steps))
    near = op.And(op.Not(op.Less(place, op.Constant(value_float=-1.0))), op.Not(op.Greater(place, sizes)))
    near = op.Unsqueeze(op.ReduceMin(floats(near), [3], keepdims=0), [2])
    grids = op.Split(op.Sub(op.Mul(place, scale), one), num_outputs=pool_size + 1, axis=1)
    best = None
    for grid, counts in zip(grids, op.Split(near, num_outputs=pool_size + 1, axis=1), strict=True):
        sample = op.Mul(op.GridSample(maps, grid, align_corners=1, mode="linear", padding_mode="border"), counts)
        best = sample if best is None else op.Max(best, sample)
    # (N * 4, C, 1, n) -> (N, C, n, 4)
    best = op.Reshape(best, ints(-1, 4, channels, size(boxes, 1)))
    best = op.CastLike(op.Transpose(best, perm=[0, 2, 3, 1]), features)
    # Which sample won is for the backward alone.
    return best, op.Cast(best, to=UINT8)


def nms(boxes: Any, scores: Any, labels: Any, iou_threshold: float, max_output: Any, backend: str) -> Any:
    scores = floats(scores)
    rows = op.Unsqueeze(scores, [0])
    if labels is not None:
        # One row for each label from the least on, with the scores of its boxes.
        labels = op.Cast(labels, to=INT64)
        first, last = (reduce(labels, keepdims=0) for reduce in (op.ReduceMin, op.ReduceMax))
        all_labels = op.Range(first, op.Add(last, op.Constant(value_int=1)), op.Constant(value_int=1))
        rows = op.Where(op.Equal(labels, op.Unsqueeze(all_labels, [1])), rows, op.Constant(value_float=NONE))
    found = suppressed(op.Unsqueeze(boxes, [0]), op.Unsqueeze(rows, [0]), iou_threshold, LEAST)
    kept = op.Gather(found, op.Constant(value_int=2), axis=1)
    # By index, and then by score with equal ones in that order.
    every = op.Shape(kept)
    kept, _ = op.TopK(kept, every, axis=0, largest=0, sorted=1)
    most = every if max_output is None else op.Min(every, ints(max_output))
    _, order = op.TopK(op.Gather(scores, kept, axis=0), most, axis=0, largest=1, sorted=1)
    return op.Gather(kept, order, axis=0)


def nms_mask(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float, backend: str) -> Any:
    found = suppressed(boxes, floats(scores), iou_threshold, score_threshold)
    nothing = op.Expand(op.Constant(value_int=0), op.Shape(scores))
    ones = op.Expand(op.Constant(value_int=1), op.Shape(found, start=0, end=1))
    return op.Cast(op.ScatterND(nothing, found, ones), to=BOOL)


def suppressed(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float) -> Any:
    """(k, 3) int64: set, class and box of all that NonMaxSuppression keeps of boxes (B, n, 4)."""
    return op.NonMaxSuppression(
        floats(boxes),
        scores,
        size(boxes, 1),
        op.Constant(value_float=iou_threshold),
        op.Constant(value_float=score_threshold),
    )


def adaptive_average_pool(x: Any, output_size: Sequence[Any]) -> Any:
    """Rows (P, H) times x (N, C, H, W) times columns (W, Q): a cell's share is 1 by the cells of its window."""
    rows, columns = (
        op.CastLike(windows(size(x, axis), number(count)), x) for axis, count in zip((2, 3), output_size, strict=True)
    )
    return op.MatMul(rows, op.MatMul(x, op.Transpose(columns, perm=[1, 0])))


def windows(size: Any, count: Any) -> Any:
    """(count, size) float32: window i holds the cells from floor(i·size / count) to ceil((i + 1)·size / count)."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    window = op.Unsqueeze(op.Range(zero, count, one), [1])
    cell = op.Range(zero, size, one)
    first = op.Div(op.Mul(window, size), count)
    behind = op.Div(op.Sub(op.Add(op.Mul(op.Add(window, one), size), count), one), count)
    held = floats(op.And(op.Not(op.Less(cell, first)), op.Less(cell, behind)))
    return op.Div(held, op.ReduceSum(held, [1], keepdims=1))


def stable_sort(x: Any, *, stable: bool, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """TopK of all: of equal numbers it takes those of lower indices first, whichever way it sorts."""
    count = op.Shape(x, start=dim, end=dim + 1 if dim != -1 else None)
    return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query keyᵀ · scale + mask) value, for any number of dimensions; the exporter's own takes four."""
    if is_causal or dropout_p or enable_gqa or (attn_mask is not None and attn_mask.dtype != query.dtype):
        raise ValueError("only attention with an added mask or none is exported")
    last = len(query.shape)
    scale = int(query.shape[-1]) ** -0.5 if scale is None else scale
    weights = op.MatMul(query, op.Transpose(key, perm=[*range(last - 2), last - 1, last - 2]))
    weights = op.Mul(weights, op.CastLike(op.Constant(value_float=scale), query))
    if attn_mask is not None:
        weights = op.Add(weights, attn_mask)
    return op.MatMul(op.Softmax(weights, axis=-1), value)
