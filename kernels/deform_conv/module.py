"""Deformable convolutions as layers, with the constructors and the state dicts of torchvision's and mmcv's.

`DeformConv2d` is torchvision's layer, which is given its offsets. `DeformConv2dPack` and `ModulatedDeformConv2dPack`
are mmcv's, which predict theirs. A model changes the line that imports the class, and its checkpoints load as they are.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.deform_conv.operator import deform_conv2d
from kernels.runtime.checks import check_integer, check_pair


class DeformConv2d(nn.Module):
    """`deform_conv2d` with its weight and bias, in place of `torchvision.ops.DeformConv2d`.

    Arguments, attributes, initial distributions and keys of the state dict (`weight`, `bias`) are torchvision's. The
    number of offset groups is no argument: the channels of `offset` say it.

    Args:
        in_channels: C, a multiple of `groups`.
        out_channels: O, a multiple of `groups`.
        kernel_size: Rows and columns of the kernel, an int for both or a pair.
        stride: Pixels of the input from one output pixel to the next, an int or a pair.
        padding: Rows and columns of zeros on each side, an int or a pair.
        dilation: Pixels of the input from one tap to the next, an int or a pair.
        groups: Groups of the convolution.
        bias: Whether there is one.

    Raises:
        TypeError: A number is none, or no whole one.
        ValueError: A number is out of range, or `groups` does not divide the channels.

    Example:
        >>> import torch
        >>> from kernels import DeformConv2d
        >>> layer = DeformConv2d(16, 32, kernel_size=3, padding=1)
        >>> layer
        DeformConv2d(16, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        >>> x, offset, mask = torch.rand(2, 16, 8, 8), torch.randn(2, 18, 8, 8), torch.rand(2, 9, 8, 8)
        >>> layer(x, offset, mask).shape
        torch.Size([2, 32, 8, 8])
        >>> sorted(layer.state_dict())
        ['bias', 'weight']
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        self.in_channels = check_integer("in_channels", in_channels, 1)
        self.out_channels = check_integer("out_channels", out_channels, 1)
        self.groups = check_integer("groups", groups, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} must be divisible by groups, {groups}, got {channels}")
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        self.dilation = _pair("dilation", dilation, 1)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as `nn.Conv2d` does: uniform within ±1 / sqrt(C / groups * kh * kw)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, C, H, W), offsets and masks as `deform_conv2d` takes them -> (N, O, Ho, Wo); its errors."""
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1}
        text += "".join(f", {name}={getattr(self, name)}" for name, x in usual.items() if getattr(self, name) != x)
        return text if self.bias is not None else f"{text}, bias=False"


class _Pack(DeformConv2d):
    """A deformable convolution with `conv_offset`, an ordinary one of its geometry, which predicts what it samples.

    Attributes:
        per_tap: Channels that `conv_offset` has for each tap of each offset group.
    """

    per_tap: int
    # Of the state dict, in mmcv's count: from 2 on the prediction has a key below the layer's own.
    _version = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        deform_groups: int,
        bias: bool,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.deform_groups = check_integer("deform_groups", deform_groups, 1)
        if in_channels % deform_groups:
            raise ValueError(f"in_channels must be divisible by deform_groups, {deform_groups}, got {in_channels}")
        predicted = self.per_tap * deform_groups * self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(in_channels, predicted, self.kernel_size, self.stride, self.padding, self.dilation)
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.deform_groups == 1 else f"{text}, deform_groups={self.deform_groups}"


class ModulatedDeformConv2dPack(_Pack):
    """A layer that predicts its offsets and masks, in place of mmcv's `ModulatedDeformConv2dPack` (`DCNv2`).

    mmcv's state dict loads as it is, strictly, and gives mmcv's numbers. T = kh * kw taps, G = `deform_groups`:

    | key | shape | what |
    | --- | --- | --- |
    | `weight` | (O, C / groups, kh, kw) | of the deformable convolution |
    | `bias` | (O,) | likewise; absent with `bias=False` |
    | `conv_offset.weight` | (3 * G * T, C, kh, kw) | of an ordinary convolution of the same geometry |
    | `conv_offset.bias` | (3 * G * T,) | likewise |

    Of what `conv_offset` gives, the first 2 * G * T channels are offsets in pixels, for each offset group and tap dy
    and then dx; the sigmoid of the last G * T is the mask. mmcv cuts it in thirds and joins the first two, which is the
    same.

    In checkpoints older than mmcv's version 2 of the layer the prediction stood beside it, under
    `<layer>_offset.weight` and `.bias`. A layer is shown nothing but keys below its own by `load_state_dict`, so they
    are renamed first:
    `{re.sub(r"_offset\\.(weight|bias)$", r".conv_offset.\\1", key): value for key, value in state.items()}`.

    Args:
        in_channels: C, a multiple of `groups` and of `deform_groups`.
        out_channels, kernel_size, stride, padding, dilation, groups, bias: As in `DeformConv2d`.
        deform_groups: Offset groups: how many parts of the channels have offsets and masks of their own.

    Raises:
        TypeError: A number is none, or no whole one.
        ValueError: A number is out of range, or does not divide the channels.

    Source: Zhu et al., "Deformable ConvNets v2", CVPR 2019. It starts as mmcv's does, with offsets of 0 and masks of
    1/2, a weight uniform within ±1 / sqrt(C * kh * kw) and a bias of 0.

    Example:
        >>> import torch
        >>> from kernels import ModulatedDeformConv2dPack
        >>> layer = ModulatedDeformConv2dPack(16, 32, kernel_size=3, stride=2, padding=1)
        >>> sorted(layer.state_dict())
        ['bias', 'conv_offset.bias', 'conv_offset.weight', 'weight']
        >>> layer(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 32, 4, 4])
    """

    per_tap = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias)

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to 0, as mmcv does; what predicts offsets and masks stays."""
        bound = 1 / math.sqrt(self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, H, W) -> (N, O, Ho, Wo)."""
        predicted = self.conv_offset(x)
        offsets = predicted.shape[1] // 3 * 2
        return super().forward(x, predicted[:, :offsets], predicted[:, offsets:].sigmoid())


class DeformConv2dPack(_Pack):
    """A layer that predicts its offsets and has no mask and no bias, in place of mmcv's `DeformConv2dPack` (`DCN`).

    mmcv's state dict loads as it is, strictly. T = kh * kw taps, G = `deform_groups`: `weight` is (O, C / groups, kh,
    kw), `conv_offset.weight` (2 * G * T, C, kh, kw) and `conv_offset.bias` (2 * G * T,). What `conv_offset` gives are
    offsets in pixels, for each offset group and tap dy and then dx. For older checkpoints see
    `ModulatedDeformConv2dPack`.

    Args:
        in_channels: C, a multiple of `groups` and of `deform_groups`.
        out_channels, kernel_size, stride, padding, dilation, groups: As in `DeformConv2d`.
        deform_groups: Offset groups: how many parts of the channels have offsets of their own.
        bias: False, as in mmcv.

    Raises:
        TypeError: A number is none, or no whole one.
        ValueError: A number is out of range, or does not divide the channels, or `bias` is True.

    Source: Dai et al., "Deformable Convolutional Networks", ICCV 2017. It starts as mmcv's does, with offsets of 0 and
    Kaiming's uniform weight for a ReLU.

    Example:
        >>> import torch
        >>> from kernels import DeformConv2dPack
        >>> layer = DeformConv2dPack(16, 32, kernel_size=3, padding=1, deform_groups=4)
        >>> layer.conv_offset.out_channels
        72
        >>> layer(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    per_tap = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
    ):
        if bias:
            raise ValueError("bias must be False: mmcv's layer without masks has none; DeformConv2d does")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias)

    def reset_parameters(self) -> None:
        """Draw the weight anew, as mmcv does; what predicts offsets stays."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, H, W) -> (N, O, Ho, Wo)."""
        return super().forward(x, self.conv_offset(x))


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    height, width = check_pair(name, value, least)
    return height, width
