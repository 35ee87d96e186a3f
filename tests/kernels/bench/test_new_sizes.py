"""Images of new sizes compile no kernel again: what a size decides is neither a constant nor specialised."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

specs = pytest.importorskip("kernels.bench.specs", reason="Triton is not installed")


def _pyramid(height: int, width: int) -> tuple[tuple[int, int], ...]:
    """P3 to P7 of an image, padded to a multiple of 32."""
    sizes = [(-(-height // 32) * 4, -(-width // 32) * 4)]
    for _ in range(4):
        sizes.append(tuple((size + 1) // 2 for size in sizes[-1]))
    return tuple(sizes)


# Sides from 320 to 1,333 pixels, upright and across, in batches of 1 to 16; and two that hold every number that is 1 or
# a multiple of 16.
IMAGES = [(_pyramid(*side), 1 + i % 16) for i in range(24) for side in ((320 + 40 * i, 1333 - 17 * i),)]
IMAGES += [(_pyramid(1333 - 31 * i, 320 + 23 * i), 1 + i % 5) for i in range(24)]
IMAGES += [(((128, 128), (64, 64), (32, 32), (16, 16)), 16), (((3, 1),), 1)]


@pytest.mark.parametrize("family", ["_deform_conv", "_convolutions", "_tail", "_coefficients", "_offsets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_sizes_take_two_variants_of_a_kernel_at_most(family, dtype, monkeypatch):
    found = defaultdict(list)
    for sizes, batch in IMAGES:
        monkeypatch.setattr(specs, "SIZES", sizes)
        monkeypatch.setattr(specs, "BATCH", batch)
        for spec in getattr(specs, family)(dtype):
            variant = replace(spec, kernel=None)
            if variant not in found[spec.name]:
                found[spec.name].append(variant)
    assert len(IMAGES) == 50 and len(found) >= 2
    # The second variant, if any, is that of maps of a single column.
    assert {name: len(variants) for name, variants in found.items() if len(variants) > 2} == {}
