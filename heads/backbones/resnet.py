"""ResNet backbones (He et al. 2016) with torchvision's state-dict keys, so that public ImageNet weights load unchanged.

Sizes: `resnet18`, `resnet50`, `resnet101`, and `tiny`, one block a stage at a quarter of the width, which trains from
scratch on a CPU. BatchNorm is frozen in the large ones, as detectors do that start from ImageNet weights and see few
images a batch; `tiny` trains its own. ResNeXt-101 64×4d (Xie et al. 2017) is a ResNet with grouped convolutions, and
`resnext101_64x4d_dcn` has them deformable in its last three stages. `BACKBONES` also lists those of
`heads/backbones/swin.py`.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.backbones.deform import DeformConv
from heads.backbones.swin import Swin, check_finest, swin_l, swin_t
from heads.released.weights import bare_state, read_weights

# Channels -> a norm of maps (N, C, H, W).
Norm = Callable[[int], nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm with constant statistics and constant affine parameters: (N, C, H, W) in and out."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.downsample = shortcut(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1×1, 3×3 (which strides, as in torchvision's weights), 1×1, and a shortcut."""

    expansion = 4
    stride_in_1x1 = False
    groups = 1
    widening = 1
    conv2: nn.Conv2d | DeformConv

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm):
        super().__init__()
        outputs, width = width * self.expansion, width * self.widening
        first, second = (stride, 1) if self.stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, 1, groups=self.groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.downsample = shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class CaffeBottleneck(Bottleneck):
    """The original bottleneck, whose first 1×1 strides, as in the Caffe weights that detectron2 starts from."""

    stride_in_1x1 = True


class ResNeXtBottleneck(Bottleneck):
    """A bottleneck of four times the inner width, whose 3×3 convolution has 64 groups: 64×4d."""

    groups = 64
    widening = 4


class DeformResNeXtBottleneck(ResNeXtBottleneck):
    """The same with a modulated deformable 3×3 convolution, under the same key."""

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm):
        super().__init__(inputs, width, stride, norm)
        inner = width * self.widening
        self.conv2 = DeformConv(inner, inner, stride, self.groups)


def shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Sequential | None:
    """The projection of a residual block whose output has another size than its input, else None."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """The convolutional part of a ResNet.

    Args:
        block: `BasicBlock`, `Bottleneck` or a subclass, or one for each stage.
        layers: Blocks in each of the four stages.
        width: Channels of the stem and of the first stage's inner convolutions.
        norm: `FrozenBatchNorm2d` or `nn.BatchNorm2d`.
        finest: The first map that `forward` returns: 3 for C3, or 2 for C2, for pyramids that begin with it.

    Raises:
        ValueError: `finest` is neither 2 nor 3.

    Attributes:
        unused_keys: Regular expression of the keys of an ImageNet release that a backbone has no use for.
        fresh_keys: Regular expression of the backbone's keys that an ImageNet release does not have.
        channels: Channels of the maps that `forward` returns.

    Example:
        >>> import torch
        >>> from heads import BACKBONES
        >>> backbone = BACKBONES["tiny"]()
        >>> [tuple(x.shape) for x in backbone(torch.rand(1, 3, 64, 96))]
        [(1, 32, 8, 12), (1, 64, 4, 6), (1, 128, 2, 3)]
        >>> BACKBONES["tiny"](finest=2).channels
        (16, 32, 64, 128)
    """

    unused_keys = r"fc\..*"
    fresh_keys = r".*\.conv_offset\..*"
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: Block | Sequence[Block],
        layers: tuple[int, ...],
        width: int,
        norm: Norm,
        *,
        finest: int = 3,
    ):
        super().__init__()
        check_finest(finest)
        # A tuple, whose modules are not registered a second time.
        self.frozen: tuple[nn.Module, ...] = ()
        kinds = [block] * 4 if isinstance(block, type) else block
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = norm(width)
        inputs = width
        channels = []
        for stage, (kind, blocks) in enumerate(zip(kinds, layers, strict=True)):
            inner = width * 2**stage
            stack = []
            for index in range(blocks):
                stack.append(kind(inputs, inner, 2 if stage and not index else 1, norm))
                inputs = inner * kind.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
            channels.append(inputs)
        self.finest = finest
        self.channels = tuple(channels[finest - 2 :])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, DeformConv):
                module.reset()

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> C3, C4, C5 of strides 8, 16, 32, and C2 of stride 4 before them where `finest` is 2."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        c2 = self.layer1(F.max_pool2d(x, 3, 2, 1))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c2, c3, c4, self.layer4(c4)][self.finest - 2 :]

    def freeze(self, stages: int) -> None:
        """Stop training the stem and the first `stages` stages, as detectors on ImageNet weights do (usually 1).

        The norms in them keep their statistics from now on, whatever mode the model is in.
        """
        self.frozen = (self.conv1, self.bn1, *(self.layer1, self.layer2, self.layer3, self.layer4)[:stages])
        for module in self.frozen:
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self


Backbone = ResNet | Swin


class BackboneBuilder(Protocol):
    """Makes a backbone with random weights, which returns C3 to C5, or C2 to C5 where `finest` is 2."""

    def __call__(self, *, finest: int = 3) -> Backbone: ...


def dcn(block: Block, deformable: Block) -> list[Block]:
    """A kind of block for each stage, deformable in the last three."""
    return [block, deformable, deformable, deformable]


BACKBONES: dict[str, BackboneBuilder] = {
    "tiny": partial(ResNet, BasicBlock, (1, 1, 1, 1), 16, nn.BatchNorm2d),
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2), 64, FrozenBatchNorm2d),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), 64, FrozenBatchNorm2d),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3), 64, FrozenBatchNorm2d),
    "resnext101_64x4d": partial(ResNet, ResNeXtBottleneck, (3, 4, 23, 3), 64, FrozenBatchNorm2d),
    "resnext101_64x4d_dcn": partial(
        ResNet, dcn(ResNeXtBottleneck, DeformResNeXtBottleneck), (3, 4, 23, 3), 64, FrozenBatchNorm2d
    ),
    "swin_t": swin_t,
    "swin_l": swin_l,
}

# The ImageNet weights torchvision publishes, version IMAGENET1K_V1; the last part of each name is its SHA-256 prefix.
IMAGENET = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "resnet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "resnet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "resnext101_64x4d": "https://download.pytorch.org/models/resnext101_64x4d-173b62eb.pth",
}


def load_imagenet(backbone: Backbone, source: str | Path) -> None:
    """Load ImageNet weights, with torchvision's key names or Swin's authors', into `backbone`.

    Args:
        backbone: One of `BACKBONES`.
        source: A local file (`.pth`, read with `weights_only=True`, or `.safetensors`), or the name of a backbone,
            whose weights come from the hub cache, or from the network if they are not there yet.

    Raises:
        ValueError: The file is not one of plain tensors, or keys are missing or unknown; both are listed. The
            classifier and what only a detector has (`unused_keys`, `fresh_keys` of the backbone) are left out.
        FileNotFoundError: `source` is neither a file nor a name with published weights.
    """
    if str(source) in IMAGENET:
        url = IMAGENET[str(source)]
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except OSError as error:
            raise OSError(f"cannot download {url} ({error}); fetch it elsewhere and give the file") from error
    elif not Path(source).is_file():
        raise FileNotFoundError(f"no weights at {source}; give a file or one of {', '.join(IMAGENET)}")
    else:
        state = read_weights(source)
    state = {k: v for k, v in bare_state(state).items() if not re.fullmatch(backbone.unused_keys, k)}
    expected = backbone.state_dict()
    # Frozen statistics do not count batches.
    unknown = sorted(key for key in state if key not in expected and not key.endswith("num_batches_tracked"))
    fresh = re.compile(rf"{backbone.fresh_keys}|.*num_batches_tracked")
    missing = sorted(key for key in expected if key not in state and not fresh.fullmatch(key))
    if unknown or missing:
        raise ValueError(
            f"{source} does not fit this backbone; missing: {missing or 'none'}; unknown: {unknown or 'none'}"
        )
    backbone.load_state_dict({key: value for key, value in state.items() if key in expected}, strict=False)
