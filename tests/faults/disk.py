"""Disks that are full or read-only: before each write that the program makes, and from the beginning."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from multiprocessing import Lock
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

from victim import Run, differences, rows_of, say

SIZE = "48m"
# Bytes that a process keeps before it writes any.
LARGE = 1 << 14
# What Python's audit events of writing are called in the report; of a file that is renamed its first name is shown.
WRITES = {"open": "", "os.mkdir": " (made)", "os.rename": " (renamed)"}
# The place that is watched, and whether its disk has been filled.
_watched: dict[str, str] = {}
_filled = RawArray("i", 1)
_once = Lock()


@contextmanager
def disk(folder: Path):
    """A small file system in memory; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user can make a file system."""
    try:
        with disk(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def site_of(path: str) -> str:
    """A file by its role: without hashes and random parts; the columns of parsed data are many of one kind."""
    return re.sub(r"(?<=<key>/)[^/]*\.npy$", "<column>.npy", re.sub(r"[0-9a-f]{16,}(-[0-9a-f]{8})?", "<key>", path))


def watch(event: str, arguments: tuple) -> None:
    """Sees all that writes; before the one that is meant it fills the disk, in whatever process that is."""
    if event not in WRITES or "out" not in _watched or not isinstance(arguments[0], str | Path):
        return
    path = str(arguments[0])
    if not path.startswith(_watched["out"]):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    site = site_of(path[len(_watched["out"]) + 1 :]) + WRITES[event]
    if "list" in _watched:
        with _once:
            # Not through Python's own `open`, whose events come back here.
            file = os.open(_watched["list"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, f"{site}\n".encode())
            os.close(file)
    elif site == _watched.get("site"):
        with _once:
            if not _filled[0]:
                _filled[0] = 1
                fill(_watched["filler"], int(_watched["left"]))


def fill(path: str, left: int) -> None:
    """Take all that a disk has, but for so many bytes."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 1 << 12, 1):
        with suppress(OSError):
            while True:
                os.write(file, b"0" * size)
    os.truncate(path, os.stat(path).st_size - left)
    os.close(file)


def halves(sites: list[str], whole: Path) -> list[tuple[str, int]]:
    """Every site with no space that is left, and behind those of large files, with space for half of one."""
    sizes: dict[str, int] = {}
    for path in whole.rglob("*"):
        site = site_of(str(path.with_name(f".{path.name}.tmp").relative_to(whole)))
        sizes[site] = max(sizes.get(site, 0), path.stat().st_size)
    large = {site: size // 2 for site, size in sizes.items() if size > 2 * LARGE}
    return [(site, left) for site in sites for left in (0, *([large[site]] if site in large else []))]


def full_disk(data: Path, folder: Path, every: int) -> list[dict[str, object]]:
    """For every file that a run writes, one in which the disk is full just before, and one behind it that goes on.

    Args:
        data, folder: Directories.
        every: Take each file (1), each second one (2), and so on.
    """
    sys.addaudithook(watch)
    results = []
    with disk(folder / "disk") as place:
        out, log, whole = place / "out", folder / "log", folder / "whole-2"
        _watched.update(out=str(out), list=str(folder / "sites"))
        assert Run(data, out, ONLY, log=log).wait() == 0
        del _watched["list"]
        shutil.copytree(out, whole)
        sites = halves(list(dict.fromkeys((folder / "sites").read_text().splitlines())), whole)[::every]
        for number, (site, left) in enumerate(sites):
            shutil.rmtree(out)
            _filled[0] = 0
            _watched.update(site=site, left=str(left), filler=str(place / "filler"))
            first = Run(data, out, ONLY, log=log)
            code, said, rows = first.wait(), first.complaints(), rows_of(out)
            del _watched["site"]
            (place / "filler").unlink(missing_ok=True)
            again = Run(data, out, ONLY, "--retry-failed", log=log).wait()
            now = rows_of(out)
            results.append(
                {
                    "full before": site or "(whether it can be written to)",
                    "bytes left": left,
                    "exit code": code,
                    "said": brief(said, place) or ("(nothing was left to write)" if _filled[0] else "(not reached)"),
                    "lines": len(said),
                    "rows lost": sum(now.get(key) != row for key, row in rows.items()),
                    "exit code of the next": again,
                    "differences": len(differences(out, whole)),
                }
            )
            say(f"{number + 1} of {len(sites)} files: {site}, {left} left: {code}, then {again}")
    return results


def no_permission(data: Path, folder: Path) -> list[dict[str, object]]:
    """A directory, and one below it, in which this user may not write."""
    results, log, whole = [], folder / "log", folder / "whole-1"
    assert Run(data, whole, ONLY, log=log).wait() == 0
    for name in (".", "cells"):
        out = folder / "forbidden"
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name).chmod(0o500)
        run = Run(data, out, ONLY, log=log, plain=True)
        code, said = run.wait(), run.complaints()
        (out / name).chmod(0o700)
        again = Run(data, out, ONLY, log=log, plain=True).wait()
        results.append(
            {
                "no permission in": f"DIR/{name}".removesuffix("/."),
                "exit code": code,
                "said": brief(said, folder),
                "lines": len(said),
                "exit code of the next": again,
                "differences": len(differences(out, whole)),
            }
        )
        shutil.rmtree(out)
    return results


ONLY = "LSC,depth=1"


def brief(said: list[str], place: Path) -> str:
    """The first line of what was said, without the command that goes on."""
    return said[0].replace(str(place), "").partition("; finished cells are kept")[0] if said else ""


def read_only(data: Path, folder: Path) -> list[dict[str, object]]:
    """A disk that is read-only from the beginning, and one that becomes so while a cell trains."""
    results = []
    with disk(folder / "disk") as place:
        out, log = place / "out", folder / "log"
        for name, wait_for in (("from the beginning", None), ("from the first checkpoint on", "cells/*/checkpoint.pt")):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            if wait_for is None:
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
                run = Run(data, out, ONLY, log=log)
            else:
                run = Run(data, out, ONLY, log=log)
                while not list(out.glob(wait_for)) and not run.ended():
                    pass
                # Files that are open for writing keep it from becoming read-only.
                while subprocess.run(["mount", "-o", "remount,ro", str(place)], capture_output=True).returncode:
                    if run.ended():
                        break
            code, said = run.wait(), run.complaints()
            subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
            again = Run(data, out, ONLY, log=log).wait()
            results.append(
                {
                    "read-only": name,
                    "exit code": code,
                    "said": brief(said, place),
                    "lines": len(said),
                    "exit code of the next": again,
                    "differences": len(differences(out, folder / "whole-2")),
                }
            )
    return results
