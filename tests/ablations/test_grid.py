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
        (CELL, "4e5ea60b3b44b14f", "cbe1a187814c6628", "atss baseline seed 3"),
        (STATIC, "1fbf2fd885176848", "58048f7978b7f85f", "atss none depth 1 paper seed 3"),
        (FULL, "3af7b9c62dd96d7f", "3ba0dc97348c1abe", "atss LSC depth 2 seed 1"),
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
    """All but the fingerprint of the training data and the parts of a step, which the oldest of them lack."""
    later = {"train_fingerprint", "accumulate"}
    paths = sorted((ROOT / "results" / "cpu" / "cells").glob("*.json"))
    assert len(paths) == 17
    for path in paths:
        assert json.loads(path.read_text())["cell"].keys() - later == CELL.stored().keys() - later


def test_all_cells_of_a_seed_come_before_those_of_the_next():
    cells = build_grid("detectors", PRESETS["tiny"], CELL, ["atss", "fcos"], 2)
    assert [(cell.seed, cell.detector) for cell in cells] == [
        (seed, detector) for seed in (0, 1) for detector in ("atss", "atss", "fcos", "fcos")
    ]
