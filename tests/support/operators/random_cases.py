"""Random configurations of the operator and of a head, and how closely a fused head must follow the separate one."""

import random
from dataclasses import dataclass
from math import lcm

import torch
from deform_conv_cases import Case
from torch import Tensor, nn

from heads import DyHead
from heads.dyhead.dyhead import ATTENTIONS
from kernels import use_backend
from kernels.bench.op import rounding
from kernels.block.parameters import COARSE_OFFSETS


def random_convolution(seed: int, largest: int = 40) -> Case:
    """Any geometry, up to `largest` pixels a side, with offsets from a tenth of a pixel to far outside the map."""
    draw = random.Random(seed)

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw.randint(low, high), draw.randint(low, high)

    groups, offset_groups = draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2))
    kernel, dilation, padding = pair(1, 4), pair(1, 3), pair(0, 4)
    # At least one pixel of output.
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    return Case(
        id=f"random-{seed}",
        why="nobody thought of it",
        batch=draw.randint(1, 3),
        channels=lcm(groups, offset_groups) * draw.randint(1, 12),
        outputs=groups * draw.randint(1, 24),
        size=tuple(low + draw.randint(0, largest) for low in least),
        kernel=kernel,
        stride=pair(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        masked=draw.random() < 0.7,
        biased=draw.random() < 0.7,
        spread=10 ** draw.uniform(-1, 4),
    )


@dataclass(frozen=True)
class HeadCase:
    """A DyHead and a pyramid; `reach` multiplies the offsets that it predicts, which are some tenths of a pixel."""

    attentions: str = "LSC"
    size: tuple[int, int] = (33, 47)
    levels: int = 4
    channels: int = 64
    batch: int = 2
    depth: int = 1
    coarse_offsets: str = "crop"
    reach: float = 3.0

    @property
    def id(self) -> str:
        size = "x".join(map(str, self.size))
        shape = f"{size}-l{self.levels}-c{self.channels}-b{self.batch}-d{self.depth}"
        return f"{self.attentions or 'none'}-{shape}-{self.coarse_offsets}-{self.reach:.1f}"

    def head(self, dtype: torch.dtype, device: str) -> DyHead:
        """A head with no parameter at its starting value, the same numbers in every type."""
        torch.manual_seed(1)
        head = DyHead(self.channels, self.depth, self.attentions, coarse_offsets=self.coarse_offsets)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            for block in head.blocks:
                if isinstance(block.spatial.offset, nn.Conv2d):
                    block.spatial.offset.weight[:18] *= self.reach
                    block.spatial.offset.bias[:18] *= self.reach
        return head.to(device, dtype)

    def features(self, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
        """Levels that halve, rounded up; channels last."""
        generator = torch.Generator().manual_seed(seed)
        (height, width), features = self.size, []
        for _ in range(self.levels):
            x = torch.randn(self.batch, self.channels, height, width, generator=generator)
            features.append(x.to(device, dtype, memory_format=torch.channels_last).requires_grad_())
            height, width = (height + 1) // 2, (width + 1) // 2
        return features


def random_head(seed: int, largest: int = 40) -> HeadCase:
    """Any subset, up to five levels, offsets from less than a pixel to hundreds of pixels."""
    draw = random.Random(seed)
    return HeadCase(
        attentions=draw.choice(ATTENTIONS),
        size=(draw.randint(1, largest), draw.randint(1, largest)),
        levels=draw.randint(1, 5),
        channels=draw.choice((16, 32, 48, 80)),
        batch=draw.randint(1, 3),
        depth=draw.randint(1, 2),
        coarse_offsets=draw.choice(COARSE_OFFSETS),
        reach=10 ** draw.uniform(-1, 3),
    )


def results(head: DyHead, features: list[Tensor]) -> dict[str, Tensor]:
    """Outputs, and the gradients of levels and parameters for fixed random cotangents, by name."""
    outputs = head(features)
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    leaves = {f"level {i}": x for i, x in enumerate(features)} | dict(head.named_parameters())
    # With a single level the neighbours' weights are not used.
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)} | dict(zip(leaves, grads, strict=True))
    return {name: x for name, x in found.items() if x is not None}


def check_head(case: HeadCase, dtype: torch.dtype, device: str) -> None:
    """Compare the fused path with float64.

    In float64 no number may differ by more than a billionth of the largest of its kind, or of a thousandth of all.
    In other precisions the norm of the error may be twice what the separate operators lose, and four times what the
    longest sum has in another order. Of gradients, also the root of the share of samples that rounding moves across a
    pixel, where the gradient of the offset jumps: some roundings of the longest side or, if it is longer, the reach.
    """
    with use_backend("torch"):
        expected = results(case.head(torch.float64, device), case.features(torch.float64, device))
        separate = results(case.head(dtype, device), case.features(dtype, device))
    head, features = case.head(dtype, device), case.features(dtype, device)
    assert head.unfused_reason(features) is None
    found = results(head, features)
    assert found.keys() == expected.keys()
    if dtype == torch.float64:
        largest = max(x.abs().max() for x in expected.values())
        for name, value in expected.items():
            error, scale = (found[name] - value).abs().max(), max(value.abs().max(), 1e-3 * largest)
            # Not `error > limit`, which NaN passes.
            assert error <= 1e-9 * scale, f"{case.id} {name}: error {error:.3g}, scale {scale:.3g}"
        return
    sums = 4 * rounding(dtype, case.batch * case.size[0] * case.size[1])
    crossing = (2 * max(*case.size, case.reach) * torch.finfo(torch.float32).eps) ** 0.5
    for name, value in expected.items():
        error, lost = (float((x[name].double() - value).norm()) for x in (found, separate))
        limit = 2 * lost + (sums if name.startswith("output") else sums + crossing) * float(value.norm())
        assert error <= limit, f"{case.id} {name}: error {error:.3g}, allowed {limit:.3g}"
