"""Costs against hand counts, latency against a scripted clock, and what a row says about its machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT
from torch import nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ablations.experiment import measure
from ablations.experiment.measure import count_gmacs, count_parameters, measure_latency
from ablations.rows import machine
from ablations.rows.machine import machine_info, machine_line, public_command
from heads import DyHead, build_detector
from heads.detector import PredictionHead
from kernels import backend, use_backend


class Toy(nn.Module):
    """A detector that pads to a multiple of 32, with a module under two names and a weight in two modules."""

    def __init__(self, channels=8):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.shared = nn.Conv2d(channels, channels, 1, bias=False)
        self.again = self.shared
        self.tied = nn.Conv2d(channels, channels, 1, bias=False)
        self.tied.weight = self.shared.weight
        self.linear = nn.Linear(channels, 5)
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.head = PredictionHead()

    def batch(self, images):
        height = -(-max(image.shape[1] for image in images) // 32) * 32
        width = -(-max(image.shape[2] for image in images) // 32) * 32
        batch = self.mean.new_zeros(len(images), 3, height, width)
        for slot, image in zip(batch, images, strict=True):
            slot[:, : image.shape[1], : image.shape[2]] = image / 255 - self.mean
        return batch

    def raw(self, batch):
        x = self.norm(self.tied(self.again(self.shared(self.first(batch))))) + torch.ones(1)
        return self.linear(x.mean((2, 3)))

    def forward(self, images):
        scores = self.raw(self.batch(images))
        return [{"boxes": torch.zeros(1, 4), "scores": row[:1], "labels": torch.zeros(1).long()} for row in scores]


def toy_macs(height, width, channels=8):
    pixels = (height // 2) * (width // 2)
    return pixels * (27 * channels + 3 * channels * channels) + 5 * channels


def test_parameters_are_counted_once_and_buffers_are_not():
    assert count_parameters(Toy()) == (3 * 8 * 9 + 8) + 8 * 8 + (8 * 5 + 5) + 2 * 8


def test_gmacs_agree_with_a_count_by_hand_at_the_padded_size():
    image = torch.zeros(3, 60, 97, dtype=torch.uint8)
    assert count_gmacs(Toy(), [image]) * 1e9 == toy_macs(64, 128)
    # An image: two in a batch do not cost twice.
    assert count_gmacs(Toy(), [image, image]) * 1e9 == toy_macs(64, 128)


def test_counting_needs_no_memory_and_changes_nothing():
    with torch.device("meta"):
        huge = Toy(20_000)
    size = (3, 100_000, 100_000)
    gmacs = count_gmacs(huge, [torch.empty(size, device="meta")])
    assert gmacs * 1e9 == pytest.approx(toy_macs(100_000, 100_000, 20_000), rel=1e-12)
    toy = Toy()
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    count_gmacs(toy, [torch.zeros(3, 64, 64)])
    assert all(torch.equal(value, before[name]) for name, value in toy.state_dict().items())
    assert all(value.device.type == "cpu" for value in toy.state_dict().values())


@torch.library.custom_op("dyhead_test_measure::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@double.register_fake
def _(x):
    return torch.empty_like(x)


class WithCustomOp(Toy):
    def raw(self, batch):
        return super().raw(double(batch))


def test_an_operator_without_a_formula_is_an_error_and_one_with_it_counts():
    image = torch.zeros(3, 64, 64)
    with pytest.raises(RuntimeError, match=r"dyhead_test_measure\.double"):
        count_gmacs(WithCustomOp(), [image])
    operator = torch.ops.dyhead_test_measure.double
    register_flop_formula(operator)(lambda shape, *_, **__: 2 * 7 * shape[0])
    try:
        assert count_gmacs(WithCustomOp(), [image, image]) * 1e9 == toy_macs(64, 64) + 7
    finally:
        del flop_registry[operator]


class Clock:
    """time.perf_counter, moved by the model's calls alone."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Scripted(nn.Module):
    """Takes a known number of 64ths of a second: five for a batch of ten, for one image its number of rows."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.calls = clock, []

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.calls.append([image.shape[1] for image in images])
        self.clock.now += (5 if len(images) == 10 else images[0].shape[1]) / 64


def test_latency_and_throughput_against_a_scripted_clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    model = Scripted(clock).train()
    speed = measure_latency(model, [torch.zeros(3, rows, 4) for rows in range(1, 11)], "cpu", seconds=220 / 64)
    assert speed["images_per_s"] == 10 / (5 / 64)
    # 40 single runs: 1 to 10 64ths in turn, four times each.
    assert speed["latency_ms_p50"] == pytest.approx(5.5 / 64 * 1000)
    assert speed["latency_ms_p90"] == pytest.approx(9.1 / 64 * 1000)
    assert speed["batch_size_measured"] == 10 and speed["threads"] == torch.get_num_threads()
    assert speed["peak_memory_MB"] is None
    assert model.training, "the model must come back in the mode it was given in"
    # Warm-up for a quarter of the time, then measuring, for each of the two.
    assert [len(call) for call in model.calls].count(10) == 11 + 44
    assert [len(call) for call in model.calls].count(1) == 10 + 40


def test_a_slow_model_still_gets_five_runs_and_each_shape_its_warm_up(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    model = Scripted(clock)
    measure_latency(model, [torch.zeros(3, rows, 4) for rows in (500, 600, 700)], "cpu", seconds=0.1)
    singles = [call[0] for call in model.calls if len(call) == 1]
    assert singles == [500, 600, 700, 500, 600, 700, 500, 600]


def test_the_mode_is_restored_when_the_model_fails():
    class Broken(nn.Module):
        def forward(self, images):
            raise ZeroDivisionError

    model = Broken().train()
    with pytest.raises(ZeroDivisionError):
        measure_latency(model, [torch.zeros(3, 8, 8)], "cpu")
    assert model.training


def test_a_real_model_is_measured():
    speed = measure_latency(Toy(), [torch.zeros(3, 64, 64)] * 2, "cpu", seconds=0.02)
    assert speed["batch_size_measured"] == 2
    assert 0 < speed["latency_ms_p50"] <= speed["latency_ms_p90"] and speed["images_per_s"] > 0


@pytest.mark.gpu
def test_peak_memory_counts_weights_and_the_batch_and_not_what_lay_there_before():
    ballast = torch.zeros(256, 1024, 1024, device="cuda")
    toy = Toy().cuda()
    peak = measure_latency(toy, [torch.zeros(3, 512, 512)] * 4, "cuda", seconds=0.02)["peak_memory_MB"]
    activations = 4 * 4 * (3 * 512 * 512 + 8 * 256 * 256) / 1e6
    assert activations <= peak < 6 * activations
    assert ballast.numel() * 4 / 1e6 > peak


def test_machine_info_is_plain_and_names_everything():
    info = machine_info("cpu", "python -m ablations.run --grid")
    assert json.loads(json.dumps(info)) == info
    assert list(info) == ["device", "cores", "driver", "python", "torch", "triton", "commit", "dirty", "command"]
    assert info["torch"] == torch.__version__ and info["driver"] is None and info["cores"] >= 1
    assert info["device"] and info["command"] == "python -m ablations.run --grid"


def test_machine_line_says_each_value_once():
    first = {
        "device": "Fast GPU",
        "cores": 16,
        "driver": "570.1",
        "python": "3.12.1",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "0123456789abcdef",
        "dirty": False,
        "command": "python -m ablations.run --grid",
    }
    line = machine_line([first, first | {"dirty": True}, first])
    assert line == (
        "device: Fast GPU (16 cores) | driver: 570.1 | python: 3.12.1 | torch: 2.11.0 | triton: 3.6.0 | "
        "commit: 0123456789ab and 0123456789ab with uncommitted changes | command: python -m ablations.run --grid"
    )
    assert machine_line([{}]).startswith("device: unknown | driver: none")
    assert "\n" not in machine_line([])


def test_commands_do_not_tell_where_things_lie_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = f"python -m ablations.run --grid --only 'LSC,depth=1' --data /data/sets/coco --out={tmp_path}/runs/a ../b"
    public = public_command(typed)
    assert public == "python -m ablations.run --grid --only LSC,depth=1 --data .../coco --out=runs/a ../b"
    assert public_command(public) == public


def test_own_command_is_what_was_typed(tmp_path):
    script = "import sys, ablations.rows.machine as m; sys.argv = ['x', 'LSC,depth=1', 'a b']; print(m.own_command())"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "python x LSC,depth=1 'a b'"
    (tmp_path / "said.py").write_text("from ablations.rows.machine import own_command\nprint(own_command())\n")
    command = [sys.executable, "-m", "said", "--grid", "a b"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert out.strip() == "python -m said --grid 'a b'"


def test_the_commit_is_ours_or_none(tmp_path, monkeypatch):
    commit, dirty = machine._commit.__wrapped__()
    inside = (Path(machine.ROOT) / ".git").exists()
    assert (commit is not None and len(commit) == 40 and isinstance(dirty, bool)) if inside else commit is dirty is None
    # A copy of the package inside another repository has no commit of its own.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path / "site")
    assert machine._commit.__wrapped__() == (None, None)


def test_one_dyhead_block_costs_what_a_count_by_hand_and_the_papers_table_say():
    image = torch.empty(3, 800, 1344, device="meta")
    gmacs = {}
    for depth in (1, 2):
        with torch.device("meta"):
            gmacs[depth] = count_gmacs(build_detector("atss", depth=depth).eval(), [image])
    pixels = [100 * 168, 50 * 84, 25 * 42, 13 * 21, 7 * 11]
    # Every level convolves itself, all but the first their finer neighbour, all but the last their coarser one.
    convolved = sum(pixels) + sum(pixels[1:]) + sum(pixels[1:])
    # The convolution of offsets and mask; a weight for each of 13 pooled maps; two linear layers for each level.
    small = 27 * 9 * 256 * sum(pixels) + 13 * 256 + 5 * (256 * 64 + 64 * 1024)
    block = gmacs[2] - gmacs[1]
    assert block == pytest.approx((9 * 256 * 256 * convolved + small) / 1e9, rel=1e-9)
    # Table 2 of the paper: 4 blocks cost 42.48 "GFLOPs" more than 2.
    assert block == pytest.approx((-20.97 + 63.45) / 2, rel=0.01)


class Trunk(nn.Module):
    """A DyHead on two levels of whatever the image is."""

    def __init__(self):
        super().__init__()
        self.trunk = DyHead(16, 2)
        self.head = PredictionHead()

    def batch(self, images):
        return torch.stack(list(images)).float()

    def raw(self, batch):
        return self.trunk([batch, batch[:, :, ::2, ::2]])


def test_a_dyhead_counts_the_same_where_its_device_has_fused_kernels(monkeypatch):
    model, images = Trunk(), [torch.zeros(16, 8, 8)] * 2
    expected = count_gmacs(model, images)
    assert expected * 1e9 > 2 * 9 * 16 * 16 * (64 + 16 + 16 + 16)
    # As under the interpreter, where a CPU's blocks are fused: in launches that no counter sees.
    monkeypatch.setattr("kernels.block.dyhead_block.INTERPRET", True)
    monkeypatch.setattr(backend, "INTERPRET", True)
    with use_backend("triton"):
        assert model.trunk.unfused_reason(model.batch([torch.zeros(16, 8, 8)]).split(1)) is None
        assert count_gmacs(model, images) == expected
