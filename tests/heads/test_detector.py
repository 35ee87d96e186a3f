"""Backbone, pyramid and the detector that holds them together."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from heads import build_detector
from heads.backbones.fpn import FPN
from heads.backbones.resnet import BACKBONES, FrozenBatchNorm2d, load_imagenet
from heads.build import DETECTORS, TWO_STAGE
from heads.detector import MEAN, STD
from heads.dyhead.dyhead import ATTENTIONS, FORMULATIONS

BOXES = torch.tensor([[8.0, 8.0, 56.0, 50.0], [60.0, 20.0, 90.0, 60.0]])
# torchvision's published parameter counts without the classifier (fc: 512·1000 + 1000, 2048·1000 + 1000).
TORCHVISION_PARAMETERS = {
    "resnet18": 11_689_512 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
}


def images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def target(n=2):
    return {"boxes": BOXES[:n], "labels": torch.arange(n)}


@pytest.mark.parametrize(("name", "count"), TORCHVISION_PARAMETERS.items())
def test_backbones_have_torchvisions_parameters(name, count):
    with torch.device("meta"):
        backbone = BACKBONES[name]()
    # Frozen norms keep as buffers what torchvision counts as parameters.
    frozen = sum(m.weight.numel() + m.bias.numel() for m in backbone.modules() if isinstance(m, FrozenBatchNorm2d))
    assert sum(p.numel() for p in backbone.parameters()) + frozen == count


@pytest.mark.parametrize("size", [(128, 96), (61, 97)])
def test_levels_halve_rounding_up(size):
    body = BACKBONES["tiny"]()
    levels = FPN(body.channels, 16)(body(torch.zeros(2, 3, *size)))
    expected = [tuple(-(-side // stride) for side in size) for stride in FPN.strides]
    assert [tuple(x.shape) for x in levels] == [(2, 16, *e) for e in expected]


def test_every_level_hears_the_coarsest_and_the_finest_hears_only_itself():
    torch.manual_seed(0)
    fpn = FPN((4, 4, 4), 16)
    features = [torch.randn(1, 4, size, size) for size in (16, 8, 4)]
    before = fpn(features)
    for changed, hearers in ((0, {0}), (1, {0, 1}), (2, {0, 1, 2, 3, 4})):
        inputs = [x + (i == changed) for i, x in enumerate(features)]
        after = fpn(inputs)
        assert {i for i in range(5) if not torch.equal(before[i], after[i])} == hearers


def test_frozen_batchnorm_is_batchnorm_in_evaluation():
    norm, frozen = nn.BatchNorm2d(8).double(), FrozenBatchNorm2d(8).double()
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"})
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(frozen.train()(x), norm.eval()(x), rtol=0, atol=1e-14)
    assert not list(frozen.parameters())


def test_weights_load_from_a_file_and_misfits_are_listed(tmp_path):
    source, backbone = BACKBONES["resnet18"](), BACKBONES["resnet18"]()
    state = {**source.state_dict(), "fc.weight": torch.zeros(1000, 512), "bn1.num_batches_tracked": torch.tensor(5)}
    torch.save(state, tmp_path / "weights.pth")
    load_imagenet(backbone, tmp_path / "weights.pth")
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name])

    state["layer9.weight"] = state.pop("conv1.weight")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"missing: \['conv1.weight'\]; unknown: \['layer9.weight'\]"):
        load_imagenet(backbone, tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match="resnet50"):
        load_imagenet(backbone, tmp_path / "absent.pth")


def test_a_weights_file_that_would_run_code_is_refused(tmp_path):
    class Surprise:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"conv1.weight": Surprise()}, tmp_path / "weights.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_imagenet(BACKBONES["resnet18"](), tmp_path / "weights.pth")


def test_a_batch_is_normalised_and_padded_with_zeros():
    model = build_detector("atss", 3, "tiny", None, channels=16)
    small, large = images((40, 50), (64, 33))
    batch = model.batch([small, large])
    assert batch.shape == (2, 3, 64, 64)
    red = (small[0, 7, 9] / 255 - MEAN[0]) / STD[0]
    torch.testing.assert_close(batch[0, 0, 7, 9], red)
    assert not batch[0, :, 40:].any() and not batch[0, :, :, 50:].any() and not batch[1, :, :, 33:].any()
    # uint8 and floating point images are the same thing.
    torch.testing.assert_close(model.batch([small / 255, large / 255]), batch)


@pytest.mark.parametrize("attentions", [None, "LSC", ""], ids=["baseline", "LSC", "none"])
def test_training_gives_losses_and_evaluation_detections(attentions):
    torch.manual_seed(0)
    model = build_detector("atss", 3, "tiny", attentions, depth=1, channels=16)
    # Without a threshold an untrained model has something to say.
    model.head.selection = replace(model.head.selection, score_threshold=0.0)
    batch = images((64, 96), (70, 50))
    losses = model(batch, [target(), target(0)])
    assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert not silent
    model.eval()
    for image, found in zip(batch, model(batch), strict=True):
        height, width = image.shape[-2:]
        boxes, scores = found["boxes"], found["scores"]
        assert boxes.shape == (len(scores), 4) and found["labels"].shape == scores.shape and len(scores) > 0
        assert (boxes >= 0).all() and (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()
        assert (scores[:-1] >= scores[1:]).all()


def crowd(boxes: torch.Tensor) -> dict:
    """Boxes of the first of three categories, so that two never occur, each with a mask that covers all of 64 × 64."""
    mask = torch.ones(1, 64, 64, dtype=torch.uint8).expand(len(boxes), -1, -1)
    return {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.long), "masks": mask}


CORNERS = torch.rand(1100, 2, generator=torch.Generator().manual_seed(0)) * 40
EMPTY, ONE = torch.zeros(0, 4), BOXES[:1]
MANY = torch.cat([CORNERS, CORNERS + 4 + CORNERS.flip(0) / 2], 1)
THIN = torch.tensor([[30.2, 5.0, 30.5, 60.0], [4.0, 33.0, 60.0, 33.001], [50.0, 50.0, 50.001, 50.001]])
VARIANTS = [(name, attentions, "trunk") for name in DETECTORS for attentions in (None, "LSC")]
VARIANTS += [(name, "LSC", "around_roi") for name in TWO_STAGE]


@pytest.mark.parametrize(("name", "attentions", "placement"), VARIANTS, ids=lambda v: v or "baseline")
def test_odd_images_train_and_are_detected(name, attentions, placement):
    """No box in the batch, in one image; boxes thinner than a pixel; 1,100 boxes; categories that never occur."""
    torch.manual_seed(0)
    model = build_detector(name, 3, "tiny", attentions, depth=1, channels=16, placement=placement)
    for batch in ([EMPTY, EMPTY], [EMPTY, ONE], [THIN, MANY]):
        losses = model(images((64, 64), (64, 64)), [crowd(boxes) for boxes in batch])
        assert all(value.isfinite() and value.ndim == 0 for value in losses.values()), losses
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # Without a threshold a model that knows nothing has something to say, too.
    if name in TWO_STAGE:
        model.head.score_threshold = 0.0
    elif name != "detr":
        model.head.selection = replace(model.head.selection, score_threshold=0.0)
    with torch.inference_mode():
        for found in model.eval()(images((64, 64), (40, 33))):
            assert len(found["boxes"]) > 0 and all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", DETECTORS)
def test_every_subset_and_depth_goes_into_every_detector(name, formulation):
    for attentions, depth in [*((subset, 1) for subset in ATTENTIONS), ("LSC", 0), ("LSC", 2)]:
        torch.manual_seed(0)
        model = build_detector(name, 3, "tiny", attentions, depth, formulation, channels=16)
        assert len(model.trunk.blocks) == depth and model.trunk.attentions == attentions
        sum(model(images((64, 64)), [crowd(ONE)]).values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trunk.parameters())


@pytest.mark.parametrize(("argument", "message"), [({"name": "yolo"}, "atss"), ({"backbone": "vgg"}, "resnet50")])
def test_unknown_names_list_the_known_ones(argument, message):
    with pytest.raises(ValueError, match=message):
        build_detector(**{"name": "atss", **argument})
