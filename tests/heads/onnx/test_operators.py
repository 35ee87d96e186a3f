"""Each operator as standard operators of ONNX, with open sizes, in onnxruntime against PyTorch on other sizes."""

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heads.onnx import onnx_translation_table
from kernels import batched_nms, border_align, deform_conv2d, dynamic_relu, nms, nms_mask, roi_align

AUTO = torch.export.Dim.AUTO


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def session(function, example, open_axes, opset=20):
    """onnxruntime's session of a function of tensors, whose listed axes are left open."""
    program = torch.onnx.export(
        Called(function).eval(),
        example,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(tuple({axis: AUTO for axis in axes} for axes in open_axes),),
        custom_translation_table=onnx_translation_table(),
        verbose=False,
    )
    kinds = {node.domain for node in program.model.graph}
    assert kinds == {""}, "other operators than the standard ones"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)


def run(made, *tensors):
    names = [each.name for each in made.get_inputs()]
    found = made.run(None, {name: x.numpy() for name, x in zip(names, tensors, strict=True)})
    return torch.from_numpy(found[0])


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def boxes(count, extent, seed=0):
    corner, side = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed)) * extent
    return torch.cat([corner, corner + side / 2], 1)


@pytest.mark.parametrize("masked", [True, False])
def test_deform_conv2d(masked):
    weight, bias = numbers(6, 4, 3, 2, seed=1), numbers(6, seed=2)

    def function(x, offset, mask):
        return deform_conv2d(
            x, offset, weight, bias if masked else None, (2, 1), (1, 2), (1, 2), mask if masked else None
        )

    def tensors(batch, height, width):
        out = (height - 1) // 2 + 1, width + 2
        return numbers(batch, 8, height, width), numbers(batch, 24, *out, seed=3), numbers(batch, 12, *out, seed=4)

    made = session(function, tensors(2, 8, 9), [(0, 2, 3)] * 3)
    assert len(made.get_inputs()) == 3
    for sizes in ((1, 5, 6), (3, 12, 11)):
        torch.testing.assert_close(run(made, *tensors(*sizes)), function(*tensors(*sizes)), rtol=1e-5, atol=1e-5)


def test_dynamic_relu():
    made = session(dynamic_relu, (numbers(2, 4, 6, 7), numbers(2, 4, 4, seed=1)), [(0, 2, 3), (0,)])
    x, lines = numbers(3, 4, 5, 2), numbers(3, 4, 4, seed=1)
    torch.testing.assert_close(run(made, x, lines), dynamic_relu(x, lines))


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(aligned):
    def function(x, rows):
        return roi_align(x, rows, (3, 2), 0.5, aligned=aligned)

    def rows(images, count):
        return torch.cat([torch.arange(count)[:, None] % images, boxes(count, 20)], 1)

    made = session(function, (numbers(2, 4, 9, 8), rows(2, 5)), [(0, 2, 3), (0,)])
    x, many = numbers(3, 4, 12, 11), rows(3, 9)
    # Of no image, and without a place: 0, where others read what lies elsewhere in memory.
    many[0, 0], many[1, 0], many[2, 3], many[3, 1] = -1, 3, torch.nan, torch.inf
    wanted = function(x, many)
    assert not wanted[:4].any() and wanted[4:].abs().amin() > 0
    torch.testing.assert_close(run(made, x, many), wanted, rtol=1e-5, atol=1e-5)


def test_border_align():
    def tensors(batch, height, width, count):
        # Some of them leave the map.
        return numbers(batch, 8, height, width), boxes(batch * count, 9).view(batch, count, 4) - 2

    made = session(border_align, tensors(2, 6, 7, 5), [(0, 2, 3), (0, 1)])
    for sizes in ((1, 5, 9, 4), (3, 8, 3, 11)):
        torch.testing.assert_close(run(made, *tensors(*sizes)), border_align(*tensors(*sizes)), rtol=1e-5, atol=1e-5)


def test_nms_with_labels_and_a_limit():
    def function(corners, scores, labels):
        return batched_nms(corners, scores, labels, 0.3, 7)

    def tensors(count):
        # Some scores are equal, and some are below 0.
        scores = (numbers(count, seed=1) * 4).round()
        return boxes(count, 10), scores, torch.arange(count) % 3 - 1

    made = session(function, tensors(12), [(0,)] * 3)
    for count in (40, 5):
        wanted = function(*tensors(count))
        assert torch.equal(run(made, *tensors(count)), wanted)
    assert len(function(*tensors(40))) == 7


def test_nms_without_labels_or_a_limit():
    made = session(lambda b, s: nms(b, s, 0.3), (boxes(12, 10), numbers(12)), [(0,)] * 2)
    wanted = nms(boxes(30, 10, seed=2), numbers(30), 0.3)
    assert 1 < len(wanted) < 30
    assert torch.equal(run(made, boxes(30, 10, seed=2), numbers(30)), wanted)


def test_nms_mask():
    def function(corners, scores):
        return nms_mask(corners, scores, 0.3, -0.5)

    def tensors(batch, classes, count):
        return boxes(batch * count, 8).view(batch, count, 4), numbers(batch, classes, count)

    made = session(function, tensors(2, 3, 12), [(0, 1), (0, 2)])
    wanted = function(*tensors(4, 3, 25))
    assert wanted.any() and not wanted.all()
    assert torch.equal(run(made, *tensors(4, 3, 25)), wanted)


def test_pooling_to_sizes_that_are_open():
    """What the paper's formulation resizes levels with; the exporter's own asks for sizes that are known."""

    def function(x, like):
        return F.adaptive_avg_pool2d(x, like.shape[2:])

    made = session(function, (numbers(1, 2, 9, 8), numbers(1, 1, 4, 3)), [(0, 2, 3), (2, 3)])
    for sizes in (((2, 2, 7, 11), (1, 1, 3, 4)), ((1, 2, 6, 6), (1, 1, 3, 6))):
        x, like = (numbers(*size) for size in sizes)
        torch.testing.assert_close(run(made, x, like), function(x, like))


def test_attention_with_more_than_four_dimensions():
    def function(query, mask):
        return F.scaled_dot_product_attention(query, query + 1, query - 1, attn_mask=mask)

    made = session(function, (numbers(2, 3, 2, 4, 5), numbers(3, 1, 4, 4)), [(0,), ()])
    query, mask = numbers(1, 3, 2, 4, 5), numbers(3, 1, 4, 4)
    torch.testing.assert_close(run(made, query, mask), function(query, mask), rtol=1e-5, atol=1e-5)
