"""What a cell's evaluation leaves: its detections and replicates as files, and parts of its row that belong to them."""

from types import SimpleNamespace

import numpy as np
from evaluation_scenes import random_scene

from ablations.evaluation.detections import by_image, read_detections
from ablations.evaluation.errors import ERRORS
from ablations.evaluation.evaluate import evaluate
from ablations.evaluation.replicates import NAMES, read_replicates
from ablations.experiment.experiment import evaluate_cell
from ablations.rows.row import from_json, to_json


def test_the_row_belongs_to_the_files(tmp_path):
    ground, predictions = random_scene(0)
    val = SimpleNamespace(
        ground_truth=ground,
        category_ids=(1, 2, 3),
        images=[SimpleNamespace(image_id=image["id"]) for image in ground["images"]],
    )
    parts = {}
    directory = tmp_path / "cells" / "a1"
    evaluate_cell(
        directory, SimpleNamespace(val=val, fingerprint="f"), predictions, False, lambda e: parts.update(e.parts)
    )
    assert {path.name for path in directory.iterdir()} == {"detections.json.gz", "replicates.npz"}
    stored = by_image(read_detections(directory / "detections.json.gz"), range(1, 13), (1, 2, 3))
    assert parts["metrics"] == evaluate(stored, ground, (1, 2, 3)) and parts["images"] == 12
    replicates = read_replicates(directory / "replicates.npz")
    assert replicates.shape == (1000, len(NAMES))
    # The draws lie around the data set that they are drawn from.
    spread = np.nanstd(replicates[:, 0])
    assert 0 < spread < 20 and abs(np.nanmean(replicates[:, 0]) - parts["metrics"]["AP"]) < 2 * spread
    assert list(parts["class_AP"]) == ["1", "2", "3"] and tuple(parts["errors"]) == ERRORS
    assert np.mean(list(parts["class_AP"].values())) - parts["metrics"]["AP"] < 1e-9

    cell = {"detector": "atss", "attentions": "LSC", "depth": 2, "seed": 0}
    row = {"key": "a1", "cell": cell, "status": "ok", **parts}
    assert from_json(to_json(row), "a1") == row
