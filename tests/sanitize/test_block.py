"""The fused DyHead block as a GPU executes it, forward and backward, against float64."""

from dataclasses import replace

import pytest
import torch
from half_precision import check_half
from random_cases import HeadCase, check_head
from torch import nn

from heads.dyhead import attention
from kernels.bench.roofline import float32_products
from kernels.deform_conv.operator import reference

SMALL = {"size": (9, 6), "levels": 3, "channels": 16}
# Alone and together, more channels than a block of them, a stack, and every way to a coarser level's offsets.
CASES = [
    HeadCase("LSC", **SMALL),
    HeadCase("S", **SMALL | {"batch": 1, "channels": 48, "levels": 2, "coarse_offsets": "resize"}),
    HeadCase("LC", **SMALL | {"depth": 2, "channels": 32}),
    HeadCase("", **SMALL),
]


def plain_chain(inputs, offsets, weight, bias, stride, padding, masks):
    every = zip(inputs, offsets, masks or [None] * len(inputs), strict=True)
    geometry = (stride,) * 2, (padding,) * 2, (1, 1)
    return [reference(x, offset, weight, bias, *geometry, mask) for x, offset, mask in every]


def smooth(head):
    """The same offsets everywhere, odd sixteenths of a pixel, and no number near the kink of a function.

    Gradients jump where a sample crosses a pixel and at a kink, so one number that is rounded to the other side can be
    all the error there is.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in head.blocks:
            if block.spatial.offset is not None:
                block.spatial.offset.weight[:18] = 0
                block.spatial.offset.bias[:18] = (torch.randint(-16, 16, (18,), generator=generator) + 0.5) / 8
            if block.scale.gate is not None:
                block.scale.gate.weight *= 0.1
                block.scale.gate.bias.fill_(1.0)
            if not block.task.learned:
                block.task = nn.Identity()
                continue
            # A hidden unit is on or off, and of two almost parallel lines one is the higher one, for all values.
            side = torch.randint(0, 2, (len(block.task.expand.bias) // 4,), generator=generator) * 2.0 - 1
            block.task.reduce.bias.copy_(1.5 * side[: len(block.task.reduce.bias)])
            block.task.expand.weight *= 0.3
            slope = torch.full_like(side, 0.75)
            block.task.expand.bias.copy_(torch.cat([-slope, 1.8 * side, 3 * slope, -1.8 * side]))
    return head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_16_bits(case, dtype, algorithms, monkeypatch):
    # Separate operators on a CPU mix samples in float32; the yardstick is a chain that does all in its type.
    monkeypatch.setattr(attention, "deform_conv2d_levels", plain_chain)

    def make(other):
        head = smooth(case.head(torch.float32, "cpu")).to("cuda", dtype).to(other)
        return head, [x.detach().to(other).requires_grad_() for x in case.features(dtype, "cuda")]

    def run(other):
        head, features = make(other)
        return head(features), {f"level {i}": x for i, x in enumerate(features)} | dict(head.named_parameters())

    head, features = make(dtype)
    assert head.unfused_reason(features) is None
    # A gate is one number a map, of which there are 14.
    check_half(run, dtype, few=[f"blocks.{i}.scale.gate" for i in range(case.depth)])


def test_float32(algorithms):
    with float32_products("ieee"):
        check_head(replace(CASES[0], coarse_offsets="prefix"), torch.float32, "cuda")
