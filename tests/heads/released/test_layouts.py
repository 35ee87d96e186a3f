"""Every release at its full size finds a place for each key, and at a small size each number is where it belongs."""

import re

import pytest
import torch
import torch.nn.functional as F
from release_keys import FULL, SMALL, SWIN_L, SWIN_T, keys, random_state

from heads import load_released
from heads.backbones.resnet import Bottleneck
from heads.backbones.swin import PatchMerging, Swin, WindowAttention
from heads.dense import atss, retinanet
from heads.dense.towers import DyHeadBeforeTowers
from heads.released.layouts import build_released, open_released
from heads.released.settings import LAYOUTS
from heads.two_stage import faster_rcnn, rpn

# Not recorded: what counts batches, and RetinaNet's running mean of positives.
UNRECORDED = {"head.running_positives"}


def state_of(name, sizes=None, device="cpu"):
    return random_state(keys(name, sizes or SMALL[name]), device)


def test_every_layout_is_here():
    assert set(FULL) == set(LAYOUTS)


@pytest.mark.parametrize("name", FULL)
def test_every_key_of_a_release_has_a_place(name):
    triples = keys(name, FULL[name])
    assert len({theirs for theirs, _, _ in triples}) == len(triples)
    with torch.device("meta"):
        model = open_released(name, {"state_dict": random_state(triples, "meta")})
    # The layout's own detector has the same parts: nothing was shaped after the weights alone.
    with torch.device("meta"):
        own = build_released(name)
    places = {ours: shape for _, shape, ours in triples if ours}
    kept = {key: value.shape for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert kept.keys() - places.keys() <= UNRECORDED and places.keys() <= kept.keys()
    for key, shape in places.items():
        assert kept[key].numel() == torch.Size(shape).numel(), key
    biases = {key for key in kept if re.search(r"spatial\.from_\w+\.bias", key)}
    assert {key: v.shape for key, v in own.state_dict().items()} == {k: v for k, v in kept.items() if k not in biases}


def numbers(name, part):
    return sum(torch.Size(shape).numel() for _, shape, ours in keys(name, FULL[name]) if ours and ours.startswith(part))


def test_the_lists_of_keys_are_as_large_as_what_they_list():
    # Parameters of the published classifiers, less the last layer; statistics of a ResNet's 26,560 channels are beside.
    assert numbers("official", "backbone.") - 2 * 26_560 == 25_557_032 - 2_049_000
    assert numbers("mmdet-r50", "backbone.") == numbers("official", "backbone.")
    # Swin's last norm gives way to three.
    norms = 2 * (192 + 384 + 768) - 2 * 768
    assert numbers("official-swin-t", "backbone.") - norms == 28_288_354 - 769_000
    norms = 2 * (384 + 768 + 1536) - 2 * 1536
    assert round((numbers("mmdet-swin-l", "backbone.") - norms + 1_537_000) / 1e6, 2) == 196.74
    # Six blocks of the authors', and of mmdetection's, which have no bias before the norms.
    assert numbers("official", "trunk.") == 11_503_656 and numbers("mmdet-r50", "trunk.") == 11_499_048


def in_our_order(merged: torch.Tensor) -> torch.Tensor:
    """mmdetection's channels of 2×2 cells, one by one, at their places in Swin's own order."""
    channels = merged.shape[-1] // 4
    out = torch.empty_like(merged)
    for c in range(channels):
        for row in range(2):
            for column in range(2):
                out[..., (2 * column + row) * channels + c] = merged[..., 4 * c + 2 * row + column]
    return out


@pytest.mark.parametrize("name", SMALL)
def test_every_number_is_where_it_belongs(name):
    triples = keys(name, SMALL[name])
    state = random_state(triples)
    model = open_released(name, {"model": state, "iteration": 90_000})
    loaded = model.state_dict()
    for theirs, _, ours in triples:
        if ours is None:
            continue
        merged = name == "mmdet-swin-l" and ".downsample." in theirs
        want = in_our_order(state[theirs]) if merged else state[theirs]
        assert torch.equal(loaded[ours].flatten(), want.flatten()), (theirs, ours)
    assert model.head.num_classes == 3 and model.divisor == LAYOUTS[name].divisor


def test_merging_is_mmdetections():
    """Unfolded, normed and reduced by mmdetection's weights, a map is what ours makes of the reordered ones."""
    state = {key: value - 0.5 for key, value in state_of("mmdet-swin-l").items()}
    merging = open_released("mmdet-swin-l", state).backbone.layers[1].downsample
    assert isinstance(merging, PatchMerging)
    x = torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(0))
    theirs = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).mT.view(2, 2, 3, 64)
    at = "backbone.stages.1.downsample"
    theirs = F.layer_norm(theirs, (64,), state[f"{at}.norm.weight"], state[f"{at}.norm.bias"])
    want = theirs @ state[f"{at}.reduction.weight"].T
    # Sums of 64 products of about 1/2, in another order.
    torch.testing.assert_close(merging(x), want, rtol=0, atol=64 * 2**-24 * 4)


def test_the_towers_are_behind_dyhead():
    state = {key: (value - 0.5) / 4 for key, value in state_of("official-retinanet-r50").items()}
    model = open_released("official-retinanet-r50", state).eval()
    assert isinstance(model.trunk, DyHeadBeforeTowers)
    generator = torch.Generator().manual_seed(0)
    pyramid = [torch.randn(1, 16, 16 // 2**level, 16 // 2**level, generator=generator) for level in range(5)]
    with torch.no_grad():
        maps = model.trunk(pyramid)
        for tower, found in zip(("cls", "bbox"), maps, strict=True):
            for x, got in zip(model.trunk.dyhead(pyramid), found, strict=True):
                for number in (0, 2, 4, 6):
                    weight, bias = (state[f"head.{tower}_subnet.{number}.{kind}"] for kind in ("weight", "bias"))
                    x = F.relu(F.conv2d(x, weight, bias, padding=1))
                torch.testing.assert_close(got, x, rtol=0, atol=1e-5 * x.abs().max().item())


# Convention, anchors' offset, padding, shorter side, longest, blue first, and whether images are divided by a standard
# deviation: what configurations say beside the weights.
SETTINGS = {
    "official-swin-t": (atss.CONVENTIONS["official"], 0.5, 128, 800, 1333, False, True),
    "mmdet-swin-l": (atss.CONVENTIONS["mmdet"], 0.5, 128, 1200, 2000, False, True),
    "official-retinanet-r50": (retinanet.CONVENTIONS["official"], 0.0, 128, 800, 1333, True, False),
    "official-faster-rcnn-r50": (faster_rcnn.CONVENTIONS["official"], 0.0, 64, 800, 1333, True, False),
    "mmdet-faster-rcnn-r50": (faster_rcnn.CONVENTIONS["mmdet"], 0.0, 32, 800, 1333, False, True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_layouts_settings_reach_the_detector(name):
    convention, offset, divisor, short, longest, bgr, scaled = SETTINGS[name]
    # Means and deviations are known on the CPU alone.
    small = open_released(name, state_of(name))
    with torch.device("meta"):
        model = build_released(name)
    assert model.head.convention == convention and model.divisor == divisor and model.bgr == bgr
    assert (LAYOUTS[name].short_side, LAYOUTS[name].max_size) == (short, longest)
    std = torch.tensor((58.395, 57.12, 57.375) if scaled else (1.0, 1.0, 1.0)) / 255
    torch.testing.assert_close(small.std.flatten(), std)
    torch.testing.assert_close(small.mean.flatten(), torch.tensor((123.675, 116.28, 103.53)) / 255)
    two_stage = "faster-rcnn" in name
    assert (model.head.rpn if two_stage else model.head).anchor_offset == offset
    author = "official" if "official" in name else "mmdet"
    if two_stage:
        assert model.head.rpn.convention == rpn.CONVENTIONS[author]
        assert (model.head.strides, model.head.rpn.strides) == ((4, 8, 16, 32), (4, 8, 16, 32, 64))
        assert (model.head.per_image, model.head.samples, model.head.rpn.samples) == (1000, 512, 256)
        assert model.head.box.fc1.out_features == 1024
    else:
        assert model.fpn.relu_before_p7 == (author == "official") and model.fpn.p6_from == "p5"
    if name == "official-retinanet-r50":
        assert model.head.cells[0][0] == retinanet.cell_anchors([32.0], (0.5,))[0]
    if isinstance(model.backbone, Swin):
        sizes = SWIN_T if name == "official-swin-t" else SWIN_L
        attentions = [m for m in model.backbone.modules() if isinstance(m, WindowAttention)]
        assert {m.pair.shape for m in attentions} == {(sizes.side**2, sizes.side**2)}
        heads = [stage.blocks[0].attn.heads for stage in model.backbone.layers]
        assert heads == list(sizes.heads)
    else:
        halving = (2, 1) if author == "official" else (1, 2)
        blocks = [m for m in model.backbone.modules() if isinstance(m, Bottleneck) and m.downsample is not None]
        assert [(b.conv1.stride[0], b.conv2.stride[0]) for b in blocks] == [(1, 1), halving, halving, halving]
    heads_of = [m for m in model.trunk.modules() if hasattr(m, "coarse_offsets")]
    assert len(heads_of) == 6 and {m.coarse_offsets for m in heads_of} == {"prefix"}


def test_windows_and_attention_heads_are_read_off_the_weights():
    model = open_released("mmdet-swin-l", state_of("mmdet-swin-l"))
    blocks = [block for stage in model.backbone.layers for block in stage.blocks]
    assert {block.side for block in blocks} == {3} and [len(stage.blocks) for stage in model.backbone.layers] == [
        2,
        1,
        2,
        1,
    ]
    assert [stage.blocks[0].attn.heads for stage in model.backbone.layers] == [1, 2, 2, 4]


CONFUSED = {"mmdet-r50-caffe": "mmdet-r50", "mmdet-r50": "mmdet-r50-caffe"}


@pytest.mark.parametrize("name", SMALL)
def test_another_layouts_file_is_refused_by_name(name):
    state = state_of(name)
    fits = sorted({name, CONFUSED.get(name, name)})
    said = {
        "official": "the authors' ATSS on a ResNet",
        "official-swin-t": "the authors' ATSS on a Swin",
        "mmdet-r50-caffe": "mmdetection's ATSS on a ResNet",
        "mmdet-r50": "mmdetection's ATSS on a ResNet",
        "mmdet-swin-l": "mmdetection's ATSS on a Swin",
        "official-retinanet-r50": "the authors' RetinaNet on a ResNet",
        "official-faster-rcnn-r50": "the authors' Faster R-CNN on a ResNet",
        "mmdet-faster-rcnn-r50": "mmdetection's Faster R-CNN on a ResNet",
    }[name]
    for other in LAYOUTS.keys() - {name}:
        with pytest.raises(ValueError) as caught:
            open_released(other, state)
        message = str(caught.value)
        listed = re.search(r"the layouts that have such keys are (.*)$", message)
        assert sorted(listed[1].split(", ")) == fits
        if other in fits:
            # Their keys are the same; the predictors are not.
            assert "shape of head.cls_logits.weight: " in message
        else:
            assert f"layout {other!r} does not fit: the keys are {said}; " in message


def test_a_detector_of_which_no_release_is_known_has_no_layout():
    """mmdetection's RetinaNet with DyHead: its names are known, its settings are not."""
    state = {key: value for key, value in state_of("mmdet-r50").items() if not key.startswith("bbox_head")}
    state["bbox_head.retina_cls.weight"] = torch.zeros(27, 16, 3, 3)
    with pytest.raises(ValueError, match="mmdetection's RetinaNet on a ResNet; no layout has such keys"):
        open_released("mmdet-r50", state)


@pytest.mark.parametrize("name", SMALL)
def test_missing_and_unknown_keys_are_listed(name):
    triples = keys(name, SMALL[name])
    state = random_state(triples)
    generator = torch.Generator().manual_seed(1)
    known = [(theirs, ours) for theirs, _, ours in triples if ours and "backbone.layer" not in ours]
    theirs, ours = known[int(torch.randint(len(known), (), generator=generator))]
    state["extra." + theirs.rsplit(".", 1)[0] + ".thing"] = state.pop(theirs)
    # A layer that is counted to find the sizes may take others with it.
    with pytest.raises(ValueError, match="the state dict does not fit"):
        open_released(name, state)
    model = build_released(name, 3, depth=2, channels=16, backbone=open_released(name, random_state(triples)).backbone)
    with pytest.raises(ValueError) as caught:
        load_released(model, state)
    assert f"missing: {ours}\n" in f"{caught.value}\n"
    assert re.search(r"no counterpart here: .*\.thing", str(caught.value))


def test_a_backbone_of_other_maps_is_refused():
    body = open_released("official", state_of("official")).backbone
    with pytest.raises(ValueError, match="layout 'official-faster-rcnn-r50' needs a backbone of 4 maps, with finest=2"):
        build_released("official-faster-rcnn-r50", backbone=body)
