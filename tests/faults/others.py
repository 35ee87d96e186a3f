"""A clock that jumps, files that are cut off, and several runners on one directory."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from victim import SMALL, Run, differences, rows_of, take

from ablations.rows.store import read_rows

# The wall clock, moved by the number of seconds that a file holds; files' times and the monotonic clock stay.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long shift(void) {
    char text[32] = {0};
    int file = open(getenv("CLOCK_SHIFT"), O_RDONLY);
    if (file < 0) return 0;
    if (read(file, text, 31) < 0) text[0] = 0;
    close(file);
    return atol(text);
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += shift();
    return result;
}
time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
"""
PROGRAM = f"""
import sys
from dataclasses import replace
from functools import partial
from ablations import grid, run
from ablations.experiment import experiment
experiment.measure_latency = partial(experiment.measure_latency, seconds=0.02)
if __name__ == "__main__":
    grid.PRESETS["tiny"] = replace(grid.PRESETS["tiny"], **{SMALL})
    sys.exit(run.main(sys.argv[1:]))
"""
YEAR = 365 * 24 * 3600


def clock_that_jumps(data: Path, folder: Path, only: str) -> list[dict[str, object]]:
    """The wall clock goes forward, or back, by a year when the first checkpoint is there."""
    shim, program, shift = folder / "clock.so", folder / "program.py", folder / "shift"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(shim), "-ldl"], input=SHIM.encode(), check=True
    )
    program.write_text(PROGRAM)
    environment = {**os.environ, "LD_PRELOAD": str(shim), "CLOCK_SHIFT": str(shift), "PYTHONPATH": os.getcwd()}
    results = []
    for name, by in (("forward", YEAR), ("back", -YEAR)):
        out = folder / f"clock-{name}"
        shift.write_text("0")
        command = [sys.executable, str(program), "--grid", "--data", str(data), "--out", str(out), "--only", only]
        command += ["--workers", "2", "--weights", str(Path("ablations/generated/tiny.safetensors").resolve())]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while process.poll() is None and not list(out.glob("cells/*/checkpoint.pt")):
            time.sleep(0.01)
        shift.write_text(str(by))
        _, errors = process.communicate(timeout=120)
        rows = read_rows(out)
        jumped = sum(row["finished"][:4] != row["started"][:4] for row in rows)
        results.append(
            {
                "clock by a year": name,
                "exit code": process.returncode,
                "said": errors.strip(),
                "rows that began before and ended behind the jump": jumped,
                "seconds below 0": sum(row["training"]["seconds"] < 0 for row in rows),
                "differences": len(differences(out, folder / "whole")),
            }
        )
    return results


def cut_files(data: Path, folder: Path, only: str) -> list[dict[str, object]]:
    """Each file of a finished cell cut in half; the weights of one whose row is gone."""
    out, log, results = folder / "cut", folder / "log", []
    assert Run(data, out, only, log=log).wait() == 0
    for name in ("row", "detections.json.gz", "replicates.npz", "training.json", "checkpoint.pt"):
        key, row = next(iter(rows_of(out).items()))
        file = out / "cells" / f"{key}.json"
        path = {
            "row": file,
            "training.json": (out / row["weights"]).with_name(name),
            "checkpoint.pt": out / row["weights"],
        }.get(name)
        path = path or out / "cells" / key / name
        if path.parent == (out / row["weights"]).parent:
            # They are needed, and looked at, where there is no row.
            file.unlink()
        cut = path.read_bytes()[: path.stat().st_size // 2]
        path.write_bytes(cut)
        run = Run(data, out, only, log=log)
        code = run.wait()
        said = [line for line in run.printed().splitlines() if "set aside" in line]
        kept = any(each.read_bytes() == cut for each in out.glob("cells/replaced/**/*") if each.is_file())
        results.append(
            {
                "cut in half": name,
                "exit code": code,
                "said": re.sub(r" \(.{90,}\)", " (…)", said[0].replace(str(out), "")) if said else "",
                "lines": len(said),
                "kept in cells/replaced": kept,
                "differences": len(differences(out, folder / "whole")),
            }
        )
    return results


def runners(data: Path, folder: Path, only: str, count: int, seeds: int) -> dict[str, object]:
    """Several runners, begun at once, on a grid of cells of one step each."""
    out = folder / "shared"
    take("trainings"), take("doubled")
    steps = ("--steps", "1", "--seeds", str(seeds))
    running = [Run(data, out, only, *steps, log=folder / f"log-{n}") for n in range(count)]
    codes = [run.wait(600) for run in running]
    rows = rows_of(out)
    return {
        "runners at once": count,
        "cells": len(rows),
        "exit codes": sorted(set(codes)),
        "trainings": take("trainings"),
        "rows doubled": take("doubled"),
    }
