"""A grid runs seed by seed: after each round there is a table of all that is done, and the program says so."""

import pytest
from synthetic_rows import MACHINE

from ablations import run
from ablations.executors.worker import Finished
from ablations.generate import generate
from ablations.rows import tables
from ablations.rows.row import good
from ablations.rows.store import read_rows, write_row


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data"), "tiny", train=6, val=4)


@pytest.fixture
def rows_at_once(monkeypatch):
    """Cells that have their rows at once; an evil one of them fails."""

    def finish(cells, job, workers, notice, ranks):
        for cell in cells:
            row = {"key": cell.key, "cell": cell.stored(), "machine": MACHINE, "status": "ok", "metrics": {"AP": 1.0}}
            if cell.attentions == "C":
                row |= {"status": "crashed", "reason": "evil", "metrics": None}
            write_row(job.out, row)
            seen.append((cell.seed, (job.out / "table.csv").exists()))
            notice(cell, Finished(row))

    seen = []
    monkeypatch.setattr(run, "run_cells", finish)
    return seen


def test_after_each_seed_there_is_a_table_and_a_line_says_so(rows_at_once, data, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--grid", "combinations", "--data", str(data), "--out", str(out), "--seeds"]
    assert run.main([*arguments, "3"]) == 1
    printed = capsys.readouterr().out
    assert rows_at_once == [(seed, seed > 0) for seed in (0, 1, 2) for _ in range(9)]
    for seed in (0, 1):
        assert f"seed {seed} complete: table in {out}/table.md" in printed
    # Behind the last round come the table and the report of all.
    assert "seed 2 complete" not in printed and "report in" in printed
    assert sum(map(good, read_rows(out))) == 3 * 8

    # A round that was complete before is none of this run.
    assert run.main([*arguments, "5"]) == 1
    printed = capsys.readouterr().out
    assert "seed 3 complete" in printed and "seed 2 complete" not in printed and "seed 4 complete" not in printed


def test_the_table_of_a_round_holds_no_cell_of_the_next(rows_at_once, data, tmp_path, monkeypatch):
    written = []

    def write(rows, out):
        written.append({row["cell"]["seed"] for row in rows})

    monkeypatch.setattr(tables, "write_tables", write)
    arguments = ["--grid", "depth", "--data", str(data), "--out", str(tmp_path), "--seeds", "3"]
    assert run.main([*arguments, "--detector", "atss,fcos"]) == 0
    assert written == [{0}, {0, 1}]
