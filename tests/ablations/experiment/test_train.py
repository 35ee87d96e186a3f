"""The schedule, the parameter groups and the exactness of a resumed run, step by step."""

from dataclasses import replace

import pytest
import torch
from cells import CELL
from torch import nn

from ablations.data.batch import Batch
from ablations.experiment.curve import read_curve
from ablations.experiment.train import MAX_GRADIENT_NORM, Diverged, learning_rate, parameter_groups, train
from ablations.grid import PRESETS
from heads import DyHead
from heads.backbones.deform import DeformConv
from heads.backbones.swin import WindowAttention


class Line(nn.Module):
    """Fits y = wx; called as a detector is whose loader has checked the targets."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.scale = scale

    def forward(self, images, targets, *, check_targets, features, extent):
        assert not check_targets and features is None
        x = torch.stack(images)
        y = torch.stack([t["y"] for t in targets])
        return {"loss_fit": self.scale * (x * self.weight + self.bias - y).square().mean()}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(2, 1, generator=generator)
    return Batch(list(x), [{"y": 3 * value + 1} for value in x], (1, 1))


def test_warm_up_is_linear_and_the_rate_falls_at_67_and_89_percent():
    assert [learning_rate(CELL, step) for step in (0, 4, 9, 10, 66)] == pytest.approx([0.01, 0.05, 0.1, 0.1, 0.1])
    assert [learning_rate(CELL, step) for step in (67, 88, 89, 99)] == pytest.approx([0.01, 0.01, 0.001, 0.001])


def test_weight_decay_is_for_weights_only_and_frozen_parameters_stay_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), WindowAttention(4, 2, 7))
    model[2].requires_grad_(False)
    decayed, free = parameter_groups(model, replace(CELL, weight_decay=0.5))
    assert decayed["weight_decay"] == 0.5 and [p.shape for p in decayed["params"]] == [(4, 3, 3, 3), (12, 4), (4, 4)]
    # Of the window attention, the biases of its two matrices and the table of relative positions.
    assert free["weight_decay"] == 0.0 and [p.ndim for p in free["params"]] == [1, 1, 1, 2, 1, 1]
    assert {decayed["lr_share"], free["lr_share"]} == {1.0}


def test_the_backbone_can_have_a_rate_of_its_own(tmp_path):
    """With AdamW the first step of every weight is as long as its rate."""
    cell = replace(CELL, steps=1, warmup=0, weight_decay=0.0, optimizer="adamw", lr=1e-2, backbone_lr=0.1)
    model = nn.ModuleDict({"backbone": Line(), "head": Line()})
    model.forward = lambda *batch, **options: (
        model["backbone"](*batch, **options) | {"loss_head": model["head"](*batch, **options)["loss_fit"]}
    )
    train(cell, model, batch, torch.device("cpu"), tmp_path)
    assert model["head"].weight.item() == pytest.approx(1e-2, rel=1e-4)
    assert model["backbone"].weight.item() == pytest.approx(1e-3, rel=1e-4)


def test_what_predicts_offsets_can_learn_more_slowly():
    model = nn.ModuleDict({"backbone": DeformConv(4, 4), "trunk": DyHead(16, 1), "head": Line()})
    groups = parameter_groups(model, replace(CELL, backbone_lr=0.5, offset_lr=0.1))
    shares = {parameter: group["lr_share"] for group in groups for parameter in group["params"]}
    found = {name: shares[parameter] for name, parameter in model.named_parameters()}
    slow = {"backbone.conv_offset.weight": 0.05, "backbone.conv_offset.bias": 0.05}
    slow |= dict.fromkeys(("trunk.blocks.0.spatial.offset.weight", "trunk.blocks.0.spatial.offset.bias"), 0.1)
    assert {name: found.pop(name) for name in slow} == pytest.approx(slow)
    assert set(found.values()) == {0.5, 1.0} and found["backbone.weight"] == 0.5


def test_an_unknown_optimizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; it is sgd or adamw"):
        train(replace(CELL, optimizer="lion"), Line(), batch, torch.device("cpu"), tmp_path)


def test_training_learns_and_counts(tmp_path):
    model = Line()
    losses = {}
    result = train(CELL, model, batch, torch.device("cpu"), tmp_path, report=losses.__setitem__)
    assert result["steps"] == 100 and result["images"] == 200 and list(losses) == list(range(1, 101))
    # The mean of the last tenth, which is nothing beside what it began with.
    assert result["loss"] == pytest.approx(sum(losses[step] for step in range(91, 101)) / 10)
    assert result["loss"] < 0.01 * losses[1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stop", [1, 19, 20, 21, 57, 99])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(stop, optimizer, tmp_path):
    cell = replace(CELL, optimizer=optimizer)
    whole, stopped, resumed = Line(), Line(), Line()
    expected = train(cell, whole, batch, torch.device("cpu"), tmp_path / "whole")

    class Killed(Exception):
        pass

    def deadly(step):
        if step == stop:
            raise Killed
        return batch(step)

    with pytest.raises(Killed):
        train(cell, stopped, deadly, torch.device("cpu"), tmp_path / "part")
    with torch.no_grad():
        resumed.weight.fill_(7.0)
        if stop < 20:
            resumed.weight.zero_()
    result = train(cell, resumed, batch, torch.device("cpu"), tmp_path / "part")
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(resumed.bias, whole.bias)
    assert result["loss"] == expected["loss"]


def test_gradients_are_clipped(tmp_path):
    # One step moves by the rate times a gradient of at most the limit; unclipped it would be a million times as long.
    model = Line(scale=1e6)
    cell = replace(CELL, steps=1, warmup=0, lr=1e-3, weight_decay=0.0)
    train(cell, model, batch, torch.device("cpu"), tmp_path)
    moved = torch.cat([model.weight.flatten(), model.bias]).detach().norm()
    # After 67 % of one step the rate is still the first one.
    assert moved.item() == pytest.approx(1e-3 * MAX_GRADIENT_NORM, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_parts(tmp_path):
    model = Line(scale=float("inf"))
    with pytest.raises(Diverged, match=r"step 1 of 100: loss_fit (inf|nan)"):
        train(CELL, model, batch, torch.device("cpu"), tmp_path)
    (path,) = tmp_path.iterdir()
    assert read_curve(path) == [{"step": 1, "lr": pytest.approx(0.01), "loss": None, "loss_fit": None}]


def test_presets_train_every_cell_alike():
    for preset in PRESETS.values():
        assert preset.one_depth in preset.depths and preset.warmup < preset.steps


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_takes_the_same_batches_and_the_mean_of_their_losses(parts, tmp_path):
    """The loss of a line is a mean over images, so equal parts weigh as they do in the whole batch."""

    def larger(step):
        images, targets, extent = batch(step)
        more, others, _ = batch(1000 + step)
        return Batch(images + more, targets + others, extent)

    shown = []

    class Watched(Line):
        def forward(self, images, targets, *, check_targets, features, extent):
            shown.append(len(images))
            return super().forward(images, targets, check_targets=check_targets, features=features, extent=extent)

    whole, split = Line(), Watched()
    cell = replace(CELL, batch_size=4)
    expected = train(cell, whole, larger, torch.device("cpu"), tmp_path / "whole")
    result = train(replace(cell, accumulate=parts), split, larger, torch.device("cpu"), tmp_path / "parts")
    assert shown == [4 // parts] * parts * cell.steps
    assert torch.allclose(split.weight, whole.weight, rtol=1e-5) and torch.allclose(split.bias, whole.bias, rtol=1e-5)
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-9)
