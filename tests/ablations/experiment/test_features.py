"""Maps of a frozen backbone: the same numbers as computing them, computed once, forgotten for another owner."""

import pytest
import torch

from ablations.experiment.features import Features, is_frozen
from heads import build_detector


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_detector("atss", 3, "tiny", "LSC", 1, channels=16)
    model.backbone.freeze(4)
    return model.train()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for size in ((3, 64, 64), (3, 50, 90))]


def targets(*flipped):
    return [{"image_id": number, "flipped": flip} for number, flip in enumerate(flipped)]


class Counted:
    """Counts the images that a model's backbone computes."""

    def __init__(self, model):
        self.images = 0
        model.backbone.register_forward_hook(self.count)

    def count(self, module, inputs, output):
        self.images += len(inputs[0])


def test_a_step_behind_kept_maps_has_the_same_losses(model, images):
    boxes = [torch.tensor([[5.0, 5.0, 40.0, 44.0]]), torch.zeros(0, 4)]
    wanted = [{"boxes": box, "labels": torch.zeros(len(box), dtype=torch.int64)} for box in boxes]
    features = Features().of("mine", model, images, targets(False, False), "fp32")
    expected = model(images, wanted)
    found = model(images, wanted, features=features)
    for name, value in expected.items():
        # Convolutions of one image and of two may add in another order.
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_an_image_is_computed_once_for_each_view_and_owner(model, images):
    counted, features = Counted(model), Features()
    first = features.of("mine", model, images, targets(False, False), "fp32")
    again = features.of("mine", model, images[:1], targets(False), "fp32")
    assert counted.images == 2 + 1  # the small image alone is padded less
    assert torch.equal(features.of("mine", model, images, targets(False, False), "fp32")[0], first[0])
    assert counted.images == 3 and again[0].shape != first[0][:1].shape
    features.of("mine", model, [images[0].flip(-1)], targets(True), "fp32")
    assert counted.images == 4
    features.of("other", model, images[:1], targets(False), "fp32")
    assert counted.images == 5


def test_what_does_not_fit_is_computed_anew(model, images):
    counted, features = Counted(model), Features(most_bytes=0)
    for _ in range(2):
        features.of("mine", model, images, targets(False, False), "fp32")
    assert counted.images == 4


def test_a_frozen_backbone_keeps_weights_and_statistics_in_training(model, images):
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    assert is_frozen(model)
    model.train()(images, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2)
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    half = build_detector("atss", 3, "tiny", "LSC", 1, channels=16)
    half.backbone.freeze(1)
    assert not is_frozen(half)
    half.train()
    assert not half.backbone.bn1.training and half.backbone.layer2[0].bn1.training
