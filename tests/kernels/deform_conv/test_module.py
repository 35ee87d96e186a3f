"""Deformable convolutions as layers: torchvision's constructor and keys, mmcv's keys and mmcv's numbers."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack, deform_conv2d
from kernels.deform_conv.operator import reference

# Golden vectors whose first image has so few output pixels that some convolution predicts offsets and masks exactly.
PREDICTABLE = ["tiny_1x1", "tiny_2x2", "s1_nobias", "s1_groups2_dil2", "s2_dg1", "s2_dg2_even", "s2_far_dg2"]


def inputs(channels=4, taps=9, size=(5, 6), groups=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, channels, *size), (2, 2 * groups * taps, *size), (2, groups * taps, *size))
    x, offset, mask = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, offset, mask.sigmoid()


def mmcv_layer(vectors) -> tuple[ModulatedDeformConv2dPack, dict[str, torch.Tensor]]:
    """A layer of the vectors' geometry, and a state dict with mmcv's keys that predicts their offsets and masks."""
    meta = json.loads(str(vectors["meta"]))
    x, offset, mask = (torch.tensor(vectors[key][:1]).double() for key in ("x", "offset", "mask"))
    weight = torch.tensor(vectors["weight"]).double()
    kernel, geometry = weight.shape[2:], [meta[name] for name in ("stride", "padding", "dilation")]
    groups = x.shape[1] // weight.shape[1], offset.shape[1] // (2 * kernel.numel())
    layer = ModulatedDeformConv2dPack(
        x.shape[1], weight.shape[0], tuple(kernel), *geometry, *groups, bias="bias" in vectors
    )
    # Rows: an output pixel's patch and a 1 for the bias. Columns: mmcv's two thirds of offsets, its third of logits.
    stride, padding, dilation = geometry
    patches = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    patches = torch.cat((patches, torch.ones_like(patches[:, :1])), 1)
    wanted = torch.cat((offset, mask.logit()), 1)
    solution = torch.linalg.lstsq(patches, wanted.movedim(1, 3).flatten(0, 2), driver="gelsd").solution
    state = {
        "weight": weight,
        "conv_offset.weight": solution[:-1].T.reshape(-1, x.shape[1], *kernel),
        "conv_offset.bias": solution[-1],
    }
    return layer.double(), state | ({"bias": torch.tensor(vectors["bias"]).double()} if "bias" in vectors else {})


def assert_gives(layer, vectors):
    expected = torch.tensor(vectors["y"][:1]).double()
    limit = 1e-13 * expected.abs().max().item() * (1 if vectors["y"].dtype == "float64" else 1e6)
    assert (layer(torch.tensor(vectors["x"][:1]).double()) - expected).abs().max().item() <= limit


@pytest.mark.parametrize("file", PREDICTABLE)
def test_a_state_dict_of_mmcv_loads_and_gives_its_numbers(golden, file):
    vectors = golden(f"mdc_{file}")
    layer, state = mmcv_layer(vectors)
    layer.load_state_dict(state, strict=True)
    assert_gives(layer, vectors)


def test_a_state_dict_of_mmcvs_first_version_loads_after_the_stated_renaming(golden):
    vectors = golden("mdc_s2_dg1")
    layer, state = mmcv_layer(vectors)
    old = {f"conv2.{key}".replace(".conv_offset", "_offset"): value for key, value in state.items()}
    assert "conv2_offset.weight" in old
    model = nn.ModuleDict({"conv2": layer})
    with pytest.raises(RuntimeError, match=r"conv2\.conv_offset\.weight"):
        model.load_state_dict(old)
    stated = re.search(r"`\{(re\.sub.*\.items\(\))\}`", ModulatedDeformConv2dPack.__doc__.replace("\n", " "))
    model.load_state_dict(eval(f"{{{stated[1]}}}", {"re": re, "state": old}), strict=True)
    assert_gives(layer, vectors)


def test_without_masks_is_with_masks_of_one():
    layer = DeformConv2dPack(4, 6, 3, padding=1, groups=2, deform_groups=2).double()
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    state = layer.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "weight": (6, 2, 3, 3),
        "conv_offset.weight": (36, 4, 3, 3),
        "conv_offset.bias": (36,),
    }
    modulated = ModulatedDeformConv2dPack(4, 6, 3, padding=1, groups=2, deform_groups=2, bias=False).double()
    # The sigmoid of 40 is 1 in float64.
    extra = {"weight": torch.zeros(18, 4, 3, 3), "bias": torch.full((18,), 40.0)}
    modulated.load_state_dict(
        {"weight": state["weight"]}
        | {f"conv_offset.{k}": torch.cat((state[f"conv_offset.{k}"], x.double())) for k, x in extra.items()}
    )
    x = inputs(dtype=torch.float64)[0]
    torch.testing.assert_close(layer(x), modulated(x), rtol=1e-12, atol=1e-12)
    offset = layer.conv_offset(x)
    expected = reference(x, offset, state["weight"], padding=(1, 1))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_packs_start_as_mmcvs_do():
    x = inputs()[0]
    layer = ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    assert not layer.bias.any() and layer.weight.abs().max() <= 1 / 6 and layer.weight.std() > 0.08
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1) / 2)
    # Kaiming for a ReLU: a bound of sqrt(6 / fan in), and a standard deviation of sqrt(2 / fan in).
    plain = DeformConv2dPack(64, 64, 3, padding=1)
    assert plain.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.02)
    x = torch.rand(1, 64, 4, 4)
    torch.testing.assert_close(plain(x), F.conv2d(x, plain.weight, padding=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_the_layer_is_the_function(masked):
    layer = DeformConv2d(4, 6, (3, 3), stride=(1, 1), padding=2, dilation=2, groups=2)
    x, offset, mask = inputs(groups=2)
    mask = mask if masked else None
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, 1, 2, 2, mask)
    assert torch.equal(layer(x, offset, mask), expected)
    assert torch.equal(layer(input=x, offset=offset, mask=mask), expected)


def test_strides_and_kernels_may_differ_by_axis():
    layer = DeformConv2d(4, 6, (1, 3), (2, 1), (0, 1), (1, 1))
    x = inputs(size=(6, 6))[0]
    expected = F.conv2d(x, layer.weight, layer.bias, (2, 1), (0, 1))
    torch.testing.assert_close(layer(x, torch.zeros(2, 6, 3, 6)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_drawn_as_a_convolutions_are(bias):
    """torchvision's layer and `nn.Conv2d` draw alike: of one seed come the same numbers."""
    layers = []
    for kind in (DeformConv2d, nn.Conv2d):
        torch.manual_seed(3)
        layers.append(kind(6, 4, 3, groups=2, bias=bias).state_dict())
    assert list(layers[0]) == (["weight", "bias"] if bias else ["weight"])
    assert all(torch.equal(value, layers[1][key]) for key, value in layers[0].items())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "stride=(1, 1)"),
        ({"padding": 1, "dilation": (1, 2)}, "stride=(1, 1), padding=(1, 1), dilation=(1, 2)"),
        ({"stride": 2, "groups": 2, "bias": False}, "stride=(2, 2), groups=2, bias=False"),
    ],
)
def test_it_prints_as_torchvisions(options, text):
    assert repr(DeformConv2d(4, 6, 3, **options)) == f"DeformConv2d(4, 6, kernel_size=(3, 3), {text})"


@pytest.mark.parametrize("layer", [DeformConv2d, ModulatedDeformConv2dPack, DeformConv2dPack])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((5, 6, 3), {"groups": 2}, ValueError, "in_channels must be divisible by groups, 2, got 5"),
        ((6, 5, 3), {"groups": 2}, ValueError, "out_channels must be divisible by groups, 2, got 5"),
        ((6, 6, 3), {"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ((6, 6, 0), {}, ValueError, "kernel_size must be at least 1, got 0"),
        ((6, 6, (3, 3, 3)), {}, ValueError, "kernel_size must be a whole number or two"),
        ((6, 6, 3), {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ((6, 6, 3), {"padding": "same"}, TypeError, "padding must be a whole number, got str 'same'"),
        ((6.0, 6, 3), {}, TypeError, "in_channels must be a whole number, got float 6.0"),
    ],
)
def test_what_is_refused(layer, arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        layer(*arguments, **options)


def test_what_packs_refuse():
    with pytest.raises(ValueError, match="divisible by deform_groups, 4, got 6"):
        ModulatedDeformConv2dPack(6, 6, 3, deform_groups=4)
    with pytest.raises(ValueError, match="bias must be False"):
        DeformConv2dPack(6, 6, 3, bias=True)


def layer_and_arguments(kind, dtype=torch.float32):
    layer = kind(4, 6, 3, padding=1)
    if kind is DeformConv2d:
        return layer, inputs(dtype=dtype)
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    return layer, inputs(dtype=dtype)[:1]


KINDS = pytest.mark.parametrize("kind", [DeformConv2d, ModulatedDeformConv2dPack, DeformConv2dPack])


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(kind, dtype):
    layer, arguments = layer_and_arguments(kind)
    expected = layer(*arguments)
    with torch.autocast("cpu", dtype):
        cast = layer(*arguments)
    half = copy.deepcopy(layer).to(dtype)(*(x.to(dtype) for x in arguments))
    for found in (cast, half):
        assert found.dtype == dtype
        assert (found.float() - expected).abs().max() < 16 * torch.finfo(dtype).eps * expected.abs().max()


@KINDS
def test_channels_last_in_channels_last_out(kind):
    layer, (x, *others) = layer_and_arguments(kind)
    found = layer(x.to(memory_format=torch.channels_last), *others)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, layer(x, *others), rtol=1e-5, atol=1e-5)


@KINDS
def test_compiles_whole_with_every_gradient(kind):
    layer, arguments = layer_and_arguments(kind)
    compiled = copy.deepcopy(layer)
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(*arguments).square().sum().backward()
    layer(*arguments).square().sum().backward()
    for (name, found), expected in zip(compiled.named_parameters(), layer.parameters(), strict=True):
        assert expected.grad.any(), name
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=name)
