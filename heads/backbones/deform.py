"""A convolution that learns where it looks: modulated deformable convolution (Zhu et al., CVPR 2019) as a layer."""

import torch
from torch import Tensor, nn

from heads.parameters import SpecialParameters
from kernels import deform_conv2d


class DeformConv(SpecialParameters):
    """A 3×3 modulated deformable convolution without bias in place of an ordinary one: (N, C, H, W) in and out.

    Keys are mmdetection's: `weight` is that of the ordinary convolution, `conv_offset` predicts 18 offsets, dy and dx
    by turns, and 9 logits of the mask. It starts as zero: the ordinary convolution at half its strength.

    Args:
        inputs, outputs: Channels.
        stride: 1 or 2.
        groups: Groups of the convolution; both channels are multiples of it.
    """

    offset_layers = ("conv_offset",)

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, 3, 3))
        self.conv_offset = nn.Conv2d(inputs, 27, 3, stride, 1)
        self.reset()

    def reset(self) -> None:
        """Draw the weights anew."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, outputs, H / stride, W / stride), rounded up."""
        offset, mask = self.conv_offset(x).split((18, 9), dim=1)
        return deform_conv2d(x, offset.contiguous(), self.weight, None, self.stride, 1, 1, mask.sigmoid())
