"""Masks: what `ablations.segments` reads is what pycocotools reads."""

import numpy as np
import pytest
from pycocotools import mask as rle

from ablations.segments import run_lengths, segmentation_problem


@pytest.mark.parametrize("seed", range(8))
def test_compressed_run_lengths_decode_as_pycocotools_does(seed):
    generator = np.random.default_rng(seed)
    shape = [(1, 1), (1, 50), (37, 1), (31, 33), (480, 640), (200, 1), (64, 64), (99, 98)][seed]
    density = generator.uniform(0, 1)
    # Blocks, so that long runs and differences of both signs occur.
    mask = np.kron(generator.random(shape) < density, np.ones((3, 2))).astype(np.uint8)
    encoded = rle.encode(np.asfortranarray(mask))
    text = encoded["counts"].decode()
    flat = mask.flatten("F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    expected = np.diff(np.concatenate(([0], ends, [flat.size])))
    if flat[0]:
        expected = np.concatenate(([0], expected))
    assert run_lengths(text).tolist() == expected.tolist()
    assert segmentation_problem({"counts": text, "size": list(mask.shape)}, *mask.shape[::-1]) is None
    if text != "0":
        assert segmentation_problem({"counts": text[:-1], "size": list(mask.shape)}, *mask.shape[::-1])
