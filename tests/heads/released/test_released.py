"""Whole detectors under the released key names give the released maps, detections, losses and gradients."""

import json

import numpy as np
import pytest
import torch
from official_weights import official_state
from torch import nn

from heads import load_released
from heads.backbones.fpn import FPN
from heads.backbones.resnet import BasicBlock, Bottleneck, CaffeBottleneck, FrozenBatchNorm2d, ResNet
from heads.dense.atss import CONVENTIONS
from heads.dense.retinanet import RetinaNetHead
from heads.dense.towers import ConvTowers
from heads.detector import Detector
from heads.dyhead.dyhead import DyHead
from heads.released.layouts import build_released, open_released
from heads.released.names import MMDETECTION, translate

SIZE = (160, 192)
CLASSES = 20


class DyHeadBeforeTowers(DyHead):
    """DyHead with a detector's convolution towers behind it, as both releases of RetinaNet keep them."""

    def __init__(self, channels: int, depth: int, towers: int):
        super().__init__(channels, depth, coarse_offsets="prefix")
        self.towers = ConvTowers(channels, towers, norm=False)

    def forward(self, features):
        return self.towers(super().forward(features))


def released_atss_caffe():
    return build_released("mmdet-r50-caffe", CLASSES, depth=2, channels=32, backbone=body(BasicBlock, 8))


def released_atss():
    return build_released("mmdet-r50", CLASSES, depth=1, channels=32, backbone=body(Bottleneck, 4))


def released_retinanet():
    backbone = body(BasicBlock, 8)
    head = RetinaNetHead(in_channels=16, num_classes=CLASSES)
    trunk = DyHeadBeforeTowers(16, 1, towers=1)
    return Detector(backbone, FPN(backbone.channels, 16, p6_from="c5"), trunk, head)


def body(block: type[nn.Module], width: int) -> ResNet:
    return ResNet(block, (1, 1, 1, 1), width, nn.BatchNorm2d)


WHOLE = {
    "whole_atss_dyhead_r18": released_atss_caffe,
    "whole_atss_dyhead_r50style": released_atss,
    "whole_retinanet_dyhead_r18": released_retinanet,
}


@pytest.fixture(params=WHOLE)
def whole(request, golden):
    """The vectors, a detector that has their weights, and ten times what the released code lost in float32."""
    vectors = golden(request.param)
    model = WHOLE[request.param]().eval()
    load_released(model, weights(vectors))
    lost = json.loads(str(vectors["meta"]))["fp32_vs_f64"]
    return vectors, model, {quantity: 10 * value for quantity, value in lost.items()}


def weights(vectors):
    return {k.removeprefix("param."): torch.from_numpy(v) for k, v in vectors.items() if k.startswith("param.")}


def differs(ours: torch.Tensor, theirs: np.ndarray) -> float:
    assert tuple(ours.shape) == theirs.shape
    return float(np.abs(ours.detach().double().numpy() - theirs).max())


def test_maps_and_raw_outputs_are_the_released_ones(whole):
    vectors, model, tolerance = whole
    with torch.no_grad():
        pyramid = model.fpn(model.backbone(torch.from_numpy(vectors["image"])))
        outputs = model.raw(torch.from_numpy(vectors["image"]))
    for level, ours in enumerate(pyramid):
        assert differs(ours, vectors[f"neck0.{level}"]) <= tolerance["neck0"]
    anchors = getattr(model.head, "anchors_per_cell", 1)
    kinds = {"logits": "cls", "deltas": "reg"} | ({"centerness": "ctr"} if hasattr(outputs, "centerness") else {})
    for ours, theirs in kinds.items():
        maps = [vectors[f"head.{theirs}.{level}"][0] for level in range(5)]
        # Channels are anchor by anchor; rows are cell by cell, then anchor by anchor.
        want = [m.reshape(anchors, -1, *m.shape[1:]).transpose(2, 3, 0, 1).reshape(-1, len(m) // anchors) for m in maps]
        want = np.concatenate(want)
        assert differs(getattr(outputs, ours)[0].reshape(want.shape), want) <= tolerance["head"], ours


def test_detections_are_the_released_ones(whole):
    vectors, model, tolerance = whole
    with torch.no_grad():
        (found,) = model.head.predict(model.raw(torch.from_numpy(vectors["image"])), [SIZE])
    for name, factor in (("det_default", 1.0), ("det_rescaled", 1.25)):
        np.testing.assert_array_equal(found["labels"], vectors[f"{name}.labels"])
        assert differs(found["boxes"] / factor, vectors[f"{name}.bboxes"]) <= tolerance[name]
        assert differs(found["scores"], vectors[f"{name}.scores"]) <= tolerance[name]


def test_losses_and_parameter_gradients_are_the_released_ones(whole):
    vectors, model, tolerance = whole
    targets = [{"boxes": torch.from_numpy(vectors["gt_bboxes"]), "labels": torch.from_numpy(vectors["gt_labels"])}]
    losses = model.head.loss(model.raw(torch.from_numpy(vectors["image"])), targets, [SIZE])
    for name, value in losses.items():
        want = float(vectors[f"loss.{name}"].sum())
        assert abs(value.item() - want) <= tolerance["loss"] * abs(want), name
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    stored = {k.removeprefix("grad."): v for k, v in vectors.items() if k.startswith("grad.")}
    assert {translate(key, MMDETECTION) for key in stored} == set(parameters)
    for key, want in stored.items():
        gradient = parameters[translate(key, MMDETECTION)].grad.reshape(want.shape)
        assert differs(gradient, want) <= tolerance["grad(relative to tensor max)"] * np.abs(want).max(), key


# A checkpoint loads whatever these are: strides of the first two convolutions of a bottleneck that halves, ReLU before
# P7, side of the predictors, offset of the anchors, and what the top of heads/dense/atss.py says of the two
# conventions.
SETTINGS = {
    "official": ((2, 1), True, 1, 0.5, CONVENTIONS["official"]),
    "mmdet-r50-caffe": ((2, 1), False, 1, 0.5, CONVENTIONS["mmdet"]),
    "mmdet-r50": ((1, 2), False, 3, 0.0, CONVENTIONS["mmdet"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_layouts_settings_reach_the_detector(name):
    halving, relu, kernel, offset, convention = SETTINGS[name]
    with torch.device("meta"):
        model = build_released(name)
    blocks = [m for m in model.backbone.modules() if isinstance(m, Bottleneck)]
    assert len(blocks) == 16
    strides = [(b.conv1.stride[0], b.conv2.stride[0]) for b in blocks if b.downsample is not None]
    assert strides == [(1, 1), halving, halving, halving]
    assert model.fpn.relu_before_p7 == relu and model.fpn.p6_from == "p5"
    assert model.head.cls_logits.kernel_size == (kernel, kernel)
    assert model.head.anchor_offset == offset and model.head.convention == convention
    assert model.head.pad_divisor == model.divisor
    assert len(model.trunk.blocks) == 6 and {b.spatial.coarse_offsets for b in model.trunk.blocks} == {"prefix"}


@pytest.mark.parametrize(
    ("name", "mean", "std", "order", "size"),
    [
        ("official", (123.675, 116.28, 103.53), (1, 1, 1), (2, 1, 0), (128, 256)),
        ("mmdet-r50-caffe", (123.675, 116.28, 103.53), (1, 1, 1), (2, 1, 0), (128, 256)),
        ("mmdet-r50", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), (0, 1, 2), (128, 160)),
    ],
)
def test_the_backbone_gets_the_pixels_it_was_trained_on(name, mean, std, order, size):
    model = build_released(name, 3, depth=1, channels=16, backbone=body(BasicBlock, 4))
    image = torch.randint(0, 256, (3, 100, 130), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (got,) = model.batch([image])
    assert got.shape == (3, *size)
    want = (image.double() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    # Pixels of 255 carry an error of half a last place through the division by 255.
    torch.testing.assert_close(got[:, :100, :130].double(), want[list(order)], rtol=0, atol=255 * 2**-22)
    assert not got[:, 100:].any() and not got[:, :, 130:].any()


def test_a_whole_official_checkpoint_goes_to_its_places():
    model = build_released(
        "official", 3, depth=2, channels=16, backbone=ResNet(CaffeBottleneck, (1, 2, 1, 1), 4, FrozenBatchNorm2d)
    )
    state = official_state(model)
    load_released(model, {"model": state, "iteration": 90_000})
    loaded = model.state_dict()
    places = {
        "backbone.layer2.1.conv3.weight": "backbone.backbone.bottom_up.res3.1.conv3.weight",
        "backbone.layer4.0.downsample.1.running_var": "backbone.backbone.bottom_up.res5.0.shortcut.norm.running_var",
        "backbone.bn1.bias": "backbone.backbone.bottom_up.stem.conv1.norm.bias",
        "fpn.lateral.2.weight": "backbone.backbone.fpn_lateral5.weight",
        "fpn.output.0.bias": "backbone.backbone.fpn_output3.bias",
        "fpn.p7.weight": "backbone.backbone.top_block.p7.weight",
        "trunk.blocks.1.spatial.from_coarser.bias": "backbone.dyhead_tower.1.DyConv.0.conv.bias",
        "trunk.blocks.0.spatial.from_finer.weight": "backbone.dyhead_tower.0.DyConv.2.conv.weight",
        "head.scales.4.scale": "head.scales.4.scale",
    }
    for ours, theirs in places.items():
        assert torch.equal(loaded[ours], state[theirs]), ours
    # Each tensor went somewhere, and nowhere twice. Sums are rounded in the order of memory.
    found, expected = (sorted(float(v.contiguous().sum()) for v in x.values()) for x in (loaded, state))
    assert found == expected

    # Sizes and kind of the blocks are read off the weights.
    opened = open_released("official", {"model": state})
    assert {type(m) for m in opened.backbone.modules() if isinstance(m, Bottleneck)} == {CaffeBottleneck}
    assert opened.state_dict().keys() == loaded.keys()
    assert all(torch.equal(value, loaded[key]) for key, value in opened.state_dict().items())

    state["head.cls_tower.0.weight"] = state.pop("head.bbox_pred.bias")
    with pytest.raises(ValueError, match=r"(?s)missing: head.bbox_pred.bias.*no counterpart here: head.cls_tower.0"):
        load_released(model, state)


def test_an_unknown_layout_lists_the_known_ones():
    with pytest.raises(ValueError, match="official, mmdet-r50-caffe, mmdet-r50"):
        build_released("gluon")
