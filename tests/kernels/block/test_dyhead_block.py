"""`kernels.dyhead_block` without a GPU: the numbers of the modules of `heads`, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from heads import DyHead
from heads.dyhead.dyhead import ATTENTIONS
from heads.dyhead.fused import parameters
from kernels import BlockParameters, dyhead_block, dyhead_blocks

SIZES = ((7, 10), (4, 5), (2, 3), (1, 2))


def make_head(attentions="LSC", mode="crop", depth=1, channels=32, dtype=torch.float64):
    """A head with no parameter at its starting value, convolutions with biases, offsets of more than a pixel."""
    torch.manual_seed(3)
    head = DyHead(channels, depth, attentions, coarse_offsets=mode)
    for branch in head.blocks[0].spatial.branches:
        branch.bias = nn.Parameter(torch.zeros(channels))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return head.to(dtype)


def make_features(sizes=SIZES, channels=32, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    shapes = [(batch, channels, *size) for size in sizes]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def compare(head, features, rtol=1e-10):
    """Outputs and the gradients of levels and parameters, from the modules and from their parameters alone."""
    leaves = [*features, *head.parameters()]
    expected, found = head(features), dyhead_blocks(features, [parameters(block) for block in head.blocks])
    cotangents = [torch.randn_like(y) for y in expected]
    grads = [torch.autograd.grad(y, leaves, cotangents, allow_unused=True) for y in (found, expected)]
    for x, y in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=rtol * max(1.0, float(y.detach().abs().max())))


@pytest.mark.parametrize("attentions", ATTENTIONS, ids=lambda a: a or "none")
def test_every_subset_is_what_the_modules_compute(attentions):
    compare(make_head(attentions), make_features())


@pytest.mark.parametrize("mode", ["prefix", "resize"])
def test_every_way_to_coarser_offsets(mode):
    compare(make_head("S", mode), make_features(((5, 7), (3, 4))))


def test_a_stack_is_its_blocks_one_after_another():
    head, features = make_head(depth=2), make_features()
    compare(head, features)
    levels = features
    for block in head.blocks:
        levels = dyhead_block(levels, parameters(block))
    for x, y in zip(levels, dyhead_blocks(features, [parameters(block) for block in head.blocks]), strict=True):
        assert torch.equal(x, y)


def test_a_block_without_its_activation():
    head = make_head("L")
    head.blocks[0].task = nn.Identity()
    compare(head, make_features())


def test_one_level_and_no_block():
    compare(make_head(), make_features(((3, 4),)))
    features = make_features()
    assert all(x is y for x, y in zip(dyhead_blocks(features, []), features, strict=True))


def test_an_empty_batch():
    outputs = dyhead_block(make_features(batch=0), parameters(make_head().blocks[0]))
    assert [y.shape for y in outputs] == [(0, 32, *size) for size in SIZES]


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
def test_16_bits_round_the_convolutions_and_the_output_alone(autocast):
    exact = dyhead_block(make_features(), parameters(make_head().blocks[0]))
    dtype = torch.float32 if autocast else torch.bfloat16
    features, block = make_features(dtype=dtype), parameters(make_head(dtype=dtype).blocks[0])
    features[1] = features[1].bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = dyhead_block(features, block)
    for y, right in zip(outputs, exact, strict=True):
        assert y.dtype == torch.bfloat16
        assert (y - right).abs().max() <= 0.05 * right.abs().max()


def test_a_compiled_block():
    features, block = make_features(dtype=torch.float32), parameters(make_head(dtype=torch.float32).blocks[0])
    compiled = torch.compile(lambda x: dyhead_block(x, block), fullgraph=True, backend="eager")
    for x, y in zip(compiled(features), dyhead_block(features, block), strict=True):
        torch.testing.assert_close(x, y)


def good():
    return [x.detach() for x in make_features(dtype=torch.float32)], parameters(
        make_head(dtype=torch.float32).blocks[0]
    )


def test_the_defaults_switch_everything_off():
    features, block = good()
    plain = BlockParameters(block.weights, block.norm_weights, block.norm_biases, block.biases)
    expected = make_head("", dtype=torch.float32)
    expected.load_state_dict(make_head(dtype=torch.float32).state_dict(), strict=False)
    for x, y in zip(dyhead_block(features, plain), expected(features), strict=True):
        torch.testing.assert_close(x, y)


FEATURES = {
    "a tensor": (lambda f: f[0], TypeError, r"features must be a list with one tensor a level, got Tensor"),
    "none": (lambda f: [], ValueError, r"features must be a list with one tensor a level, got none"),
    "no tensor": (lambda f: [f[0], None], TypeError, r"features\[1\] must be a tensor"),
    "dimensions": (lambda f: [f[0], f[1][0]], ValueError, r"features\[1\] must be \(N, C, H, W\)"),
    "integers": (lambda f: [f[0].long()], ValueError, r"features\[0\] must be floating point"),
    "batch": (lambda f: [f[0], f[1][:1]], ValueError, r"features\[1\] must have batch and channels"),
    "type": (lambda f: [f[0], f[1].double()], ValueError, r"features\[1\] must be of the type of features\[0\]"),
    "device": (lambda f: [f[0], f[1].to("meta")], ValueError, r"features\[1\] must be on the device"),
    "sizes": (lambda f: [f[0], f[2]], ValueError, r"features must halve .* level 1 is 2x3, half of level 0 is 4x5"),
    "order": (lambda f: f[::-1], ValueError, r"features must halve"),
    "no pixel": (lambda f: [f[0][:, :, :0]], ValueError, r"features\[0\] must have a channel and a pixel"),
}


@pytest.mark.parametrize("change", FEATURES)
def test_levels_that_are_no_pyramid(change):
    features, block = good()
    wrong, error, message = FEATURES[change]
    with pytest.raises(error, match=message):
        dyhead_block(wrong(features), block)


def with_other(values, i, change):
    return [change(x) if n == i else x for n, x in enumerate(values)]


PARAMETERS = {
    "two weights": (lambda b: {"weights": b.weights[:2]}, ValueError, r"parameters.weights must be 3 tensors, got 2"),
    "no weights": (lambda b: {"weights": None}, TypeError, r"parameters.weights must be 3 tensors, got None"),
    "no norm": (lambda b: {"norm_weights": (None,) * 3}, TypeError, r"parameters.norm_weights\[0\] must be a tensor"),
    "weight's shape": (
        lambda b: {"weights": with_other(b.weights, 2, lambda x: x[:16])},
        ValueError,
        r"parameters.weights\[2\] must be \(32, 32, 3, 3\), got shape \(16, 32, 3, 3\)",
    ),
    "bias's shape": (
        lambda b: {"biases": with_other(b.biases, 1, lambda x: x[:16])},
        ValueError,
        r"parameters.biases\[1\] must be \(32,\)",
    ),
    "offsets alone": (
        lambda b: {"offset": [x[:18] for x in b.offset]},
        ValueError,
        r"parameters.offset\[0\] must be \(27, 32, 3, 3\)",
    ),
    "hidden units": (
        lambda b: {"dynamic_relu": with_other(b.dynamic_relu, 2, lambda x: x[:, :4])},
        ValueError,
        r"parameters.dynamic_relu\[2\] must be \(128, 8\)",
    ),
    "a tensor for layers": (
        lambda b: {"dynamic_relu": b.gate[0]},
        TypeError,
        r"parameters.dynamic_relu must be 4 tensors, got Parameter",
    ),
    "no layer": (lambda b: {"dynamic_relu": ()}, ValueError, r"parameters.dynamic_relu must be 4 tensors, got 0"),
    "type": (
        lambda b: {"gate": [x.double() for x in b.gate]},
        ValueError,
        r"parameters.gate\[0\] must be of features' type, torch.float32, got torch.float64",
    ),
    "device": (
        lambda b: {"gate": [x.to("meta") for x in b.gate]},
        ValueError,
        r"parameters.gate\[0\] must be on the device of features",
    ),
    "mode": (lambda b: {"coarse_offsets": "cut"}, ValueError, r"parameters.coarse_offsets must be one of crop, prefix"),
    "groups": (lambda b: {"groups": 12}, ValueError, r"parameters.groups must be a power of two that divides"),
    "many groups": (lambda b: {"groups": 64}, ValueError, r"parameters.groups must be a power of two that divides"),
    "eps": (lambda b: {"eps": "small"}, TypeError, r"parameters.eps must be a number"),
    "relu": (lambda b: {"relu": 1}, TypeError, r"parameters.relu must be True or False"),
}


@pytest.mark.parametrize("change", PARAMETERS)
def test_parameters_that_do_not_fit(change):
    features, block = good()
    wrong, error, message = PARAMETERS[change]
    with pytest.raises(error, match=message):
        dyhead_block(features, replace(block, **wrong(block)))


def test_messages_of_a_stack_name_the_block():
    features, block = good()
    with pytest.raises(ValueError, match=r"blocks\[1\].groups must be"):
        dyhead_blocks(features, [block, replace(block, groups=3)])
    with pytest.raises(TypeError, match=r"blocks\[0\] must be kernels.BlockParameters, got Tensor"):
        dyhead_blocks(features, [features[0]])
    with pytest.raises(TypeError, match=r"blocks must be a list of kernels.BlockParameters, got BlockParameters"):
        dyhead_blocks(features, block)
    with pytest.raises(TypeError, match=r"parameters must be kernels.BlockParameters, got list"):
        dyhead_block(features, [block])
