"""File systems on which a lock is known to this machine alone: runners on several machines would not see each other."""

import os
import re
from pathlib import Path

# By the type of the file system, the mount options with which `flock` stays on the machine; None for always.
# nfs(5): local_lock, nolock. mount.lustre(8): localflock. mount.cifs(8): nobrl. ocfs2 and gfs2: localflocks. A file
# system in user space that does not take locks has them kept by the kernel; of sshfs that is known.
LOCAL: dict[str, tuple[str, ...] | None] = {
    "nfs": ("nolock", "local_lock=all", "local_lock=flock"),
    "nfs4": ("nolock", "local_lock=all", "local_lock=flock"),
    "lustre": ("localflock",),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
    "ocfs2": ("localflocks",),
    "gfs2": ("localflocks",),
    "fuse.sshfs": None,
}


def local_locks(path: Path, mountinfo: str) -> str | None:
    """Why locks at a path are seen by this machine alone, where that is known; None where they are not, or who knows.

    Args:
        path: Absolute; need not exist.
        mountinfo: The content of /proc/self/mountinfo, see proc(5).

    Example:
        >>> from pathlib import Path
        >>> line = "90 1 0:50 / /scratch rw,relatime shared:9 - nfs4 host:/scratch rw,vers=4.2,local_lock=all"
        >>> local_locks(Path("/scratch/runs"), line)
        '/scratch is mounted as nfs4 with local_lock=all'
        >>> local_locks(Path("/scratch/runs"), line.replace("=all", "=none"))
    """
    best: tuple[int, str | None] = (-1, None)
    for line in mountinfo.splitlines():
        mount, _, system = line.partition(" - ")
        fields, kind = mount.split(), system.split()
        if len(fields) < 6 or len(kind) < 3:
            continue
        # White space in a name is written in octal.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        # Of two mounts on one point the later one is seen.
        if not path.is_relative_to(point) or len(point) < best[0]:
            continue
        options = {*fields[5].split(","), *kind[2].split(",")}
        wanted = LOCAL.get(kind[0], ())
        found = [] if wanted is None else [option for option in wanted if option in options]
        with_option = f" with {found[0]}" if found else ""
        best = len(point), f"{point} is mounted as {kind[0]}{with_option}" if found or wanted is None else None
    return best[1]


def warning_of(out: Path) -> str | None:
    """What a user has to know of the locks below a directory of results."""
    try:
        reason = local_locks(Path(os.path.realpath(out)), Path("/proc/self/mountinfo").read_text())
    except OSError:
        return None
    if reason is None:
        return None
    return (
        f"{reason}: locks there are seen by this machine alone, so let no other machine run on {out} at the same time"
    )
