"""Where locks are known not to reach other machines, by lines as /proc/self/mountinfo has them."""

import errno
import fcntl
from pathlib import Path

import pytest

from ablations.executors.mounts import local_locks
from ablations.files import FileLock

LINES = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,errors=remount-ro
90 22 0:50 / /home rw,relatime shared:9 - nfs4 filer:/home rw,vers=4.2,hard,proto=tcp,local_lock=none,addr=192.0.2.1
91 22 0:51 / /old rw,relatime shared:10 - nfs filer:/old rw,vers=3,nolock,proto=tcp,local_lock=all,addr=192.0.2.1
92 22 0:52 / /lustre rw,noatime shared:11 - lustre 192.0.2.2@tcp:/scratch rw,flock,lazystatfs
93 22 0:53 / /lustre/local rw,noatime shared:12 - lustre 192.0.2.2@tcp:/local rw,localflock,lazystatfs
94 22 0:54 / /my\\040share rw,relatime shared:13 - cifs //192.0.2.3/share rw,vers=3.1.1,nobrl
95 22 0:55 / /far rw,nosuid,nodev shared:14 - fuse.sshfs me@192.0.2.4: rw,user_id=0
96 22 0:56 / /fuse rw,nosuid,nodev shared:15 - fuse.other thing rw,user_id=0
97 91 0:57 / /old/new rw,relatime shared:16 - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/var/runs", None),
        ("/home/me/runs", None),
        ("/old/runs", "/old is mounted as nfs with nolock"),
        ("/older/runs", None),
        ("/old/new/runs", None),
        ("/lustre/runs", None),
        ("/lustre/local/runs", "/lustre/local is mounted as lustre with localflock"),
        ("/my share/runs", "/my share is mounted as cifs with nobrl"),
        ("/far/runs", "/far is mounted as fuse.sshfs"),
        ("/fuse/runs", None),
    ],
)
def test_locks_that_stay_on_a_machine_are_told_by_the_mount(path, reason):
    assert local_locks(Path(path), LINES) == reason


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with FileLock(tmp_path / "lock") as lock, pytest.raises(OSError, match=rf"cannot lock {lock.path}: no locks here"):
        lock.acquire()
