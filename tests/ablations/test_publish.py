"""Publishing copies rows and rebuilds everything else from them."""

import numpy as np
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
    table = (target / "table.md").read_text().strip()
    assert "| baseline" in table and "report.html" in {path.name for path in target.iterdir()}
    assert readme.read_text() == f"before\n{BEGIN}\n{table}\n{END}\nafter\n"
    # Once more changes nothing.
    assert main([str(run), str(target), "--readme", str(readme)]) == 0
    assert readme.read_text().count(table) == 1


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
