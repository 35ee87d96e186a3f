"""Pyramids of new sizes compile no kernel again: what an image's size decides is neither a constant nor specialised."""

from dataclasses import replace

import pytest
import torch

specs = pytest.importorskip("kernels.bench.specs", reason="Triton is not installed")

# Powers of two, where every size is a multiple of 16 or 1; odd sizes; a batch of one image on one level.
PYRAMIDS = (
    (((128, 128), (64, 64), (32, 32), (16, 16)), 16),
    (((101, 67), (51, 34), (26, 17)), 3),
    (((3, 5),), 1),
)


@pytest.mark.parametrize("family", ["_tail", "_coefficients", "_offsets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_code_serves_every_pyramid(family, dtype, monkeypatch):
    found = []
    for sizes, batch in PYRAMIDS:
        monkeypatch.setattr(specs, "SIZES", sizes)
        monkeypatch.setattr(specs, "BATCH", batch)
        found.append(list(getattr(specs, family)(dtype)))
    for first, *others in zip(*found, strict=True):
        assert all(replace(first, kernel=None) == replace(other, kernel=None) for other in others), first.name
