"""What the command line says becomes options with the preset's defaults, and nothing of the preset changes."""

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from ablations.grid import PRESETS, SHIPPED
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
