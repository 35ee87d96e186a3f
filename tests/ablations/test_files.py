"""A file is replaced whole or not at all, whatever a writer left behind."""

import os
import resource

import pytest
import torch

from ablations.files import FileLock, atomic_file, atomic_write_bytes, atomic_write_text, told


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


def test_an_error_of_the_disk_names_its_file_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write") as lock:
        FileLock(tmp_path / "file" / "lock")
    assert told(lock.value) == f"cannot write {tmp_path}/file/lock: File exists"
    with pytest.raises(OSError, match="Not a directory") as plain:
        (tmp_path / "file" / "folder").mkdir()
    assert told(plain.value) == f"Not a directory: {tmp_path}/file/folder"
    assert told(OSError("no number")) == "no number"


def test_a_disk_that_fills_up_while_weights_are_saved_is_told_from_a_crash(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {str(number): torch.zeros(100, 50) for number in range(20)}
    atomic_write_text(tmp_path / "checkpoint.pt", "old")
    try:
        # In the middle of it torch.save says where a file should end, and nothing of the disk.
        for size in (0, 30_000, 300_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with (
                pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt: File too large"),
                atomic_file(tmp_path / "checkpoint.pt") as file,
            ):
                torch.save(state, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.pt").read_text() == "old" and os.listdir(tmp_path) == ["checkpoint.pt"]
