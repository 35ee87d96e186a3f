"""A grid of one cell that runs in the process of the test, where it can break things."""

from dataclasses import replace

import pytest

from ablations import report, run
from ablations.executors import worker
from ablations.experiment import experiment
from ablations.experiment.experiment import Said
from ablations.experiment.room import Room
from ablations.generate import generate
from ablations.grid import PRESETS
from ablations.rows.store import write_row
from ablations.rows.tables import write_tables

BRIEF = {"steps": 3, "batch_size": 2, "warmup": 2, "channels": 16, "seeds": 1}


@pytest.fixture
def data(tmp_path):
    return generate(tmp_path / "data", "tiny", train=6, val=4)


@pytest.fixture
def grid(data, tmp_path, monkeypatch, capsys):
    """Run a grid of one cell in this process, where a test can break things; exit code, what was printed, trainings."""
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], **BRIEF))
    trainings = []

    def in_this_process(cells, job, workers, notice, ranks):
        experiment.dataset.cache_clear()
        for cell in cells:
            write_row(job.out, worker.run_cell(cell, job, Room(job.out), heard))

    def heard(event):
        if isinstance(event, Said):
            print(event.text)

    def counted(cell, *others, **named):
        trainings.append(cell.name)
        return train(cell, *others, **named)

    train = experiment.train
    monkeypatch.setattr(experiment, "train", counted)
    monkeypatch.setattr(run, "run_cells", in_this_process)
    # What takes most of the time and is not the point here.
    monkeypatch.setattr(report, "write_results", lambda rows, out, problems: write_tables(rows, out))
    monkeypatch.setattr(experiment, "measure_latency", lambda *_: {"latency_ms_p50": 1.0})

    def call(*more, detector="atss", only="baseline"):
        trainings.clear()
        out = ["--out", str(tmp_path / "out"), "--detector", detector, "--only", only]
        code = run.main(["--grid", "--data", str(data), *out, *more])
        printed = capsys.readouterr()
        return code, printed.out + printed.err, list(trainings)

    call.out = tmp_path / "out"
    return call
