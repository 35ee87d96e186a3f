"""DyHead against mmdetection's and the authors' own numbers, and what its switches must and must not change."""

import json

import numpy as np
import pytest
import torch
from golden_blocks import run_golden

from heads import DyHead, load_released
from heads.dyhead.attention import ScaleAttention, SpatialAttention
from heads.dyhead.blocks import BLOCKS, PaperBlock
from heads.dyhead.dyhead import ATTENTIONS, FORMULATIONS
from kernels.block.parameters import coarser_offsets

SIZES = [(16, 12), (8, 6), (4, 3), (2, 2), (1, 1)]


def pyramid(channels=32, sizes=SIZES, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *size, generator=generator, dtype=dtype) for size in sizes]


def perturb(module, seed=0):
    """Random weights everywhere, so that no test passes because something starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


GOLDEN_BLOCKS = {
    "mmdet_c32": ["dyhead_mmdet_c32_b1"],
    "mmdet_c32_one_level": ["dyhead_mmdet_c32_b1_1level"],
    "mmdet_c32_zero_offsets": ["dyhead_mmdet_c32_b1_zeroinit"],
    "mmdet_c256": ["dyhead_mmdet_c256_b1_params_f16exact", "dyhead_mmdet_c256_b1_fwd", "dyhead_mmdet_c256_b1_bwd"],
    "official_c32": ["dyhead_official_c32_b1"],
}


@pytest.mark.parametrize("files", GOLDEN_BLOCKS.values(), ids=GOLDEN_BLOCKS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_released_block_equals_its_authors(files, dtype, golden):
    # The file with zero offsets states no float32 error; its twin of the same shapes does.
    meta = json.loads(str(golden(files[0].removesuffix("_zeroinit"))["meta"]))
    error = meta.get("fp32_vs_f64") or meta["max_abs_diff_vs_mmcv64"]["mmcv32"]
    for quantity, ours, theirs, float32_error in run_golden([golden(name) for name in files], error, dtype):
        # Ten times what float32 costs the authors' own operators; in float64 what the stored precision allows.
        tolerance = 10 * float32_error if dtype == torch.float32 else 1e-6 * max(1.0, np.abs(theirs).max())
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=tolerance, err_msg=quantity)


def test_scale_attention_equals_mmdetection(golden):
    data = golden("scale_attn")
    module = ScaleAttention(32).double()
    weight, bias = (torch.from_numpy(data[f"param.scale_attn_module.1.{p}"]).double() for p in ("weight", "bias"))
    with torch.no_grad():
        module.gate.weight.copy_(weight.flatten(1))
        module.gate.bias.copy_(bias)
    maps = [torch.from_numpy(data[f"feat.{i}"]).double().requires_grad_() for i in range(3)]
    (y,) = module([maps])
    (y * torch.from_numpy(data["cot"])).sum().backward()
    np.testing.assert_allclose(y.detach(), data["y"], rtol=0, atol=1e-13)
    # PyTorch's hard sigmoid keeps the 1/6 of its gradient in float32, whatever the tensor's type.
    for i, x in enumerate(maps):
        np.testing.assert_allclose(x.grad, data[f"grad.feat.{i}"], rtol=0, atol=2**-24)
    gradient = data["grad.param.scale_attn_module.1.weight"].reshape(1, -1)
    np.testing.assert_allclose(module.gate.weight.grad, gradient, rtol=2**-23, atol=2**-24)
    np.testing.assert_allclose(module.gate.bias.grad, data["grad.param.scale_attn_module.1.bias"], rtol=2**-23)


@pytest.mark.parametrize(("layout", "count"), [("mmdetection", 1_916_508), ("official", 1_917_276)])
def test_parameters_of_a_block_are_the_published_number(layout, count):
    head = DyHead(256, depth=1)
    if layout == "official":
        for branch in (
            head.blocks[0].spatial.from_finer,
            head.blocks[0].spatial.from_same,
            head.blocks[0].spatial.from_coarser,
        ):
            branch.bias = torch.nn.Parameter(torch.zeros(256))
    assert sum(p.numel() for p in head.parameters()) == count


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("attentions", ATTENTIONS, ids=lambda a: a or "none")
def test_every_subset_keeps_shapes_and_trains_all_its_parameters(attentions, formulation):
    # A gate whose ReLU is closed for the whole batch has no gradient; with this seed none is.
    torch.manual_seed(0)
    head = perturb(DyHead(32, 2, attentions, formulation))
    inputs = [x.requires_grad_() for x in pyramid()]
    outputs = head(inputs)
    assert [y.shape for y in outputs] == [x.shape for x in inputs]
    sum(y.square().sum() for y in outputs).backward()
    for name, tensor in [*head.named_parameters(), *((f"input {i}", x) for i, x in enumerate(inputs))]:
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_a_switch_changes_its_own_attention_only(formulation):
    full = perturb(BLOCKS[formulation](32, "LSC"))
    for attentions in ATTENTIONS:
        block = BLOCKS[formulation](32, attentions)
        shared = block.load_state_dict(full.state_dict(), strict=False)
        assert not shared.missing_keys
        parts = {key.split(".")[0] for key in shared.unexpected_keys}
        off = {"L": "scale", "S": "spatial", "C": "task"}
        assert parts == {off[letter] for letter in "LSC" if letter not in attentions}


def test_offsets_of_zero_are_the_ordinary_convolution_at_half_its_strength():
    # A fresh block has zero offsets and masks of sigmoid(0) = 1/2, which the GroupNorm behind takes out again.
    on, off = SpatialAttention(32).double(), SpatialAttention(32, learned=False).double()
    off.load_state_dict(on.state_dict(), strict=False)
    features = pyramid(dtype=torch.float64)
    for module in (on, off):
        for branch in (module.from_finer, module.from_same, module.from_coarser):
            branch.norm.eps = 0
    for ours, static in zip(on(features)[:3], off(features)[:3], strict=True):
        for a, b in zip(ours, static, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_the_finer_and_the_coarser_neighbour_come_from_where_they_say():
    module = perturb(SpatialAttention(32).double())
    features = pyramid(dtype=torch.float64)
    before = module(features)
    changed = [x.clone() for x in features]
    changed[1] += 1 + torch.rand(changed[1].shape, dtype=torch.float64)
    moved = [
        [not torch.equal(a, b) for a, b in zip(*maps, strict=True)]
        for maps in zip(before, module(changed), strict=True)
    ]
    # Level 1 makes its own offsets, so all its maps move; level 0 sees it as the coarser one, level 2 as the finer one.
    assert moved == [[False, True], [True, True, True], [False, True, False], [False, False, False], [False, False]]


def test_coarse_offsets_modes_differ_only_in_the_coarser_branch():
    features = pyramid(dtype=torch.float64)
    weights = perturb(SpatialAttention(32).double()).state_dict()
    outputs = {}
    for mode in ("crop", "prefix", "resize"):
        module = SpatialAttention(32, mode).double()
        module.load_state_dict(weights)
        outputs[mode] = module(features)
    for mode in ("prefix", "resize"):
        for level, (crop, other) in enumerate(zip(outputs["crop"], outputs[mode], strict=True)):
            same = [torch.equal(a, b) for a, b in zip(crop, other, strict=True)]
            has_coarser = level < len(features) - 1
            assert all(same[: len(same) - has_coarser])
            assert not has_coarser or not same[-1]


def test_crop_takes_the_top_left_corner_and_prefix_the_first_elements():
    offsets, coarser = torch.arange(2 * 18 * 5 * 7).view(2, 18, 5, 7), torch.empty(2, 18, 3, 4)
    (crop,) = coarser_offsets([offsets, coarser], "crop")
    assert torch.equal(crop, offsets[:, :, :3, :4])
    (prefix,) = coarser_offsets([offsets, coarser], "prefix")
    for image, flat in zip(offsets, prefix, strict=True):
        assert flat.flatten().tolist() == image.flatten()[: 18 * 3 * 4].tolist()


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_images_of_a_batch_do_not_see_each_other(formulation):
    head = perturb(DyHead(32, 2, formulation=formulation).double())
    features = pyramid(dtype=torch.float64)
    alone = head([x[1:] for x in features])
    for together, one in zip(head(features), alone, strict=True):
        torch.testing.assert_close(together[1:], one, rtol=0, atol=1e-12)


def test_paper_levels_share_one_offset_and_one_activation():
    block = perturb(PaperBlock(32, "SC").double())
    x = torch.randn(2, 5, 32, 6, 4, dtype=torch.float64)
    x[:, 4] = x[:, 3]
    with torch.no_grad():
        block.spatial.weight[128:160] = block.spatial.weight[96:128]
        for affine in (block.spatial.norm.weight, block.spatial.norm.bias):
            affine[128:160] = affine[96:128]
    y = block(x)
    torch.testing.assert_close(y[:, 4], y[:, 3], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attentions": "LX"}, "subset of the letters"),
        ({"attentions": "LL"}, "subset of the letters"),
        ({"formulation": "mine"}, "released, paper"),
        ({"coarse_offsets": "mine"}, "crop, prefix, resize"),
        ({"channels": 40}, "multiple of 16"),
    ],
)
def test_a_wrong_argument_is_named_with_the_right_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        DyHead(**{"channels": 32, "depth": 1, **arguments})


def test_load_released_lists_everything_that_does_not_fit(golden):
    data = golden("dyhead_mmdet_c32_b1")
    state = {k.removeprefix("param."): torch.from_numpy(v) for k, v in data.items() if k.startswith("param.")}
    state["dyhead_blocks.0.surprise"] = torch.zeros(1)
    del state["dyhead_blocks.0.spatial_conv_offset.bias"]
    with pytest.raises(ValueError) as caught:
        load_released(DyHead(32, 1), state)
    assert "no counterpart here: dyhead_blocks.0.surprise" in str(caught.value)
    assert "missing: blocks.0.spatial.offset.bias" in str(caught.value)
    with pytest.raises(ValueError, match="neither the authors' layout"):
        load_released(DyHead(32, 1), {"conv.weight": torch.zeros(1)})


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_the_last_task_attention_is_split_off_a_copy(formulation):
    head = perturb(DyHead(32, 2, formulation=formulation).double())
    before, features = {name: p.clone() for name, p in head.named_parameters()}, pyramid(dtype=torch.float64)
    outputs = head(features)
    trunk, task = head.split_last_task()
    assert all(torch.equal(p, before[name]) for name, p in head.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(head(features), outputs, strict=True))
    moved = {f"blocks.1.task.{name}": p for name, p in task.named_parameters()}
    rest = dict(trunk.named_parameters())
    assert not moved.keys() & rest.keys() and moved.keys() | rest.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in (moved | rest).items())
    # A map alone is a pyramid of one level.
    x = torch.randn(3, 32, 7, 7, dtype=torch.float64)
    alone = task(x[:, None])[:, 0] if formulation == "paper" else task([x])[0]
    assert torch.equal(task.activate(x), alone) and not torch.equal(alone, x.relu())
    with pytest.raises(ValueError, match="depth 0"):
        DyHead(32, 0, formulation=formulation).split_last_task()


def test_a_formulation_is_checked_without_blocks_too():
    with pytest.raises(ValueError, match="released, paper"):
        DyHead(32, 0, formulation="mine")
