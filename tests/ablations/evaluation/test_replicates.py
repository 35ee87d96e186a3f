"""Replicates: draws that never change, numbers that belong to them, and files."""

import hashlib

import numpy as np
import pytest
from evaluation_scenes import random_scene, repeated, truth

from ablations.evaluation.errors import ERRORS
from ablations.evaluation.evaluate import evaluate
from ablations.evaluation.replicates import (
    NAMES,
    image_weights,
    read_replicates,
    summarise,
    write_replicates,
)


def test_draws_are_as_many_images_as_there_are():
    weights = image_weights(600, "data", 400)
    assert weights.shape == (400, 600) and (weights.sum(axis=1) == 600).all()
    # Of a multinomial: mean 1, variance 1 - 1/600; four standard errors.
    assert (abs(weights.mean(axis=0) - 1) < 5 / np.sqrt(400)).all()
    assert weights.var() == pytest.approx(1 - 1 / 600, abs=4 * np.sqrt(3 / weights.size))
    assert not (weights[0] == weights[1]).all() and (image_weights(600, "other", 1) != weights[:1]).any()


def test_draws_are_the_raw_bits_of_pcg64():
    """Rows of another year and machine share their draws with today's: no distribution of NumPy's is in between."""
    bits = np.random.PCG64(int(hashlib.sha256(b"2f1c").hexdigest(), 16))
    expected = [[0] * 8 for _ in range(3)]
    for row in expected:
        for _ in range(8):
            row[(int(bits.random_raw()) >> 32) * 8 >> 32] += 1
    assert image_weights(8, "2f1c", 3).tolist() == expected
    assert image_weights(0, "2f1c", 2).shape == (2, 0)


def test_replicates_are_numbers_on_the_images_drawn():
    ground, predictions = random_scene(2, ties=False)
    summary = summarise(ground, predictions, [1, 2, 3], "data", 5)
    assert summary.replicates.shape == (5, len(NAMES)) and summary.replicates.dtype == np.float32
    for row, weights in zip(summary.replicates, image_weights(12, "data", 5), strict=True):
        copies, found_again = repeated(ground, predictions, weights)
        again = evaluate(found_again, copies, [1, 2, 3])
        for name, value in zip(NAMES[:6], row[:6], strict=True):
            assert np.isnan(value) if again[name] is None else value == pytest.approx(again[name], abs=1e-4)
        errors = summarise(copies, found_again, [1, 2, 3], "data", 1).errors
        assert row[6:].tolist() == pytest.approx([errors[name] for name in ERRORS], abs=1e-3)


def test_ap_by_category():
    ground, predictions = random_scene(3)
    summary = summarise(ground, predictions, [1, 2, 3], "data", 1)
    for category, name in ((1, "1"), (2, "2"), (3, "3")):
        alone = ground | {"annotations": [a for a in ground["annotations"] if a["category_id"] == category]}
        # Other categories have no object then, and leave the mean.
        expected = evaluate(predictions, alone, [1, 2, 3])["AP"]
        assert summary.class_AP[name] == pytest.approx(expected, abs=1e-10)
    ground["categories"][2]["name"] = "1"
    again = summarise(ground, predictions, [1, 2, 3], "data", 1)
    assert dict(zip(("1", "2", "3"), again.class_AP.values(), strict=True)) == summary.class_AP
    assert list(again.class_AP) == ["1 (1)", "2", "1 (3)"]


def test_without_ground_truth_there_is_no_number():
    summary = summarise(truth([]), [(1, {"boxes": [[1, 1, 9, 9]], "scores": [0.5], "labels": [0]})], [1], "data", 2)
    assert set(summary.errors.values()) == set(summary.class_AP.values()) == {None}
    assert np.isnan(summary.replicates).all()


def test_replicates_are_read_as_written(tmp_path):
    values = np.random.default_rng(0).normal(size=(7, len(NAMES))).astype(np.float32)
    values[0, 3] = np.nan
    path = tmp_path / "replicates.npz"
    assert read_replicates(path) is None
    write_replicates(path, values)
    assert np.array_equal(read_replicates(path), values, equal_nan=True)
    whole = path.read_bytes()
    write_replicates(path, values)
    assert path.read_bytes() == whole, "the same replicates give the same file"
    for damaged in (whole[:100], whole[:-40], whole[:-1], whole[:90] + bytes(20) + whole[110:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is damaged: "):
            read_replicates(path)
    np.savez(path, names=np.array(["AP"]), values=values[:, :1])
    assert read_replicates(path) is None
