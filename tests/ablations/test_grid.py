"""A cell's key stays what it was: the rows of earlier runs are found by it."""

import json
from dataclasses import replace

import pytest
from cells import CELL
from places import ROOT

from ablations.grid import PRESETS, build_grid, only, word

STATIC = replace(CELL, attentions="", depth=1, formulation="paper")
FULL = replace(CELL, attentions="LSC", depth=2, formulation="released", coarse_offsets="crop", seed=1)


@pytest.mark.parametrize(
    ("cell", "key", "training_key", "name"),
    [
        (CELL, "f7184632bce8f0e7", "edd1b14b945f7a7a", "atss baseline seed 3"),
        (STATIC, "9911dc8106782e1b", "474787d66df25b9a", "atss none depth 1 paper seed 3"),
        (FULL, "be9f6de3387f00b7", "ffb583e17daade13", "atss LSC depth 2 seed 1"),
    ],
    ids=["baseline", "none", "LSC"],
)
def test_keys_and_names_of_known_cells(cell, key, training_key, name):
    assert (cell.key, cell.training_key, cell.name) == (key, training_key, name)


def test_attentions_are_a_word_where_they_are_stored_printed_and_asked_for():
    cells = [CELL, STATIC, FULL]
    assert [cell.stored()["attentions"] for cell in cells] == ["baseline", "none", "LSC"]
    for cell in cells:
        assert only(cells, word(cell.attentions)) == [cell]


def test_published_rows_have_the_fields_of_a_cell_as_it_is_stored():
    paths = sorted((ROOT / "results" / "cpu" / "cells").glob("*.json"))
    assert len(paths) == 51
    for path in paths:
        assert json.loads(path.read_text())["cell"].keys() == CELL.stored().keys()


def test_all_cells_of_a_seed_come_before_those_of_the_next():
    cells = build_grid("detectors", PRESETS["tiny"], CELL, ["atss", "fcos"], 2)
    assert [(cell.seed, cell.detector) for cell in cells] == [
        (seed, detector) for seed in (0, 1) for detector in ("atss", "atss", "fcos", "fcos")
    ]
