"""A cell's key stays what it was: the rows of earlier runs are found by it."""

import json
from dataclasses import replace

import pytest
from cells import CELL
from places import ROOT

from ablations.grid import only, word

STATIC = replace(CELL, attentions="", depth=1, formulation="paper")
FULL = replace(CELL, attentions="LSC", depth=2, formulation="released", coarse_offsets="crop", seed=1)


@pytest.mark.parametrize(
    ("cell", "key", "training_key", "name"),
    [
        (CELL, "70e0c7aff0397fc9", "ce6a9044180442e7", "atss baseline seed 3"),
        (STATIC, "ca7cb6400503ecb9", "fee0efdbf0b2c73e", "atss none depth 1 paper seed 3"),
        (FULL, "fc4813548cae82f1", "4320011077cb7712", "atss LSC depth 2 seed 1"),
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
    """All but the fingerprint of the training data, which the oldest of them lack."""
    stored = CELL.stored().keys() - {"train_fingerprint"}
    paths = sorted((ROOT / "results" / "cpu" / "cells").glob("*.json"))
    assert len(paths) == 17
    for path in paths:
        assert json.loads(path.read_text())["cell"].keys() - {"train_fingerprint"} == stored
