"""What a dry run says of cells: the time of their kind, or their size and an estimate of memory."""

from dataclasses import replace

import pytest
import torch
from cells import CELL
from synthetic_rows import make_row

from ablations import run
from ablations.cost import estimate, total, whole
from ablations.data.coco import read_dataset
from ablations.experiment.experiment import build
from ablations.experiment.measure import count_gmacs, count_parameters
from ablations.generate import generate
from ablations.grid import PRESETS, with_dyhead
from ablations.plan import training_seconds
from ablations.rows.store import write_row

TINY = PRESETS["tiny"]
BASE = replace(CELL, **TINY.recipe() | {"channels": 16}, test_size=TINY.image_size)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data"), "tiny", train=6, val=4)


@pytest.mark.parametrize(
    ("cell", "attentions", "depth", "formulation"),
    [
        (BASE, "", 3, "released"),
        (BASE, "SC", 2, "paper"),
        (replace(BASE, detector="faster_rcnn", placement="around_roi"), "LS", 3, "released"),
    ],
    ids=["none", "paper", "around_roi"],
)
def test_a_detector_of_many_blocks_costs_what_it_is_said_to(cell, attentions, depth, formulation):
    """Against the detector itself, of which only the costs of one with a single block were taken."""
    cell, size = with_dyhead(cell, attentions, depth, formulation, "crop"), (96, 128)
    cost, itself = total(cell, 3, 1, size), whole(cell, 3, 1, size)[0]
    model = build(cell, 3, None)
    assert cost.macs / 1e9 == pytest.approx(count_gmacs(model, [torch.empty(3, *size)]), rel=1e-12)
    assert cost.parameters == count_parameters(model)
    assert (cost.trained, cost.saved) == (itself.trained, itself.saved)


def test_memory_falls_with_parts_and_half_precision_and_frozen_stages(data):
    dataset = read_dataset(data)
    memory = estimate(BASE, dataset).memory_MB
    assert memory > 16 * estimate(BASE, dataset).params_M * 0.9
    for less in ({"accumulate": 4}, {"precision": "bf16"}, {"weights": "some", "frozen": 1}, {"image_size": (64,)}):
        assert estimate(replace(BASE, **less), dataset).memory_MB < memory
    assert estimate(replace(BASE, optimizer="sgd"), dataset).memory_MB < memory
    assert estimate(replace(BASE, accumulate=4, batch_size=32), dataset).memory_MB == memory


def test_saved_for_backward_is_what_autograd_saves():
    """One pass in earnest: the bytes of all storages that its graph holds, but for weights."""
    cost, _ = whole(BASE, 3, 2, (64, 96))
    model = build(BASE, 3, None).train()
    storages = {}

    def pack(value):
        storages[value.untyped_storage()._cdata] = value.untyped_storage()
        return value

    own = {value.untyped_storage()._cdata for value in [*model.parameters(), *model.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        model.raw(model.batch([torch.zeros(3, 64, 96)] * 2))
    assert cost.saved == sum(storage.nbytes() for key, storage in storages.items() if key not in own)


def row(attentions, depth, seconds, **cell):
    stored = {**BASE.stored(), "image_size": list(BASE.image_size), "test_size": list(BASE.test_size)}
    changed = {"attentions": attentions, "depth": depth, **cell}
    made = make_row(attentions, depth or 1, cell={**stored, **changed})
    return made | {"training": {"steps": 100, "images": 100, "seconds": seconds}}


def test_the_pace_is_that_of_the_rows_most_alike():
    cell = replace(with_dyhead(BASE, "LS", 2, "released", "crop"), steps=50, batch_size=4)
    rows = [row("LSC", 1, 100.0), row("baseline", None, 10.0), row("LSC", 2, 500.0, detector="fcos")]
    # A pace is seconds an image; the cell trains on 200.
    assert training_seconds(cell, rows) == pytest.approx(200)
    rows += [row("none", 3, 150.0), row("C", 2, 300.0), row("C", 2, 320.0, seed=1)]
    assert training_seconds(cell, rows) == pytest.approx(620)
    rows += [row("L", 2, 400.0)]
    assert training_seconds(cell, rows) == pytest.approx(800)
    assert training_seconds(replace(BASE, steps=50, batch_size=4), rows) == pytest.approx(20)
    for other in ({"detector": "detr"}, {"precision": "bf16"}, {"image_size": (96,)}, {"device_kind": "cuda"}):
        assert training_seconds(replace(cell, **other), rows) is None


def test_a_dry_run_gives_the_time_where_it_is_known_and_the_size_elsewhere(data, tmp_path, capsys):
    write_row(tmp_path, row("baseline", None, 85.0, channels=TINY.channels))
    arguments = ["--grid", "combinations", "--data", str(data), "--out", str(tmp_path), "--dry-run", "--seeds", "2"]
    assert run.main([*arguments, "--steps", "50", "--batch-size", "4", "--only", "attentions=baseline"]) == 0
    printed = capsys.readouterr().out
    # 200 images at 0.85 s, and evaluation: 200 s a cell.
    assert printed.count("to run       about 3:20\n") == 2 and "for 2 cells, as rows say" in printed
    assert "parameters" not in printed and "not known" not in printed
    assert run.main([*arguments, "--only", "LSC", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert " M parameters, " in printed and " GMACs, about " in printed and " MB to train\n" in printed
    assert "time not known: 1 cells" in printed
