"""`open_detector`: the settings of a detector, read off the names and shapes of its weights."""

import pytest
import torch

from heads import build_detector
from heads.build import DETECTORS, TWO_STAGE
from heads.opened import open_detector, settings_of

SMALL = {"num_classes": 7, "backbone": "tiny", "channels": 16}


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(
    "settings",
    [
        {"attentions": None},
        {"attentions": "", "depth": 1},
        {"attentions": "LS", "depth": 2},
        {"attentions": "SC", "depth": 1},
        {"attentions": "LSC", "depth": 3, "formulation": "paper"},
        {"attentions": "S", "depth": 1, "formulation": "paper"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_what_the_weights_tell(name, settings):
    state = build_detector(name, **SMALL, **settings).state_dict()
    detector = open_detector(name, {"state_dict": {f"module.{key}": value for key, value in state.items()}})
    found = detector.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("name", TWO_STAGE)
@pytest.mark.parametrize("attentions", ["LSC", "S"])
@pytest.mark.parametrize("formulation", ["released", "paper"])
def test_the_attention_behind_roi_align(name, attentions, formulation):
    settings = {"attentions": attentions, "depth": 1, "formulation": formulation, "placement": "around_roi"}
    state = build_detector(name, **SMALL, **settings).state_dict()
    assert settings_of(name, state) == SMALL | settings
    open_detector(name, state)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "swin_t"])
def test_the_backbone(backbone):
    state = build_detector("fcos", 3, backbone, depth=1, channels=16).state_dict()
    assert settings_of("fcos", state)["backbone"] == backbone


def test_a_wrong_file_is_a_value_error_that_lists_what_does_not_fit():
    state = build_detector("atss", **SMALL, depth=1).state_dict()
    with pytest.raises(ValueError, match="unknown detector 'yolo'; the detectors are atss"):
        open_detector("yolo", state)
    with pytest.raises(ValueError, match=r"no weights of 'faster_rcnn'.*head.box.cls_score.weight is missing"):
        open_detector("faster_rcnn", state)
    with pytest.raises(ValueError, match="of no backbone of ours, which are tiny, resnet18"):
        open_detector("atss", {key: value for key, value in state.items() if "layer4" not in key})
    odd = state | {"head.bbox_pred.weight": torch.zeros(4, 16, 5, 5), "extra": torch.zeros(1)}
    del odd["head.centerness.bias"]
    with pytest.raises(ValueError) as problem:
        open_detector("atss", odd)
    assert [line.strip() for line in str(problem.value).splitlines()[1:]] == [
        "without a value: head.centerness.bias",
        "unknown: extra",
        "head.bbox_pred.weight is (4, 16, 5, 5), not (4, 16, 1, 1)",
    ]
