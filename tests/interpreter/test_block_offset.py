"""The grouped convolution of a block's offsets under the interpreter: PyTorch's numbers, forward and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from kernels.block import offset as block_offset
from kernels.block.layout import join, layout
from kernels.runtime.launch import real
from kernels.runtime.tiles import Tiles

# Odd, even and one-pixel sizes: every tile and every run of pixels ends in the middle of a level, or beyond it.
SIZES = ((7, 10), (4, 5), (2, 3), (1, 2), (1, 1))


@pytest.fixture(autouse=True)
def poisoned(poison):
    pass


def make(sizes=SIZES, batch=2, channels=16, outputs=27, dtype=torch.float64, parameters=None):
    """The pyramid's levels, weight and bias, and what the outputs are multiplied with."""
    generator = torch.Generator().manual_seed(7)

    def new(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    levels = [new(batch, channels, *size) for size in sizes]
    cotangents = [new(batch, outputs, *size) for size in sizes]
    parameters = parameters or dtype
    return levels, new(outputs, channels, 3, 3, dtype=parameters), new(outputs, dtype=parameters), cotangents


def ours(levels, weight, bias, cotangents, wanted=(0, 1, 2), others=None):
    """The matrix of predictions, and the wanted gradients of pyramid, weight and bias."""
    tables = layout(tuple(x.shape[2:] for x in levels), len(levels[0]), torch.device("cpu"), real(levels[0].dtype))
    pyramid, counters = join(levels), torch.full((1000,), -1, dtype=torch.int32)
    out = block_offset.forward(pyramid, weight, bias, counters, tables)
    assert not counters.any()
    others = torch.zeros_like(pyramid) if others is None else others
    to_parameters = 1 in wanted or 2 in wanted
    grads = block_offset.backward(
        join(cotangents), pyramid, weight, bias, others if 0 in wanted else None, to_parameters, tables
    )
    assert (grads[0] is None, grads[1] is None) == (0 not in wanted, not to_parameters)
    return out, *(grads[i] for i in wanted)


def pytorchs(levels, weight, bias, cotangents):
    """The same from one convolution a level, in the type of the levels."""
    levels, weight, bias = [x.requires_grad_() for x in levels], weight.requires_grad_(), bias.requires_grad_()
    outputs = [F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1) for x in levels]
    grads = torch.autograd.grad(outputs, [*levels, weight, bias], cotangents)
    return join([y.detach() for y in outputs]), join(list(grads[:-2])), *grads[-2:]


def check(arguments):
    for found, expected in zip(ours(*arguments), pytorchs(*arguments), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_levels_of_every_size():
    check(make())


def test_one_level_of_one_image():
    check(make(sizes=((5, 3),), batch=1))


def test_channels_that_are_no_power_of_two():
    check(make(sizes=((3, 4), (2, 2)), channels=48, outputs=5))


def test_several_blocks_of_everything(monkeypatch):
    # Blocks of 16 of 48 channels, of 16 of 27 outputs and of 243 columns, tiles of 2 x 4, runs of 16 pixels.
    monkeypatch.setattr(block_offset, "fit", lambda *_: Tiles(2, 4, 16, 16, 4, 2))
    monkeypatch.setattr(block_offset, "_WEIGHT_PROGRAMS", 3 * 48)
    monkeypatch.setattr(block_offset, "_COLUMNS", 256)
    check(make(sizes=((3, 5), (2, 3)), channels=48, batch=1))


def test_places_of_64_bits(monkeypatch):
    common = block_offset._common
    monkeypatch.setattr(block_offset, "_common", lambda *a: common(*a) | {"INDEX": block_offset.tl.int64})
    check(make(sizes=((3, 2),)))


@pytest.mark.parametrize("strides", ["channels last", "transposed", "every other"])
def test_parameters_of_any_strides(strides):
    levels, weight, bias, cotangents = make(sizes=((3, 4), (2, 2)), parameters=torch.float32)
    ways = {
        "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
        "transposed": lambda x: x.mT.contiguous().mT if x.dim() == 4 else x,
        "every other": lambda x: x.repeat_interleave(2, 0)[::2],
    }
    strided = [ways[strides](x) for x in (weight, bias)]
    assert strided[0].stride() != weight.stride()
    found = ours(levels, *strided, cotangents)
    assert all(torch.equal(x, y) for x, y in zip(found, ours(levels, weight, bias, cotangents), strict=True))
    if strides != "every other":
        assert found[2].stride() == strided[0].stride()


def test_other_gradients_are_added_and_rounded_once():
    arguments = make(sizes=((3, 4), (2, 2)), dtype=torch.float16)
    others = torch.randn(2 * 16, 16, generator=torch.Generator().manual_seed(1))
    alone = ours(*([x.float() for x in y] if isinstance(y, list) else y.float() for y in arguments))[2 - 1]
    found = ours(*arguments, others=others)[1]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), alone + others, rtol=2**-11, atol=1e-4)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,)], ids=["pyramid", "weight", "bias"])
def test_single_gradients(wanted):
    arguments = make(sizes=((3, 2),))
    assert torch.equal(ours(*arguments, wanted)[1], ours(*arguments)[1 + wanted[0]])


@pytest.mark.parametrize(
    ("dtype", "parameters"), [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32)], ids=str
)
def test_loses_no_more_than_pytorch(dtype, parameters):
    arguments = make(channels=32, dtype=dtype, parameters=parameters)
    exact = pytorchs(*(x.double() if isinstance(x, torch.Tensor) else [y.double() for y in x] for x in arguments))
    for found, plain, x in zip(ours(*arguments), pytorchs(*arguments), exact, strict=True):
        assert found.dtype == plain.dtype
        allowed = 2 * (plain - x).abs().max() + 1e-6 * x.abs().max()
        assert (found - x).abs().max() <= allowed


def test_the_same_bits_twice():
    arguments = make(dtype=torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(ours(*arguments), ours(*arguments), strict=True))
