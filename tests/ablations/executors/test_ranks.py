"""A cell on two ranks: the losses of one process, a rank that is killed, a rank that runs out of memory."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from places import ROOT
from processes import finish, start

from ablations import run
from ablations.data.batch import Share
from ablations.executors.ranks import Ranks
from ablations.experiment.curve import read_curve
from ablations.generate import generate
from ablations.grid import SHIPPED
from ablations.rows.store import read_rows
from ablations.rows.tables import write_tables

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
DETECTORS = ("atss", "faster_rcnn", "detr")
STEPS = 20
# Of SGD as the paper has it: the first steps of AdamW are as long for a gradient of rounding errors as for any other.
SETTINGS = """
from dataclasses import replace
from functools import partial
from ablations import grid
from ablations.experiment import experiment
experiment.measure_latency = partial(experiment.measure_latency, seconds=0.05)
experiment.count_gmacs = lambda *_: 1.0
BRIEF = dict(steps=%d, batch_size=8, warmup=2, optimizer="sgd", lr=0.005)
BRIEF |= dict(class_std=None, exceptions={}, seeds=1)
grid.PRESETS["tiny"] = replace(grid.PRESETS["tiny"], **BRIEF)
"""
RUN = """
import sys
from ablations import run
if __name__ == "__main__":
    run.conclude = lambda *_: 0
    sys.exit(run.main(sys.argv[1:]))
"""
SHORT = """
import os
import torch
from ablations.experiment import train
backward, steps = train.backward, []
def short(model, batch, parts, *rest):
    steps.append(parts)
    if (os.environ["RANK"], parts) == ("1", 1) or (os.environ["RANK"], parts, len(steps)) == ("0", 2, 10):
        raise torch.OutOfMemoryError("not enough memory for this test")
    return backward(model, batch, parts, *rest)
train.backward = short
"""
# Every cell by one rank of several, without the drivers.
RANK = (
    SETTINGS
    + """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from ablations import run
from ablations.executors.worker import run_cell
from ablations.experiment.experiment import Job
from ablations.experiment.group import Group
from ablations.experiment.room import Room
from ablations.grid import build_grid
from ablations.options import parse
from ablations.rows.store import write_row

out, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
out.mkdir(exist_ok=True)
if ranks > 1:
    dist.init_process_group("gloo", store=dist.FileStore(str(out / "meeting"), ranks), rank=rank, world_size=ranks)
options = parse(sys.argv[4:])
data = run.open_data(options)
for cell in build_grid(options.grid, options.preset, run.base_cell(options, data), options.detectors, 1):
    if cell.attentions == "LSC":
        job = Job(data.root, options.reading, {}, out, "cpu", 1, options.weights, "", False, out, out)
        row = run_cell(cell, job, Room(out), lambda event: None, Group(rank, ranks))
        if rank == 0:
            write_row(out, row)
"""
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data"), "tiny", train=12, val=5)


def arguments(data, detectors=DETECTORS):
    """A frozen backbone, whose maps each rank keeps of its own images."""
    return ["--grid", "detectors", "--detector", ",".join(detectors), "--data", data, "--weights", SHIPPED["tiny"]]


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    """The directories of one process and of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    shared = [start(RANK % STEPS, folder / "two", rank, 2, *arguments(data)) for rank in range(2)]
    finish([start(RANK % STEPS, folder / "one", 0, 1, *arguments(data)), *shared], seconds=300)
    return folder / "one", folder / "two"


def test_two_ranks_compute_what_one_process_does(results):
    one, two = ({row["cell"]["detector"]: row for row in read_rows(out)} for out in results)
    assert one.keys() == two.keys() == set(DETECTORS)
    for name, row in one.items():
        assert row["status"] == two[name]["status"] == "ok", two[name]["reason"]
        assert two[name]["training"]["ranks"] == 2 and row["training"]["ranks"] == 1
        curves = [
            read_curve(out / r["weights"].replace("checkpoint.pt", "losses.jsonl"))
            for out, r in zip(results, (row, two[name]), strict=True)
        ]
        assert [len(curve) for curve in curves] == [STEPS, STEPS]
        for expected, found in zip(*curves, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), (name, expected["step"])
        # Scores and boxes differ by rounding, which a threshold of IoU sees once in a great while.
        assert two[name]["metrics"] == pytest.approx(row["metrics"], abs=0.5)
        assert two[name]["images"] == 5


def torchrun(more: str, folder: Path, out: Path, data: Path) -> list[str]:
    """The command that trains a cell of ATSS on two ranks, with `more` done in every process first."""
    script = folder / "brief.py"
    script.write_text(SETTINGS % STEPS + more + RUN)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    return [*start, *map(str, arguments(data, ["atss"])), "--only", "LSC", "--out", str(out)]


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    (row,) = (row for row in read_rows(out) if row["cell"]["detector"] == name)
    return torch.load(out / row["weights"], weights_only=True)["model"]


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def test_a_killed_rank_ends_the_run_with_one_line_and_the_same_command_goes_on(data, results, tmp_path):
    out = tmp_path / "out"
    command = torchrun("", tmp_path, out, data)
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((out / "cells").glob("*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    drivers = children(process.pid)
    assert len(drivers) == 2
    killed = time.monotonic()
    os.kill(drivers[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - killed < 60
    said = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "a rank was lost" in said[0]
    assert "torchrun --nproc-per-node 2 -m ablations.run --grid detectors" in said[0]
    for pid in drivers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            pytest.fail("a driver is still there")

    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    for name, value in weights(results[1], "atss").items():
        assert torch.equal(weights(out, "atss")[name], value), name


def test_what_ranks_cannot_share_is_refused_before_anything_is_written(data, tmp_path, monkeypatch, capsys):
    ranks = Ranks(("", 0, ""), 0, 3, 0, 3)
    common = ["--grid", "--data", str(data), "--out", str(tmp_path / "out")]
    for options, message in (
        ([], "3 ranks cannot share 8 images evenly; choose another --batch-size"),
        (["--batch-size", "6", "--accumulate", "6"], "cannot share 6 images in 6 parts evenly"),
        (["--batch-size", "6", "--workers", "2"], "take either"),
        (["--batch-size", "6", "--weights", "none"], "trains BatchNorm"),
    ):
        assert run.run_grid(run.parse([*common, *options]), ranks) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_ranks_divide_every_part_of_a_step_among_them(parts):
    taken = [Share(rank, 2, parts).positions(16).tolist() for rank in range(2)]
    assert sorted(taken[0] + taken[1]) == list(range(16))
    size = 16 // parts
    for part in range(parts):
        assert all(
            part * size <= n < (part + 1) * size for of in taken for n in of[part * size // 2 : (part + 1) * size // 2]
        )


def test_ranks_that_run_out_of_memory_alone_go_on_with_half_as_many_images_at_once(data, tmp_path):
    """Rank 1 cannot take 2 images at once, and then rank 0 cannot take 1 at the beginning of the second half."""
    out = tmp_path / "out"
    finished = subprocess.run(torchrun(SHORT, tmp_path, out, data), env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (row,) = read_rows(out)
    assert row["training"]["halved"] == [0, 8] and row["training"]["ranks"] == 2
    assert json.loads((out / row["weights"]).with_name("halved.json").read_text()) == [0, 8]
    assert [line["step"] for line in read_curve(out / "cells" / row["key"] / "losses.jsonl")] == list(range(1, 21))
    write_tables([row], out)
    assert "from there atss LSC depth 1 seed 0 was trained on in 4 parts" in (out / "table.md").read_text()
