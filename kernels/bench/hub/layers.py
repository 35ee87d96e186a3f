"""Layers for `kernelize`: each lends its `forward` to a module that has the attributes it is annotated with.

They have no constructor and no state of their own, as Hugging Face's package checks before it takes one.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from kernels.deform_conv.operator import deform_conv2d
from kernels.dynamic_relu.operator import dynamic_relu
from kernels.regions.roi_align import roi_align


class DeformConv2d(nn.Module):
    """For `torchvision.ops.DeformConv2d`, or any module with these attributes."""

    can_torch_compile: bool = True
    has_backward: bool = True

    weight: Tensor
    bias: Tensor | None
    stride: int | Sequence[int]
    padding: int | Sequence[int]
    dilation: int | Sequence[int]

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, C, H, W), (N, G * T * 2, Ho, Wo), (N, G * T, Ho, Wo) -> (N, O, Ho, Wo), as in `deform_conv2d`."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


class DynamicReLU(nn.Module):
    """For a module, or a function that `use_kernel_forward_from_hub` made one, of a map and its coefficients."""

    can_torch_compile: bool = True
    has_backward: bool = True

    def forward(self, input: Tensor, coefficients: Tensor) -> Tensor:
        """(N, C, H, W), (N, 4, C) in the order a1, b1, a2, b2 -> (N, C, H, W), as in `dynamic_relu`."""
        return dynamic_relu(input, coefficients)


class RoIAlign(nn.Module):
    """For `torchvision.ops.RoIAlign`, or any module with these attributes."""

    can_torch_compile: bool = True
    has_backward: bool = True

    output_size: int | Sequence[int]
    spatial_scale: float
    sampling_ratio: int
    aligned: bool

    def forward(self, input: Tensor, rois: Tensor | list[Tensor]) -> Tensor:
        """(N, C, H, W), (K, 5) or N of (r_i, 4) -> (K, C, P, Q), as in `roi_align`."""
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)
