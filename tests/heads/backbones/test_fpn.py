"""Where the pyramid's two extra levels come from, by the plain layers."""

import pytest
import torch
import torch.nn.functional as F

from heads.backbones.fpn import FPN


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("p6_from", ["p5", "c5"])
def test_extra_levels(p6_from, relu):
    torch.manual_seed(0)
    fpn = FPN((4, 6, 8), 16, relu, p6_from)
    for parameter in fpn.parameters():
        torch.nn.init.normal_(parameter)
    features = [torch.randn(2, c, *size) for c, size in ((4, (20, 13)), (6, (10, 7)), (8, (5, 4)))]
    levels = fpn(features)
    assert [tuple(level.shape[-2:]) for level in levels] == [(20, 13), (10, 7), (5, 4), (3, 2), (2, 1)]
    p6 = fpn.p6(levels[2] if p6_from == "p5" else features[2])
    assert torch.equal(levels[3], p6) and (p6 < 0).any()
    assert torch.equal(levels[4], fpn.p7(F.relu(p6) if relu else p6))


def test_unknown_source_of_p6():
    with pytest.raises(ValueError, match="'p5' or 'c5'"):
        FPN((4, 6, 8), 16, p6_from="C5")
