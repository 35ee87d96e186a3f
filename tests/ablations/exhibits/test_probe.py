"""What a probe sees is what the DyHead computes: maps, gates, slopes, and the pixels that S really reads."""

import pytest
import torch

from ablations.exhibits.probe import probe, samples
from heads import build_detector
from heads.dyhead.dyhead import DyHead
from kernels.block.parameters import coarser_offsets

IMAGE = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def detector(**settings):
    torch.manual_seed(0)
    settings = {"attentions": "LSC", "depth": 2} | settings
    return build_detector("atss", num_classes=3, backbone="tiny", channels=16, **settings).eval()


def head_of(model):
    return next(module for module in model.modules() if isinstance(module, DyHead))


@pytest.mark.parametrize("formulation", ["released", "paper"])
@pytest.mark.parametrize("attentions", ["LSC", "", "S"])
def test_maps_are_those_of_the_detector(formulation, attentions):
    model = detector(formulation=formulation, attentions=attentions)
    outputs = []
    model.trunk.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    seen = probe(model, IMAGE)
    assert len(seen.blocks) == 2 and seen.strides == [8, 16, 32, 64, 128]
    names = "SLC" if formulation == "released" else "LSC"
    assert ["in", *names] == [name for name, _ in seen.blocks[0].stages]
    last = seen.blocks[-1].stages[-1][1]
    sizes = {tuple(x.shape) for x in last}
    if formulation == "released":
        for found, output in zip(last, outputs[0], strict=True):
            torch.testing.assert_close(found, output[0].abs().mean(0))
        # What leaves a block enters the next one.
        for before, after in zip(seen.blocks[0].stages[-1][1], seen.blocks[1].stages[0][1], strict=True):
            torch.testing.assert_close(before, after)
    else:
        # From the median level's size the outputs go back to their own; that of the median level is as it is.
        assert len(sizes) == 1
        torch.testing.assert_close(last[2], outputs[0][2][0].abs().mean(0))
    block = seen.blocks[0]
    assert [part is not None for part in (block.gates, block.offsets, block.slopes)] == [
        letter in attentions for letter in "LSC"
    ]


def test_gates_and_slopes_are_the_modules_own():
    model = detector()
    block = head_of(model).blocks[1]
    with torch.no_grad():
        block.scale.gate.weight.zero_()
        block.scale.gate.bias.fill_(1.5)
        block.task.expand.weight.zero_()
        # Hard sigmoid of 1.5 is 3/4: a1 = 1.5, a2 = 0.5.
        block.task.expand.bias.fill_(1.5)
    seen = probe(model, IMAGE)
    gates = [[0.75] * number for number in (2, 3, 3, 3, 2)]
    assert [[round(gate, 6) for gate in level] for level in seen.blocks[1].gates] == gates
    for slopes in seen.blocks[1].slopes:
        torch.testing.assert_close(slopes, torch.tensor([[1.5], [0.5]]).expand(2, 16))


def read_pixels(convolution, maps, offsets, masks, row, column):
    """Columns and rows of the pixels of `maps` that the output pixel depends on."""
    maps = [x.clone().requires_grad_() for x in maps]
    (output,) = convolution.convolve(maps, offsets, masks, None)
    output[0, :, row, column].abs().sum().backward()
    rows, columns = maps[0].grad[0].abs().sum(0).nonzero().unbind(1)
    return set(zip(columns.tolist(), rows.tolist(), strict=True))


@pytest.mark.parametrize("coarse_offsets", ["crop", "resize"])
def test_positions_are_the_pixels_that_the_convolutions_read(coarse_offsets):
    model = detector(coarse_offsets=coarse_offsets, depth=1)
    spatial = head_of(model).blocks[0].spatial
    with torch.no_grad():
        # Whole pixels, another for every tap, so that each position is one pixel.
        spatial.offset.bias[:18] = torch.tensor([0.0, 1, 1, 0, 0, 0, -1, 1, 0, -1, 0, 0, 1, 1, 0, 1, -1, 0])
    captured = []
    head_of(model).register_forward_pre_hook(lambda _, arguments: captured.append(arguments[0]))
    seen = probe(model, IMAGE)
    features = [x.clone() for x in captured[0]]
    with torch.no_grad():
        offsets, masks = spatial.positions(features)
    coarse = [coarser_offsets(x, coarse_offsets) for x in (offsets, masks)]
    level, row, column = 1, 3, 4
    stride = seen.strides[level]
    found = {each.neighbour: each for each in samples(seen, 0, level, (column + 0.5) * stride, (row + 0.5) * stride)}
    assert list(found) == ["same", "finer", "coarser"]
    height, width = features[level].shape[-2:]
    rows, columns = features[level + 1].shape[-2:]
    # The coarser map's convolution is interpolated with aligned corners; its nearest pixel is shown.
    coarse_row, coarse_column = round(row * (rows - 1) / (height - 1)), round(column * (columns - 1) / (width - 1))
    expected = {
        "same": (spatial.from_same, level, [offsets[level]], [masks[level]], row, column),
        "finer": (spatial.from_finer, level - 1, [offsets[level]], [masks[level]], row, column),
        "coarser": (spatial.from_coarser, level + 1, [coarse[0][level]], [coarse[1][level]], coarse_row, coarse_column),
    }
    for name, (convolution, source, *arguments) in expected.items():
        pixels = read_pixels(convolution, [features[source]], *arguments)
        places = found[name].points / seen.strides[source] - 0.5
        size = features[source].shape[-2:]
        inside = {(x, y) for x, y in places.round().int().tolist() if 0 <= x < size[1] and 0 <= y < size[0]}
        assert inside == pixels, name
        assert found[name].mask.tolist() == pytest.approx([0.5] * 9)


def test_positions_of_the_papers_formulation_serve_all_levels():
    seen = probe(detector(formulation="paper"), IMAGE)
    (every,) = samples(seen, 1, 0, 64.0, 40.0)
    assert every.neighbour == "all"
    # The median level has stride 32: column 2, row 1, without offsets the regular grid around its centre.
    assert every.points.tolist() == [[32 * (2 + x) + 16.0, 32 * (1 + y) + 16.0] for y in (-1, 0, 1) for x in (-1, 0, 1)]


def test_nothing_where_there_is_nothing():
    seen = probe(detector(attentions="L"), IMAGE)
    assert samples(seen, 0, 0, 10, 10) == []
    assert samples(probe(detector(), IMAGE), 0, 0, 1e4, 10) == []
    with pytest.raises(ValueError, match="no DyHead"):
        probe(detector(attentions=None, depth=0), IMAGE)
