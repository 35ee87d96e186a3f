"""What a dry run says of cells: the time of their kind, or their size, an estimate of memory, and GPU hours."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from cells import CELL
from synthetic_rows import make_row
from torch.utils.flop_counter import FlopCounterMode

from ablations import run
from ablations.cost import gpus
from ablations.cost.estimate import counted, estimate, evaluated_pixels, total, trained_pixels, whole
from ablations.cost.gpus import gpu, makespan, span
from ablations.data.coco import read_dataset
from ablations.data.loader import Loader
from ablations.experiment.experiment import build
from ablations.experiment.measure import count_gmacs, count_parameters
from ablations.generate import generate
from ablations.grid import PRESETS, with_dyhead
from ablations.options import parse
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
    assert (cost.trained, cost.saved, cost.backward) == (itself.trained, itself.saved, itself.backward)


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
    assert " M parameters, " in printed and " GMACs, about " in printed and " MB to train, " in printed
    assert "time not known: 1 cells" in printed


def test_a_convolution_costs_what_it_does_by_hand():
    """Two 3 x 3 convolutions on 2 images of 16 x 16, 3 channels to 8 to 4; nothing is passed back to the images."""

    def make():
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, padding=1))

    first, second = 2 * 256 * 9 * 3 * 8, 2 * 256 * 9 * 8 * 4
    cost = counted(make, lambda model: model(torch.empty(2, 3, 16, 16)), "fp32", backward=True)
    assert (cost.macs, cost.backward) == (first + second, first + 2 * second)
    assert cost.parameters == cost.trained == 27 * 8 + 8 + 72 * 4 + 4


def test_operations_are_those_of_the_training_itself(data):
    """Against a counter around the steps: the backward pass ends at what is frozen, and images are padded together."""
    dataset = read_dataset(data)
    cell = replace(with_dyhead(BASE, "LSC", 2, "released", "crop"), steps=2, batch_size=2, weights="some", frozen=2)
    cell = replace(cell, test_size=(128, 128), test_flip=True)
    model = build(cell, len(dataset.train.category_ids), None).train()
    model.backbone.freeze(2)
    loader = Loader(dataset.train, 2, 0, cell.image_size, cell.max_size)
    with FlopCounterMode(display=False) as counter:
        for step in range(2):
            images, targets, _ = loader.batch(step)
            sum(model(images, targets).values()).backward()
    cost = estimate(cell, dataset)
    assert cost.training == pytest.approx(counter.get_total_flops(), rel=1e-9)
    # Four images of val at two sizes, mirrored too: each is shown four times.
    assert cost.evaluation == pytest.approx(4 * 4 * 2e9 * cost.GMACs)


@dataclass(eq=False)
class Images:
    """A split that has sizes of images alone."""

    images: list
    category_ids: tuple[int, ...] = (1, 2, 3)

    @classmethod
    def of(cls, *sizes):
        return cls([SimpleNamespace(width=width, height=height) for width, height in sizes])


def test_images_are_counted_with_the_padding_of_their_batch():
    """Landscape 64 x 32 and portrait 32 x 64 never meet in training, and in evaluation they do, as 64 x 64."""
    split = Images.of(*[(64, 32), (32, 64)] * 8)
    cell = replace(BASE, batch_size=4, image_size=(32,), max_size=64)
    assert trained_pixels(split, cell) == 64 * 32
    assert evaluated_pixels(split, 4, 32, 64) == 16 * 64 * 64
    assert evaluated_pixels(split, 1, 32, 64) == 16 * 64 * 32
    # Sides are padded to a multiple of 32, and at two sizes most batches hold an image of the larger one.
    assert trained_pixels(split, replace(cell, image_size=(20,), max_size=40)) == 64 * 32
    assert 64 * 32 < trained_pixels(split, replace(cell, image_size=(32, 64), max_size=128)) < 128 * 64
    alone = replace(cell, image_size=(32, 64), max_size=128, accumulate=4)
    assert trained_pixels(split, alone) == pytest.approx((64 * 32 + 128 * 64) / 2, rel=0.1)


def test_operations_are_those_of_images_of_the_mean_size():
    """One at a time, every other one twice as large: what a set of either half takes, half of each."""
    squares, wide = [(128, 128)] * 4, [(256, 128)] * 4
    cell = replace(BASE, batch_size=1, max_size=256)
    splits = [Images.of(*sizes) for sizes in (squares, wide, squares + wide)]
    costs = [estimate(cell, SimpleNamespace(train=split, val=split)) for split in splits]
    assert costs[2].training == pytest.approx((costs[0].training + costs[1].training) / 2)
    assert costs[2].evaluation == pytest.approx(costs[0].evaluation + costs[1].evaluation)
    assert costs[2].memory_MB == costs[1].memory_MB > costs[0].memory_MB


def test_gpus_take_the_longest_cells_first():
    """By hand: 5 | 4, 3 behind the 4, 3 behind the 5, and 3 behind the 7."""
    assert makespan([3, 3, 5, 3, 4], 2) == 10
    assert makespan([3, 3, 5, 3, 4], 1) == 18
    assert makespan([3, 3, 5, 3, 4], 5) == makespan([3, 3, 5, 3, 4], 64) == 5


def test_the_peak_is_that_of_the_gpu_that_is_here_or_an_h100s(monkeypatch):
    assert gpu("cpu").name == "H100 SXM" and "want of a GPU" in gpu("cpu").assumed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=40e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: here)
    assert (gpu("cuda").peak("bf16"), gpu("cuda").peak("fp32")) == (312e12, 156e12)
    assert gpu("cuda").memory == 40e9 and not gpu("cuda").assumed
    # An L40 is no L4, and a GPU that nobody knows has no peak.
    here.name = "NVIDIA L40"
    assert gpu("cuda").name == "H100 SXM" and "NVIDIA L40" in gpu("cuda").assumed


def test_a_dry_run_tells_the_gpu_hours_at_the_share_that_it_is_told(data, tmp_path, capsys, monkeypatch):
    arguments = ["--grid", "combinations", "--data", str(data), "--out", str(tmp_path), "--dry-run", "--seeds", "3"]
    arguments += ["--only", "attentions=baseline", "--steps", "2000000000", "--gpus", "1,2,3", "--peak-share", "0.5"]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    base = replace(BASE, channels=TINY.channels, steps=2_000_000_000, data_fingerprint="")
    cost = estimate(base, read_dataset(data))
    hours = (cost.training + cost.evaluation) / (0.5 * 494e12) / 3600
    assert printed.count(f" {hours:.2f} GPU hours\n") == 3
    assert f"{3 * hours:.1f} GPU hours at 50 % of 494 TFLOP/s, H100 SXM's in fp32\n" in printed
    seconds = 3600 * hours
    assert f"{span(3 * seconds)} on 1 GPU; {span(2 * seconds)} on 2 GPUs; {span(seconds)} on 3 GPUs; cells" in printed
    assert "all fit into 80 GB of memory" in printed and "the share is yours" in printed
    monkeypatch.setattr(gpus, "DEFAULT", replace(gpus.DEFAULT, memory=1e6 * cost.memory_MB - 1))
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count(" MB to train (too much), ") == 3 and "3 need more than 0 GB of memory" in printed


@pytest.mark.parametrize("wrong", [["--peak-share", "0"], ["--peak-share", "1.1"], ["--gpus", "0"]])
def test_shares_and_gpus_that_mean_nothing_are_refused(wrong):
    with pytest.raises(SystemExit, match="2"):
        parse(["--grid", "--dry-run", *wrong])
