"""A grid on a Ray cluster of two machines of a core each, one of which is lost, and whose driver is killed."""

import os
import signal
import subprocess
import sys
import time
from collections import defaultdict

import pytest
import torch
from places import ROOT

from ablations import run
from ablations.executors.cluster import Cluster, run_on_cluster, workplace
from ablations.executors.worker import Finished, run_cell
from ablations.experiment.experiment import Job, Saved, Stage
from ablations.experiment.room import Room
from ablations.generate import generate
from ablations.grid import PRESETS, SHIPPED, build_grid, only
from ablations.options import parse
from ablations.rows.store import read_rows, write_row

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster as Machines  # noqa: E402

# Long enough for a machine to be lost behind the first of five checkpoints.
SETTINGS = """
from dataclasses import replace
from ablations import grid
BRIEF = dict(steps=100, batch_size=2, warmup=2, channels=16, seeds=1)
grid.PRESETS["tiny"] = replace(grid.PRESETS["tiny"], **BRIEF)
"""
SCRIPT = SETTINGS + "import sys\nfrom ablations import run\nsys.exit(run.main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Two cells, and the data that they have in common."""
    data = generate(tmp_path_factory.mktemp("data"), "tiny", train=12, val=5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(PRESETS, "tiny", PRESETS["tiny"])
        exec(SETTINGS, {})
        options = parse(["--grid", "--data", str(data), "--weights", str(SHIPPED["tiny"])])
        base = run.base_cell(options, run.open_data(options))
        grid = build_grid("default", options.preset, base, options.detectors, 1)
    return [cell for word in ("none", "L") for cell in only(grid, f"{word},depth=1")], data


def job(data, out):
    return Job(data, parse(["--grid"]).reading, {}, out, "cpu", 1, str(SHIPPED["tiny"]), "test", False, out, out)


@pytest.fixture(scope="module")
def local(cells, tmp_path_factory):
    """The results of a run without a cluster, in this process, on as many threads as there: one."""
    out = tmp_path_factory.mktemp("local")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for cell in cells[0]:
        write_row(out, run_cell(cell, job(cells[1], out), Room(out), lambda event: None))
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def machines():
    # Workers wait for nothing else of the machine, or a loaded one starves them.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    # Ray looks for a minute before it takes a machine for lost.
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    settings = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    made = Machines(initialize_head=True, head_node_args=settings)
    yield made
    ray.shutdown()
    made.shutdown()


def weights(out, row):
    return torch.load(out / row["weights"], weights_only=True)["model"]


def equal(out, local, count):
    found, expected = ({row["key"]: row for row in read_rows(place)} for place in (out, local))
    assert len(found) == count
    for key, row in found.items():
        assert row["status"] == "ok", row["reason"]
        assert (
            row["metrics"] == expected[key]["metrics"] and row["training"]["loss"] == expected[key]["training"]["loss"]
        )
        assert row["files"] == {path: (out / "cells" / key / path).stat().st_size for path in row["files"]}
        for name, value in weights(local, expected[key]).items():
            assert torch.equal(weights(out, row)[name], value), name


def test_a_lost_machine_costs_a_cell_what_it_did_behind_its_last_checkpoint(cells, local, machines, tmp_path):
    nodes = [machines.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    began, saved, rows = defaultdict(int), defaultdict(list), []

    def notice(cell, event):
        if isinstance(event, Stage) and event.name == "start":
            began[cell.attentions] += 1
            saved[cell.attentions].append(None)
        if isinstance(event, Saved):
            saved[cell.attentions].append(event.step)
            if len(nodes) == 2 and len(saved) == 2 and all(len(steps) > 1 for steps in saved.values()):
                machines.remove_node(nodes.pop(), allow_graceful=False)
        if isinstance(event, Finished):
            rows.append(event.row["key"])

    run_on_cluster(cells[0], job(cells[1], tmp_path), Cluster(machines.address, 0, None, None), notice)
    assert sorted(rows) == sorted(cell.key for cell in cells[0]) and len(nodes) == 1
    # One cell was begun twice, and the second time behind a checkpoint.
    assert sorted(began.values()) == [1, 2]
    (lost,) = (steps for steps in saved.values() if steps.count(None) == 2)
    again = lost[lost.index(None, 1) + 1]
    assert again > 20 and lost.count(20) == 1
    equal(tmp_path, local, 2)


def test_a_killed_driver_goes_on_where_it_was(cells, local, machines, tmp_path):
    machines.add_node(num_cpus=1, object_store_memory=80 << 20)
    script = tmp_path / "brief.py"
    script.write_text(SCRIPT)
    out = tmp_path / "out"
    arguments = ["--grid", "--data", cells[1], "--weights", SHIPPED["tiny"], "--only", "L,depth=1", "--out", out]
    command = [sys.executable, script, *arguments, "--executor", "ray", "--address", machines.address]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("cells/*/checkpoint.pt")):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert read_rows(out) == []

    saved = []
    notice = lambda cell, event: saved.append(event.step) if isinstance(event, Saved) else None  # noqa: E731
    run_on_cluster(cells[0][1:2], job(cells[1], out), Cluster(machines.address, 0, None, None), notice)
    assert saved and saved[0] > 20, "it began anew"
    equal(out, local, 1)


def test_what_a_cluster_cannot_hold_is_said(machines, cells, tmp_path):
    with pytest.raises(
        ValueError, match="no machine of the cluster has 2 GPUs and 1 CPUs for a cell; there are: 0 CPUs"
    ):
        run_on_cluster(cells[0], job(cells[1], tmp_path), Cluster(machines.address, 2, None, None), lambda *_: None)


def test_what_a_killed_task_left_on_its_machine_is_removed_by_the_next(tmp_path):
    left = tmp_path / "cell-left"
    left.mkdir()
    (left / ".held").touch()
    at_work, held = workplace(tmp_path)
    made, other = workplace(tmp_path)
    assert not left.exists() and at_work.exists() and made.exists() and made != at_work
    held.release()
    other.release()


def test_a_dashboard_of_another_machine_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--grid", "--executor", "ray", "--log", "tensorboard"])
    assert stopped.value.code == 2 and "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--address", "auto"], ["--gpus-per-cell", "2"]])
def test_options_of_a_cluster_without_one_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--grid", *options])
    assert stopped.value.code == 2 and "add --executor ray" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(monkeypatch, cells, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'dyhead-lab\[ray\]'"):
        run_on_cluster(cells[0], job(cells[1], tmp_path), Cluster(None, 0, None, None), lambda *_: None)
