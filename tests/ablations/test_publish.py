"""Publishing copies rows and rebuilds everything else from them."""

import csv

import numpy as np
import pytest
from synthetic_rows import make_rows

from ablations.evaluation.replicates import write_replicates
from ablations.publish import BEGIN, END, main
from ablations.rows.store import read_rows, write_row


def test_rows_are_copied_and_the_readme_holds_their_table(tmp_path, capsys):
    run, target, readme = tmp_path / "run", tmp_path / "results" / "machine", tmp_path / "README.md"
    for row in make_rows(depths=(1,)):
        write_row(run, row)
    (run / "cells" / "key").mkdir()
    (run / "cells" / "key" / "checkpoint.pt").write_text("large")
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")

    assert main([str(run), str(target), "--readme", str(readme)]) == 0
    assert read_rows(target) == read_rows(run)
    assert not (target / "cells" / "key").exists()
    assert {"table.md", "report.html"} <= {path.name for path in target.iterdir()}
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| attentions") and text.endswith(f"\n{END}\nafter\n")
    heading, _, *lines = text.splitlines()[2:]
    shown = [line.split("|")[1:-1] for line in lines if line.startswith("|")]
    with open(target / "table.csv") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    names = [name.strip() for name in heading.split("|")[1:-1]]
    assert names == ["attentions", "depth", "AP", "delta_AP", "params_M", "latency_ms_p50"]
    assert [line[0].strip() for line in shown] == [row["attentions"] for row in rows]
    assert [float(line[2]) for line in shown] == pytest.approx([float(row["AP"]) for row in rows], abs=0.051)
    # Once more changes nothing.
    assert main([str(run), str(target), "--readme", str(readme)]) == 0
    assert readme.read_text() == text


def test_what_intervals_and_curves_are_made_of_goes_along(tmp_path, capsys):
    run, target = tmp_path / "run", tmp_path / "results"
    key = ""
    for row in make_rows(depths=(1,)):
        write_row(run, row)
        key = row["key"]
    (run / "cells" / key).mkdir()
    for name in ("losses.jsonl", "detections.json.gz", "error.txt"):
        (run / "cells" / key / name).write_text("")
    write_replicates(run / "cells" / key / "replicates.npz", np.ones((3, 12), np.float32))
    (run / "exhibits").mkdir()
    (run / "exhibits" / "old.json").write_text('{"reason": "none"}')

    assert main([str(run), str(target)]) == 0
    assert {path.name for path in (target / "cells" / key).iterdir()} == {"losses.jsonl", "replicates.npz"}
    assert (target / "exhibits" / "old.json").is_file()
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    assert f"{target} holds {size / 1e6:.1f} MB" in capsys.readouterr().out
    assert main([str(run), str(target), "--with-detections"]) == 0
    assert (target / "cells" / key / "detections.json.gz").is_file()


def test_what_is_missing_is_named(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "target")]) == 2
    assert "holds no rows" in capsys.readouterr().err
    write_row(tmp_path, make_rows(depths=(1,))[0])
    (tmp_path / "README.md").write_text("nothing here")
    assert main([str(tmp_path), str(tmp_path / "target"), "--readme", str(tmp_path / "README.md")]) == 2
    assert BEGIN in capsys.readouterr().err
