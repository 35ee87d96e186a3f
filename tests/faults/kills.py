"""SIGKILL at random moments: workers, the driver, all of them at once."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from victim import DOING, Run, differences, doing, rows_of, say, take

WHO = ("worker", "driver", "all")
# Behind a worker that was killed the next moment comes sooner, in this part of the time that the grid takes.
SOONER = 0.25


def kills(data: Path, folder: Path, only: str, count: int, seed: int = 0) -> dict[str, object]:
    """Kill so many times, typing the same command again behind each; returns what came of it.

    A grid that has come to its end is compared with one that nothing was done to, and the next one begins.
    """
    whole, out, log = folder / "whole", folder / "killed", folder / "log"
    began = time.monotonic()
    assert Run(data, whole, only, log=log).wait() == 0
    # So that on a slow machine, too, they are spread over all that the program does.
    seconds = time.monotonic() - began
    draw, tally, moments = random.Random(seed), Counter[str](), Counter[str]()
    grids = lost = unequal = 0
    take("doubled")
    while tally.total() < count:
        rows: dict[str, object] = {}
        running, last = Run(data, out, only, log=log), ""
        while True:
            until = time.monotonic() + draw.uniform(0.0, seconds * (SOONER if last == "worker" else 1.0))
            while time.monotonic() < until and not running.ended():
                time.sleep(0.002)
            if running.ended():
                if running.code == 0:
                    break
                # A cell whose worker was killed twice in one run has a row that says so, and is run again when asked.
                assert "run again with --retry-failed" in running.printed(), running.printed()
                running, last = Run(data, out, only, "--retry-failed", log=log), ""
                continue
            last, workers = WHO[draw.randrange(3)], running.workers()
            victims = {"worker": workers[:1], "driver": [running.pid], "all": [running.pid, *workers]}[last]
            tally[last] += bool(victims)
            struck = workers[:1] if last == "worker" else workers
            moments[max(map(doing, struck), key=DOING.index, default=DOING[0])] += bool(victims)
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if last != "worker":
                running.wait()
                running = Run(data, out, only, log=log)
            now = rows_of(out)
            lost += sum(now.get(key) != row for key, row in rows.items())
            rows = dict(now)
        lost += len(rows_of(whole).keys() - rows_of(out).keys())
        if wrong := differences(out, whole):
            unequal += 1
            say(f"not equal: {', '.join(wrong)}; kept in {out.rename(folder / f'unequal-{grids}')}")
            out.mkdir()
        grids += 1
        shutil.rmtree(out)
        say(f"{tally.total()} of {count} kills, {grids} grids finished")
    return {
        "kills": tally.total(),
        **{f"of {who}": tally[who] for who in WHO},
        **{f"while {moment}": moments[moment] for moment in DOING},
        "grids finished": grids,
        "rows lost": lost,
        "rows doubled": take("doubled"),
        "grids unequal to the unkilled one": unequal,
    }
