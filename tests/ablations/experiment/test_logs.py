"""--log: what dashboards are told, through TensorBoard's own files and through stand-ins of the others."""

import sys
import types

import pytest
from cells import CELL

from ablations import run
from ablations.executors import worker
from ablations.experiment.experiment import Job, Learned, Line, Reading, Step
from ablations.experiment.logs import folder, open_log
from ablations.experiment.room import Room
from ablations.generate import generate

CURVE = {10: {"lr": 0.1, "loss": 2.0, "loss_cls": 2.0}, 20: {"lr": 0.1, "loss": None, "loss_cls": 1.5}}


def run_cell(out, log, monkeypatch):
    """A cell whose curve has two lines, through the worker's own way of logging."""

    def events(cell, job, room, notice, group):
        for step, scalars in CURVE.items():
            notice(Line(step, scalars))
            notice(Step(step, 1.0))
        notice(Learned({"metrics": {"AP": 12.5, "APs": None}}))

    monkeypatch.setattr(worker, "run", events)
    job = Job(out, Reading(), {}, out, "cpu", 1, None, "command", False, out, out, log)
    return worker.run_cell(CELL, job, Room(out), lambda event: None)


def test_tensorboard_reads_the_curve_and_the_ap(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_cell(tmp_path, "tensorboard", monkeypatch)["status"] == "ok"
    events = EventAccumulator(str(folder(tmp_path, CELL))).Reload()
    assert folder(tmp_path, CELL) == tmp_path / "logs" / f"{CELL.name} {CELL.key[:6]}"
    found = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert found == {
        "lr": pytest.approx({10: 0.1, 20: 0.1}),
        "loss": {10: 2.0},
        "loss_cls": {10: 2.0, 20: 1.5},
        "AP": {100: 12.5},
    }


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_other_dashboards_get_the_same(name, tmp_path, monkeypatch, capsys):
    calls = []
    stand_in = types.ModuleType(name)

    def init(**arguments):
        print("* greetings")
        calls.append(arguments)

    stand_in.init, stand_in.finish = init, lambda: calls.append("finish")
    stand_in.log = lambda scalars, step: calls.append((step, scalars))
    monkeypatch.setitem(sys.modules, name, stand_in)
    assert run_cell(tmp_path, name, monkeypatch)["status"] == "ok"
    began, *lines = calls
    assert began["name"] == f"{CELL.name} {CELL.key[:6]}" and began["config"] == CELL.stored()
    assert began["resume"] == "allow" and (began.get("id") == CELL.key) == (name == "wandb")
    first, second = {"lr": 0.1, "loss": 2.0, "loss_cls": 2.0}, {"lr": 0.1, "loss_cls": 1.5}
    assert lines == [(10, first), (20, second), (100, {"AP": 12.5}), "finish"]
    assert capsys.readouterr().out == "", "nothing runs into the lines of the program"


def test_without_it_nothing_is_logged(tmp_path, monkeypatch):
    assert run_cell(tmp_path, None, monkeypatch)["status"] == "ok"
    assert not (tmp_path / "logs").exists()
    open_log(None, CELL, tmp_path).close()


def test_a_library_that_is_not_there_is_an_error_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    data = generate(tmp_path / "data", "tiny", train=6, val=4)
    assert run.main(["--grid", "--data", str(data), "--out", str(tmp_path / "out"), "--log", "wandb"]) == 2
    printed = capsys.readouterr().err
    assert "--log wandb does not import" in printed and "pip install --upgrade wandb" in printed
    assert not (tmp_path / "out").exists()
