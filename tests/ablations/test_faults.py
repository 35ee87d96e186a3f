"""A short `make faults`: what is killed, cut off, full, read-only or shared by several runners loses nothing."""

import json
import os
import subprocess
import sys

from places import ROOT


def test_no_fault_loses_or_doubles_a_row_and_every_one_is_said_in_a_line(tmp_path):
    command = [sys.executable, "tests/faults/main.py", "--short", "--kills", "4", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    parts = json.loads((tmp_path / "faults.json").read_text())["faults"]
    (shared,) = parts["Runners on one directory"]
    assert shared["cells"] == shared["trainings"] == 4 and shared["exit codes"] == [0]
    (killed,) = parts["SIGKILL at random moments"]
    assert killed["kills"] >= 4 and killed["grids finished"] > 0
    assert killed["rows lost"] == killed["rows doubled"] == killed["grids unequal to the unkilled one"] == 0
    for row in (
        row
        for title, rows in parts.items()
        if title.startswith(("Files", "A full", "A read", "A directory"))
        for row in rows
    ):
        assert row["differences"] == 0 and row["lines"] == 1, row
        assert row.get("kept in cells/replaced", True) and row.get("rows lost", 0) == 0, row
        assert "exit code of the next" not in row or (row["exit code"], row["exit code of the next"]) in (
            (1, 0),
            (2, 0),
        )
    assert len(parts["Files cut in half"]) == 5
    # Only root can fill a disk of its own.
    assert "A full disk" in parts or parts["Full and read-only disks"][0]["not done"]
