"""onnxruntime's deformable convolution for CPUs, a rival that has a forward alone, as a function of tensors."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from timing import Missing
from torch import Tensor

# The first release that has the operator for CPUs.
_OLDEST = (1, 25)


@lru_cache(maxsize=4)
def _session(shapes: tuple[tuple[str, tuple[int, ...]], ...], threads: int, **attributes: int | list[int]) -> Callable:
    """A model of one node for inputs of these shapes, by name, in the order of the operator."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper
    except ImportError as error:
        raise Missing(f"it does not import ({error})") from error
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < _OLDEST:
        raise Missing(f"version {onnxruntime.__version__} has no deformable convolution for CPUs")

    def described(name, shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    # An empty name is an input that is left out.
    names = [name if shape else "" for name, shape in shapes]
    node = helper.make_node("DeformConv", names, ["output"], **attributes)
    graph = helper.make_graph([node], "one", [described(*x) for x in shapes if x[1]], [described("output", [None] * 4)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda values: session.run(None, values)[0]


def onnxruntime_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """`kernels.deform_conv2d` of float32 tensors on a CPU, not differentiable; what is contiguous is not copied.

    Raises:
        Missing: onnxruntime or onnx is not installed, or too old.
    """
    # In the order of the operator.
    tensors = {"input": input, "weight": weight, "offset": offset, "bias": bias, "mask": mask}
    run = _session(
        tuple((name, () if x is None else tuple(x.shape)) for name, x in tensors.items()),
        torch.get_num_threads(),
        kernel_shape=tuple(weight.shape[2:]),
        strides=tuple(stride),
        pads=(*padding, *padding),
        dilations=tuple(dilation),
        group=input.shape[1] // weight.shape[1],
        offset_group=offset.shape[1] // (2 * weight.shape[2] * weight.shape[3]),
    )
    return torch.from_numpy(run({name: x.detach().numpy() for name, x in tensors.items() if x is not None}))
