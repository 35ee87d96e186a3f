"""A cell's detector as training begins: what its recipe says of the backbone and of the class logits."""

from dataclasses import replace

import pytest
import torch
from cells import CELL

from ablations.experiment.experiment import build
from ablations.experiment.train import learning_rate
from ablations.grid import SHIPPED
from heads.parameters import parameter_kinds

CELLS = [replace(CELL, detector=name, channels=64) for name in ("atss", "borderdet", "fcos", "reppoints", "retinanet")]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.detector)
def test_class_logits_begin_as_far_apart_as_the_recipe_says_and_the_rest_as_published(cell):
    published, apart = build(cell, 5, None), build(replace(cell, class_std=0.1), 5, None)
    kinds = parameter_kinds(apart)
    before = dict(published.named_parameters())
    drawn = [name for name, value in apart.named_parameters() if not torch.equal(value, before[name])]
    assert drawn == [name for name, kind in kinds.items() if kind.predicts_classes and kind.decays] != []
    for name in drawn:
        assert before[name].std().item() == pytest.approx(0.01, rel=0.2)
        assert dict(apart.named_parameters())[name].std().item() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize(("stages", "trained"), [(1, True), (4, False)])
def test_stages_of_a_pretrained_backbone_are_frozen_and_a_random_one_is_trained(stages, trained):
    cell = replace(CELL, frozen=stages)
    backbone = build(cell, 5, str(SHIPPED["tiny"])).backbone
    assert any(parameter.requires_grad for parameter in backbone.parameters()) == trained
    assert not backbone.conv1.weight.requires_grad
    assert all(parameter.requires_grad for parameter in build(cell, 5, None).backbone.parameters())


def test_the_schedule_is_half_a_cosine_where_the_recipe_says_so():
    cell = replace(CELL, schedule="cosine", steps=100, warmup=0, lr=0.4)
    assert learning_rate(cell, 0) == pytest.approx(0.4)
    assert learning_rate(cell, 50) == pytest.approx(0.2)
    assert learning_rate(cell, 75) == pytest.approx(0.4 * 0.1464466, rel=1e-5)
