"""Files that were cut off: said, set aside and made again."""

import re

from ablations.exhibits.make import restored
from ablations.experiment import experiment
from ablations.plan import mend
from ablations.rows.store import claim, read_rows, set_aside


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def kept_aside(out, name):
    return [path for path in (out / "cells" / "replaced").glob("*/*") if path.name.endswith(name)]


def test_damaged_files_are_said_set_aside_and_made_again(grid):
    """Each of the files that a finished cell leaves, cut off at its end."""
    assert grid()[2] == ["atss baseline"]
    (row,) = read_rows(grid.out)
    place, weights = grid.out / "cells" / row["key"], (grid.out / row["weights"]).parent
    assert row["files"].keys() == {"detections.json.gz", "replicates.npz"}
    for name in ("row", "detections.json.gz", "replicates.npz", "training.json", "checkpoint.pt"):
        victim = {"row": place.with_suffix(".json"), "training.json": weights / name, "checkpoint.pt": weights / name}
        path = victim.get(name, place / name)
        before = path.read_bytes()
        if path.parent == weights:
            # Weights are looked at where they are needed.
            (place.with_suffix(".json")).unlink()
        cut(path)
        damaged = path.read_bytes()
        code, printed, trainings = grid()
        assert code == 0 and re.search(rf"{path} is (damaged|not a row).* set aside in", printed), (name, printed)
        assert trainings == (["atss baseline"] if name in ("training.json", "checkpoint.pt") else []), name
        found = [each for each in (grid.out / "cells" / "replaced").rglob("*") if each.is_file()]
        assert damaged in [each.read_bytes() for each in found], name
        assert path.read_bytes() == before or name in ("row", "checkpoint.pt", "training.json", "replicates.npz")
        (again,) = read_rows(grid.out)
        assert again["metrics"] == row["metrics"] and again["files"] == row["files"], name
    # What is deleted on purpose is not made again.
    (place / "detections.json.gz").unlink()
    assert "1 done, 0 to run" in grid()[1]


def test_a_training_goes_back_to_its_beginning_where_its_checkpoint_is_damaged(grid, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(experiment.trained, "keep", lambda *_: 1 / 0)
        assert grid()[0] == 1
    (path,) = (grid.out / "cells").glob("*/checkpoint.pt")
    cut(path)
    code, printed, trainings = grid("--retry-failed")
    assert code == 0 and f"{path} is damaged" in printed and trainings == ["atss baseline"]
    assert len(kept_aside(grid.out, "checkpoint.pt")) == 1
    (row,) = read_rows(grid.out)
    assert row["training"]["steps"] == row["cell"]["steps"]


def test_what_another_runner_makes_again_is_left_to_it(grid, capsys):
    grid()
    (row,) = read_rows(grid.out)
    cell = restored(row)
    cut(grid.out / "cells" / row["key"] / "detections.json.gz")
    with claim(grid.out, row["key"]):
        mend(grid.out, [cell], {row["key"]: row}, change=True)
    assert capsys.readouterr().err == "" and read_rows(grid.out) == [row]
    mend(grid.out, [cell], {row["key"]: row}, change=True)
    assert "set aside in" in capsys.readouterr().err and read_rows(grid.out) == []


def test_what_is_set_aside_twice_in_a_second_is_there_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20260101T000000")
    for text in ("first", "second"):
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / "cells" / "key.json").write_text(text)
        set_aside(tmp_path, [tmp_path / "cells" / "key.json", tmp_path / "cells" / "absent"])
    found = sorted(path.read_text() for path in (tmp_path / "cells" / "replaced").glob("*/key.json"))
    assert found == ["first", "second"]
