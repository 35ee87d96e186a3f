"""What a training treats apart, asked of the modules and not of the names of their layers."""

import pytest
import torch
from torch import nn

from heads import build_detector
from heads.backbones.resnet import BACKBONES
from heads.build import DETECTORS
from heads.parameters import ParameterKind, SpecialParameters, parameter_kinds

# The detectors that learn their classes by a focal loss, and the layers that give it their logits.
FOCAL = ("atss", "borderdet", "fcos", "reppoints", "retinanet")
CLASS_LAYERS = ("head.cls_logits", "head.border_cls", "head.cls_out", "head.cls_score")
VARIANTS = [(name, "tiny", attentions, "released") for name in DETECTORS for attentions in (None, "LSC")]
VARIANTS += [("atss", name, "LSC", "paper") for name in BACKBONES]


@pytest.mark.parametrize(("name", "backbone", "attentions", "formulation"), VARIANTS, ids=lambda v: v or "baseline")
def test_kinds_of_every_detector_are_those_that_its_names_tell(name, backbone, attentions, formulation):
    """The names are those of the released weights; whoever trains must not know them, but here they say it."""
    with torch.device("meta"):
        model = build_detector(name, 3, backbone, attentions, 1, formulation, channels=16)
    kinds = parameter_kinds(model)
    assert list(kinds) == [parameter for parameter, _ in model.named_parameters()]
    for parameter, value in model.named_parameters():
        assert kinds[parameter] == ParameterKind(
            decays=value.ndim > 1 and not parameter.endswith("relative_position_bias_table"),
            in_backbone=parameter.startswith("backbone."),
            predicts_offsets=parameter.rpartition(".")[0].endswith("offset"),
            predicts_classes=name in FOCAL and parameter.rpartition(".")[0] in CLASS_LAYERS,
        ), parameter


def test_a_module_speaks_for_its_own_layers_only():
    class Special(SpecialParameters):
        offset_layers, position_biases = ("where",), ("table",)

        def __init__(self):
            super().__init__()
            self.where, self.other = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
            self.table = nn.Parameter(torch.zeros(2, 2))

    model = nn.ModuleDict({"where": nn.Linear(2, 2), "special": Special()})
    kinds = parameter_kinds(model)
    assert {name for name, kind in kinds.items() if kind.predicts_offsets} == {
        "special.where.weight",
        "special.where.bias",
    }
    assert {name for name, kind in kinds.items() if kind.decays} == {
        "where.weight",
        "special.where.weight",
        "special.other.0.weight",
    }
    assert not any(kind.in_backbone for kind in kinds.values())


def test_a_root_may_be_special_itself():
    class Table(SpecialParameters):
        position_biases = ("table",)

        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(2, 2))

    assert parameter_kinds(Table()) == {"table": ParameterKind(False, False, False, False)}
