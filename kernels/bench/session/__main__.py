"""Everything that a first GPU owes this project, most valuable first, with what was predicted beside what is measured.

    python -m kernels.bench.session --minutes 25 --out DIR

Correctness, the roofs of the machine, questions that only it answers, the headline of the benchmarks, tuned tiles, the
headline again, whole heads, and a grid of ablations; from a checkout, as the tests are in it. The same command goes on
where it was stopped: a stage that was done is not run again. Writes `kernels.md` and seven more files at most.
`--rehearse` does the same on a CPU with tiny maps: nothing that it writes is a measurement, and all of it says so.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from kernels.bench.roofline import default_device, machine_line
from kernels.bench.session import report
from kernels.bench.session.stages import REHEARSAL_STAGES, ROOT, STAGES, is_done, restore_tuned, run
from kernels.bench.session.store import DONE, Outcome, Store

LOG, LOG_BYTES = "session.log", 8 * 2**20
INTERRUPTED = 130


class Clock:
    """What is left of the time, and the processes that may use it; their output goes to the session's log."""

    def __init__(self, seconds: float, log: Path) -> None:
        self.end, self.log = time.monotonic() + seconds, log

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, command: list[str], environment: dict[str, str], most: float) -> str:
        """Run a command in the checkout, until the time is over or for `most` seconds.

        Returns `DONE`, or what went wrong: it begins with "stopped" where there was no time, or with "failed".
        """
        with self.log.open("ab+") as log:
            log.write(f"\n$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, process_group=0
            )
            try:
                code = process.wait(max(1.0, min(self.left(), most)))
            except subprocess.TimeoutExpired:
                return "stopped: the time was over" if self.left() <= 0 else f"failed: not done after {most:.0f} s"
            finally:
                # Also what it has started itself, and also where this program is interrupted.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        said = self.log.read_bytes()[-LOG_BYTES:]
        self.log.write_bytes(said)
        lines = said.decode(errors="replace").strip().splitlines()
        return DONE if code == 0 else f"failed: exit code {code}: {lines[-1][:200]}"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 all is done, 1 not all of it, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser("python -m kernels.bench.session", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, required=True, help="a stage that would take longer is not begun")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the rows go, and come from")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny maps: no measurement")
    parser.add_argument("--retry-failed", action="store_true", help="run stages that failed again, too")
    options = parser.parse_args(arguments)
    if not (ROOT / "tests").is_dir():
        print(f"error: there are no tests beside the package in {ROOT.name}; run it from a checkout", file=sys.stderr)
        return 2
    device = default_device()
    if (device.type == "cuda") == options.rehearse:
        found = (
            "a GPU, and --rehearse is for where there is none" if options.rehearse else "no GPU; --rehearse needs none"
        )
        print(f"error: torch sees {found}", file=sys.stderr)
        return 2
    out, machine = options.out.resolve(), f"{machine_line(device)}, commit {_commit()}"
    try:
        store = Store(out, machine, options.rehearse)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stages = REHEARSAL_STAGES if options.rehearse else STAGES
    command = f"python -m kernels.bench.session --minutes {options.minutes:g} --out {options.out.name}"
    command += " --rehearse" if options.rehearse else ""
    clock = Clock(60 * options.minutes, out / LOG)
    restore_tuned(store)
    try:
        for stage in stages:
            ended = store.outcomes().get(stage.name)
            if ended and (ended.outcome == DONE or (ended.outcome.startswith("failed") and not options.retry_failed)):
                print(f"{stage.name}: {ended.outcome} before")
            elif stage.after and not is_done(stage.after, store):
                print(f"{stage.name}: skipped, nothing was done to come after ({stage.after})")
            elif stage.seconds > clock.left():
                print(f"{stage.name}: skipped, takes {stage.seconds} s and {max(0, clock.left()):.0f} s are left")
            else:
                began = time.monotonic()
                # Something hangs: a fault of a kernel must not cost the others their time.
                most = float("inf") if options.rehearse or stage.kind == "grid" else 3.0 * stage.seconds
                outcome = run(stage, store, partial(clock.run, most=most))
                store.add(Outcome(stage.name, outcome, time.monotonic() - began))
                print(f"{stage.name}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)
                report.write(store, stages, command)
    except KeyboardInterrupt:
        return INTERRUPTED
    report.write(store, stages, command)
    print(out / "kernels.md")
    outcomes = store.outcomes()
    return 0 if all(s.name in outcomes and outcomes[s.name].outcome == DONE for s in stages) else 1


if __name__ == "__main__":
    # What ends this program ends what it has started, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
