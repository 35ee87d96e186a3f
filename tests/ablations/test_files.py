"""A file is replaced whole or not at all, whatever a writer left behind."""

import os

import pytest

from ablations.files import atomic_file, atomic_write_bytes, atomic_write_text


def test_a_writer_that_fails_half_way_leaves_the_old_file(tmp_path):
    target = tmp_path / "checkpoint.pt"
    atomic_write_bytes(target, b"old")
    with pytest.raises(RuntimeError, match="half"), atomic_file(target) as file:
        file.write(b"new, but only")
        raise RuntimeError("half")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_what_a_killed_writer_left_does_not_reach_the_next_file(tmp_path):
    (tmp_path / ".note.txt.tmp").write_text("a much longer text that a killed process left behind")
    atomic_write_text(tmp_path / "note.txt", "µ")
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "µ"
    assert os.listdir(tmp_path) == ["note.txt"]
