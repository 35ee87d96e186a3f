"""What the command line says becomes options with the preset's defaults, and nothing of the preset changes."""

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from cells import CELL

from ablations.grid import PRESETS, SHIPPED, build_grid
from ablations.options import parse


def test_what_is_not_said_is_the_presets():
    options = parse(["--grid"])
    assert options.preset == PRESETS["tiny"] and options.grid == "default" and options.detectors == ("atss",)
    assert options.data is None and options.data_name == "generated-tiny" and options.out == Path("runs/tiny")
    assert options.weights == str(SHIPPED["tiny"]) and options.workers is None and options.test_sizes == (128,)
    assert options.command == "python -m ablations.run --grid"
    with pytest.raises(FrozenInstanceError):
        options.grid = "full"


def test_what_is_said_takes_the_presets_place_in_training_and_in_its_cells():
    arguments = ["--train-sizes", "96,128", "--max-size", "200", "--test-sizes", "64", "--backbone", "swin_t"]
    options = parse(["--grid", *arguments, "--data", "some/coco", "--detector", "fcos,atss,fcos"])
    assert (options.preset.image_size, options.preset.max_size, options.test_sizes) == ((96, 128), 200, (64,))
    assert options.preset.backbone == "swin_t" and options.detectors == ("fcos", "atss")
    assert options.out == Path("runs/coco-tiny") and options.data_name == "coco"
    assert PRESETS["tiny"].image_size == (128,) and PRESETS["tiny"].backbone == "tiny"


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        (["--preset", "tiny"], str(SHIPPED["tiny"])),
        (["--preset", "tiny", "--data", "some/coco"], None),
        (["--preset", "tiny", "--backbone", "resnet18"], None),
        (["--preset", "small"], None),
        (["--preset", "paper"], "resnet50"),
        (["--preset", "paper", "--backbone", "swin_t"], "swin_t"),
        (["--preset", "paper", "--weights", "none"], None),
        (["--preset", "tiny", "--weights", "some.pth"], "some.pth"),
    ],
)
def test_paper_begins_with_published_weights_and_tiny_on_generated_data_with_those_that_are_shipped(arguments, weights):
    assert parse(["--grid", *arguments]).weights == weights


def test_masks_are_read_for_detectors_that_learn_them():
    assert not parse(["--grid"]).reading.masks
    assert parse(["--grid", "detectors"]).reading.masks
    assert parse(["--grid", "--detector", "mask_rcnn"]).reading.masks


def test_what_training_is_told_is_told_to_every_detector():
    arguments = ["--steps", "100", "--batch-size", "4", "--accumulate", "2", "--lr", "0.5", "--depths", "1,3,2"]
    options = parse(["--grid", "detectors", "--preset", "small", *arguments, "--precision", "bf16"])
    preset = options.preset
    assert (preset.steps, preset.batch_size, preset.accumulate, preset.lr) == (100, 4, 2, 0.5)
    assert preset.depths == (1, 3, 2) and preset.one_depth == 3, "the grids of one depth take the largest"
    assert options.precision == "bf16"
    for detector in options.detectors:
        assert "lr" not in preset.exceptions_for(detector, "swin_t")
    assert preset.exceptions_for("detr", "tiny") == {"optimizer": "adamw"}
    assert "lr" in PRESETS["small"].exceptions_for("detr", "tiny")
    cells = build_grid("detectors", preset, replace(CELL, **preset.recipe()), options.detectors, 1)
    assert {(cell.lr, cell.steps, cell.batch_size, cell.accumulate) for cell in cells} == {(0.5, 100, 4, 2)}
    assert {cell.depth for cell in cells} == {None, 3}


@pytest.mark.parametrize(("steps", "warmup"), [("100", 10), ("5", 0), ("450", 20), ("5000", 20)])
def test_a_shortened_training_is_not_all_warm_up(steps, warmup):
    assert PRESETS["tiny"].warmup == 20
    assert parse(["--grid", "--steps", steps]).preset.warmup == warmup


def test_the_number_of_seeds_is_the_presets_unless_it_is_said(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], seeds=4))
    assert parse(["--grid"]).seeds == 4 and parse(["--grid", "--seeds", "2"]).seeds == 2
