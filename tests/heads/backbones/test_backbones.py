"""ResNeXt, its deformable variant and Swin: published sizes, published keys, maps of any size, arithmetic."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from heads import build_detector
from heads.backbones.deform import DeformConv
from heads.backbones.resnet import (
    BACKBONES,
    DeformResNeXtBottleneck,
    FrozenBatchNorm2d,
    ResNet,
    ResNeXtBottleneck,
    load_imagenet,
)
from heads.backbones.swin import PatchMerging, Swin, SwinBlock
from heads.two_stage.faster_rcnn import faster_rcnn

DOUBLE = {"dtype": torch.float64}
# Published parameters with the ImageNet classifier, the classifier's own, and channels of C3 to C5. torchvision states
# 83,455,272; the Swin paper 28 M and 197 M, its code 28,288,354, and 196,532,476 for Swin-L with windows of 7. Windows
# of 12 have 23² instead of 13² biases for each head of each block.
SWIN_L_BIASES = (23**2 - 13**2) * (2 * 6 + 2 * 12 + 18 * 24 + 2 * 48)
PUBLISHED = {
    "resnext101_64x4d": (83_455_272, 2048 * 1000 + 1000, (512, 1024, 2048)),
    "swin_t": (28_288_354, 768 * 1000 + 1000 + 2 * 768, (192, 384, 768)),
    "swin_l": (196_532_476 + SWIN_L_BIASES, 1536 * 1000 + 1000 + 2 * 1536, (384, 768, 1536)),
}


def parameters(module: nn.Module) -> int:
    """Parameters, with what frozen norms keep as buffers."""
    frozen = sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, FrozenBatchNorm2d))
    return frozen + sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_backbones_have_the_published_parameters(name):
    count, classifier, channels = PUBLISHED[name]
    with torch.device("meta"):
        backbone = BACKBONES[name]()
    # The norms of the three maps are the detector's.
    own = 2 * sum(channels) if isinstance(backbone, Swin) else 0
    assert parameters(backbone) - own == count - classifier
    assert backbone.channels == channels


def test_the_deformable_variant_adds_the_offsets_of_thirty_blocks():
    with torch.device("meta"):
        plain, deformable = BACKBONES["resnext101_64x4d"](), BACKBONES["resnext101_64x4d_dcn"]()
    offsets = sum(blocks * (27 * 9 * inner + 27) for blocks, inner in ((4, 512), (23, 1024), (3, 2048)))
    assert parameters(deformable) - parameters(plain) == offsets
    added = set(deformable.state_dict()) - set(plain.state_dict())
    assert len(added) == 60 and all(".conv2.conv_offset." in key for key in added)
    assert not any(key.startswith("layer1.") for key in added)
    assert plain.state_dict()["layer1.0.conv2.weight"].shape == (256, 4, 3, 3)


SMALL = {
    "resnext": partial(ResNet, ResNeXtBottleneck, (1, 1, 1, 1), 16, nn.BatchNorm2d),
    "deformable": partial(
        ResNet, [ResNeXtBottleneck] + 3 * [DeformResNeXtBottleneck], (1, 1, 1, 1), 16, nn.BatchNorm2d
    ),
    "swin": partial(Swin, 8, (2, 1, 1, 2), (2, 2, 4, 4), 3),
}


@pytest.mark.parametrize("finest", [3, 2])
@pytest.mark.parametrize("name", SMALL)
def test_maps_halve_rounding_up_and_everything_trains(name, finest):
    torch.manual_seed(0)
    body = SMALL[name](finest=finest)
    size = (61, 97)
    maps = body(torch.randn(2, 3, *size))
    strides = (4, 8, 16, 32)[finest - 2 :]
    expected = [(2, c, *(-(-s // stride) for s in size)) for c, stride in zip(body.channels, strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected
    sum(m.square().sum() for m in maps).backward()
    silent = [key for key, p in body.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent
    body.freeze(1)
    assert not all(p.requires_grad for p in body.parameters()) and any(p.requires_grad for p in body.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_a_backbone_begins_with_c2_or_c3(name):
    with pytest.raises(ValueError, match="finest must be 3, for C3, or 2, for C2, got 1"):
        SMALL[name](finest=1)
    with pytest.raises(ValueError, match="make the backbone with finest=2, not 3"):
        faster_rcnn(SMALL[name](), 3, 16, None)


def test_a_detector_with_a_pyramid_from_c2_takes_a_transformer(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(BACKBONES, "swin_t", SMALL["swin"])
    model = build_detector("faster_rcnn", 3, "swin_t", "LSC", depth=1, channels=16).eval()
    with torch.inference_mode():
        (found,) = model([torch.randint(0, 256, (3, 70, 101), dtype=torch.uint8)])
    assert model.backbone.channels == (8, 16, 32, 64)
    assert found["boxes"].isfinite().all() and found["boxes"].shape == (len(found["scores"]), 4)


def test_a_deformable_convolution_without_offsets_is_half_the_ordinary_one():
    torch.manual_seed(0)
    layer, x = DeformConv(8, 12, 2, 4).double(), torch.randn(2, 8, 7, 9, **DOUBLE)
    ordinary = F.conv2d(x, layer.weight, stride=2, padding=1, groups=4)
    torch.testing.assert_close(layer(x), ordinary / 2, rtol=0, atol=1e-14)
    # One pixel down for every tap, at full strength: the ordinary convolution of the moved map.
    with torch.no_grad():
        layer.conv_offset.bias[0:18:2] = 1.0
        layer.conv_offset.bias[18:] = 50.0
    moved = F.conv2d(F.pad(x, (1, 1, 0, 2)), layer.weight, stride=2, groups=4)
    torch.testing.assert_close(layer(x), moved, rtol=0, atol=1e-13)


def window_attention(block: SwinBlock, x: torch.Tensor) -> torch.Tensor:
    """A Swin block by its definition, cell by cell: a window is the cells of one tile of a grid that begins at `shift`.

    A cell attends the cells of its own tile, which the border of the map cuts off; no cells are rolled and no scores
    are masked.
    """
    n, height, width, channels = x.shape
    side, shift, attention = block.side, block.shift, block.attn
    tall, wide = (math.ceil(length / side) * side for length in (height, width))
    normed = x.new_zeros(n, tall, wide, channels)
    normed[:, :height, :width] = block.norm1(x)
    out = torch.zeros_like(x)
    heads, size = attention.heads, channels // attention.heads
    for image in range(n):
        query, key, value = F.linear(normed[image], attention.qkv.weight, attention.qkv.bias).chunk(3, dim=-1)
        for y in range(height):
            for x_ in range(width):
                tile = ((y - shift) // side, (x_ - shift) // side)
                near = [
                    (v, u)
                    for v in range(tall)
                    for u in range(wide)
                    if ((v - shift) // side, (u - shift) // side) == tile
                ]
                found = []
                for head in range(heads):
                    part = slice(head * size, (head + 1) * size)
                    table = attention.relative_position_bias_table[:, head].view(2 * side - 1, 2 * side - 1)
                    score = torch.stack(
                        [
                            query[y, x_, part] @ key[v, u, part] / math.sqrt(size)
                            + table[y - v + side - 1, x_ - u + side - 1]
                            for v, u in near
                        ]
                    )
                    found.append(score.softmax(0) @ torch.stack([value[v, u, part] for v, u in near]))
                out[image, y, x_] = attention.proj(torch.cat(found))
    x = x + out
    inner = F.gelu(F.linear(block.norm2(x), block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x + F.linear(inner, block.mlp.fc2.weight, block.mlp.fc2.bias)


@pytest.mark.parametrize("shift", [0, 1])
def test_window_attention_equals_its_definition(shift):
    torch.manual_seed(0)
    block = SwinBlock(8, 2, 3, shift).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = torch.randn(1, 5, 7, 8, **DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(block(x), window_attention(block, x), rtol=0, atol=1e-12)


def test_merging_reads_two_by_two_cells_column_by_column():
    layer = PatchMerging(1).double()
    layer.norm = nn.Identity()
    with torch.no_grad():
        layer.reduction.weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0], [0, 0, 0, 0]]))
    x = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]], **DOUBLE)[None, :, :, None]
    # (0, 0), (1, 0), (0, 1), (1, 1); the last column is padded with zeros.
    assert layer(x)[0, 0, :, 0].tolist() == [1 + 30 + 200 + 4000, 5 + 60]


def test_weights_of_the_swin_release_load_without_what_a_detector_has_no_use_for(tmp_path):
    source, target = SMALL["swin"](), SMALL["swin"]()
    state = {k: v for k, v in source.state_dict().items() if not k.startswith(("norm1.", "norm2.", "norm3."))}
    assert {
        "patch_embed.proj.weight",
        "layers.0.blocks.1.attn.relative_position_bias_table",
        "layers.2.downsample.reduction.weight",
        "layers.3.blocks.1.mlp.fc2.bias",
    } <= set(state)
    extras = {
        "norm.weight": torch.ones(64),
        "head.bias": torch.zeros(1000),
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 9, 9),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.long),
    }
    torch.save({"model": {**state, **extras}}, tmp_path / "swin.pth")
    load_imagenet(target, tmp_path / "swin.pth")
    assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())

    del state["layers.1.blocks.0.norm1.bias"]
    torch.save({"model": state}, tmp_path / "swin.pth")
    with pytest.raises(ValueError, match=r"missing: \['layers.1.blocks.0.norm1.bias'\]; unknown: none"):
        load_imagenet(target, tmp_path / "swin.pth")
