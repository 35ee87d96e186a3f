"""The store keeps every row whole through kill -9, a full disk and eight writers; one process at a time has a cell."""

import errno
import json
import os
import random
import signal
import time

import numpy as np
import pytest
from processes import finish, start

from ablations.experiment.measure import Speed
from ablations.rows.row import MEASURES
from ablations.rows.store import claim, read_row, read_rows, write_row


def make_row(key="a1", **changes):
    row = {
        "key": key,
        "cell": {"data": "generated", "detector": "atss", "attentions": "LSC", "depth": 1, "seed": 0},
        "status": "ok",
        "reason": None,
        "metrics": {"AP": 41.5, "APs": None},
        "params_M": 1.25,
        "machine": {"torch": "2.13.0"},
    }
    return row | changes


def test_row_comes_back_as_written(tmp_path):
    row = make_row()
    path = write_row(tmp_path, row)
    assert path == tmp_path / "cells" / "a1.json"
    assert read_rows(tmp_path) == [row] and read_row(tmp_path, "a1") == row
    assert read_row(tmp_path, "other") is None


def test_what_a_later_version_wrote_is_kept(tmp_path):
    row = make_row(later={"deep": [1, "two"]}, machine={"torch": "9.0", "later": True})
    row["cell"]["later"] = [1]
    write_row(tmp_path, row)
    assert read_row(tmp_path, "a1") == row


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_row(
        tmp_path,
        make_row(
            metrics={"AP": np.float32(12.5), "AP50": float("nan"), "AP75": np.float64("inf")},
            GMACs=-float("inf"),
            training={"loss": [1.0, (float("nan"), np.int64(3))]},
        ),
    )
    text = (tmp_path / "cells" / "a1.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    row = json.loads(text)
    assert row["metrics"] == {"AP": 12.5, "AP50": None, "AP75": None}
    assert row["GMACs"] is None and row["training"]["loss"] == [1.0, [None, 3]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"status": "fine"}, "status"),
        ({"cell": None}, "cell"),
        ({"cell": {"detector": "atss", "attentions": None, "depth": 1, "seed": 0}}, "attentions"),
        ({"cell": {"detector": "atss", "attentions": "L", "depth": "1", "seed": 0}}, "depth"),
        ({"metrics": {}}, "AP"),
        ({"metrics": {"AP": "41"}}, "AP"),
        ({"GMACs": True}, "GMACs"),
        ({"machine": "here"}, "machine"),
        ({"extra": object()}, "object"),
        ({"key": "../evil"}, "key"),
    ],
)
def test_what_is_not_a_row_is_refused_and_nothing_is_written(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        write_row(tmp_path, make_row(**changes))
    assert not list(tmp_path.rglob("*.json*")) and not list(tmp_path.parent.glob("evil*"))


def test_every_measure_of_a_detector_is_a_number_of_its_row():
    speed = set(Speed.__annotations__) - {"batch_size_measured", "threads"}
    assert set(MEASURES) == {"params_M", "GMACs"} | speed


def test_corrupt_files_are_reported_by_name_and_count_as_not_done(tmp_path):
    good = make_row("good")
    write_row(tmp_path, good)
    cells = tmp_path / "cells"
    whole = json.dumps(make_row("torn"))
    bad = {
        "torn": whole[: len(whole) // 2].encode(),
        "empty": b"",
        "binary": b"\xff\xfe\x00",
        "nan": json.dumps(make_row("nan", GMACs=float("nan"))).encode(),
        "copied": json.dumps(make_row("good")).encode(),
        "list": b"[]",
        "deep": b"[" * 100_000,
        "hand": json.dumps(make_row("hand", metrics={"AP": "best"})).encode(),
    }
    for name, data in bad.items():
        (cells / f"{name}.json").write_bytes(data)
    (cells / "folder.json").mkdir()
    problems = []
    assert read_rows(tmp_path, problems.append) == [good]
    assert len(problems) == len(bad) + 1
    for name in [*bad, "folder"]:
        assert sum(f"{name}.json" in problem for problem in problems) == 1
        assert read_row(tmp_path, name, problems.append) is None


def test_a_corrupt_row_is_loud_by_default(tmp_path, capsys):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a1.json").write_text("{")
    assert read_rows(tmp_path) == []
    captured = capsys.readouterr()
    assert "a1.json" in captured.err and captured.out == ""


class FullDisk:
    """Wraps os.fsync or os.replace: fails the way a full disk does."""

    def __init__(self, code):
        self.code = code

    def __call__(self, *_):
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_row_and_names_the_file(tmp_path, monkeypatch, call):
    write_row(tmp_path, make_row())
    monkeypatch.setattr(os, call, FullDisk(errno.ENOSPC))
    with pytest.raises(OSError, match=r"cannot write .*a1\.json: No space left on device") as caught:
        write_row(tmp_path, make_row(status="crashed"))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert read_rows(tmp_path) == [make_row()]
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["a1.json"]


WRITER = """
import sys
from ablations.rows.store import write_row
row = {"key": "a1", "cell": {"detector": "atss", "attentions": "L", "depth": 1, "seed": 0}, "status": "crashed"}
version = 0
while True:
    version += 1
    write_row(sys.argv[1], row | {"version": version, "payload": [version] * (version * 7919 % 20000)})
    print(version, flush=True)
"""


def test_kill_9_at_random_times_leaves_a_whole_row_that_was_acknowledged(tmp_path):
    rng = random.Random(0)
    for attempt in range(30):
        directory = tmp_path / str(attempt)
        process = start(WRITER, directory)
        try:
            assert process.stdout.readline() == "1\n"
            time.sleep(rng.uniform(0, 0.02))
        finally:
            process.send_signal(signal.SIGKILL)
        acknowledged = [1, *map(int, process.communicate()[0].split("\n")[:-1])][-1]
        problems = []
        (row,) = read_rows(directory, problems.append)
        assert problems == []
        # The last write may have been renamed into place before it could be acknowledged.
        assert row["version"] in (acknowledged, acknowledged + 1)
        assert row["payload"] == [row["version"]] * (row["version"] * 7919 % 20000)


WORKER = """
import sys, time
from ablations.rows.store import claim, read_row, write_row
directory, name = sys.argv[1:]
for number in range(24):
    key = f"cell{number}"
    lease = claim(directory, key)
    if lease is None:
        continue
    with lease:
        if read_row(directory, key) is None:
            with open(f"{directory}/trained.txt", "a") as log:
                log.write(key + "\\n")
            time.sleep(0.003)
            cell = {"detector": "atss", "attentions": "L", "depth": 1, "seed": 0}
            write_row(directory, {"key": key, "cell": cell, "status": "crashed", "by": name})
"""


def test_eight_processes_train_each_cell_once(tmp_path):
    finish([start(WORKER, tmp_path, name) for name in range(8)])
    trained = (tmp_path / "trained.txt").read_text().split()
    assert sorted(trained) == sorted(f"cell{number}" for number in range(24))
    rows = read_rows(tmp_path)
    assert sorted(row["key"] for row in rows) == sorted(trained)
    assert len({row["by"] for row in rows}) > 1, "one process did everything, nothing was shown"


def test_eight_processes_write_one_row(tmp_path):
    script = """
import sys
from ablations.rows.store import write_row
cell = {"detector": "atss", "attentions": "L", "depth": 1, "seed": 0}
for turn in range(20):
    write_row(sys.argv[1], {"key": "a1", "cell": cell, "status": "crashed", "payload": [sys.argv[2]] * 5000})
"""
    processes = [start(script, tmp_path, name) for name in range(8)]
    while any(process.poll() is None for process in processes):
        for row in read_rows(tmp_path, pytest.fail):
            assert len(row["payload"]) == 5000 and len(set(row["payload"])) == 1
    finish(processes)
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["a1.json"]


HOLDER = """
import os, sys, time
from ablations.rows.store import claim
lease = claim(sys.argv[1], "a1")
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, b"x")
    time.sleep(60)
# The child closes what it inherited before its first line; on a busy machine that can take a while.
os.read(read, 1)
print(child, flush=True)
time.sleep(60)
"""


def test_kill_9_gives_the_lease_back_though_a_forked_child_lives_on(tmp_path):
    process = start(HOLDER, tmp_path)
    child = int(process.stdout.readline())
    try:
        assert claim(tmp_path, "a1") is None
        process.kill()
        process.wait()
        lease = claim(tmp_path, "a1")
        assert lease is not None
        with lease:
            assert claim(tmp_path, "a1") is None, "one process must not claim a cell twice either"
        again = claim(tmp_path, "a1")
        assert again is not None
        again.release()
        again.release()
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()
