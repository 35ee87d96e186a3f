"""`make faults`: break a small grid in every way that was thought of, and write what came of it to results/faults/.

    python tests/faults/main.py [--kills N] [--out DIR] [--short]

Needs Linux; a full and a read-only disk need root, the jumping clock needs gcc. What cannot be done here is said in its
place. About ten minutes on two cores.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd
import victim
from disk import can_mount, full_disk, no_permission, read_only
from kills import kills
from others import clock_that_jumps, cut_files, runners

from ablations.files import atomic_write_text
from ablations.generate import generate
from ablations.rows.machine import machine_info, machine_line

# Of the default grid those of one block.
CELLS = 8
INTRODUCTION = """
A grid of {cells} cells of {steps} steps each, at two workers, is broken, and the command that began it
is typed again. *Differences* are those to the same grid that nothing was done to: in metrics, losses, weights (bit for
bit) and detections. *Rows lost*: good rows that were there and are not, or not as they were; *rows doubled*: good rows
that were written again.
"""


def main() -> int:
    """Run every fault and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many processes are killed (default: 200)")
    parser.add_argument("--short", action="store_true", help="a little of each, for the tests")
    parser.add_argument("--out", type=Path, default=Path("results/faults"), help="default: results/faults")
    options = parser.parse_args()
    machine = machine_info("cpu", f"python tests/faults/main.py --kills {options.kills}")
    victim.prepare()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    parts: dict[str, list[dict[str, object]]] = {}
    try:
        data = generate(folder / "data", "tiny", train=12, val=5)
        only = "depth=1,coarse_offsets=" if options.short else "depth=1"
        victim.show(everything=False)
        parts["Runners on one directory"] = [runners(data, folder, only, *((3, 1) if options.short else (8, 2)))]
        parts["SIGKILL at random moments"] = [kills(data, folder, only, options.kills)]
        parts["Files cut in half"] = cut_files(data, folder, only)
        parts["A directory without permission"] = no_permission(data, folder)
        if can_mount(folder / "disk"):
            victim.show(everything=not options.short)
            parts["A full disk"] = full_disk(data, folder, 5 if options.short else 1)
            parts["A read-only disk"] = read_only(data, folder)
        else:
            parts["Full and read-only disks"] = [{"not done": "this user cannot mount a file system"}]
        if options.short:
            pass
        elif shutil.which("gcc"):
            parts["A clock that jumps"] = clock_that_jumps(data, folder, only)
        else:
            parts["A clock that jumps"] = [{"not done": "there is no gcc"}]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    steps = INTRODUCTION.format(cells=CELLS, steps=victim.SMALL["steps"]).strip()
    text = [f"<!-- {machine_line([machine])} -->", "# Faults", machine_line([machine]), steps]
    for title, rows in parts.items():
        frame = pd.DataFrame(rows)
        turned = frame.T.reset_index() if len(frame) == 1 else frame
        headers = ["what", "figure"] if len(frame) == 1 else list(frame.columns)
        text += [f"## {title}", turned.to_markdown(index=False, headers=headers)]
    atomic_write_text(options.out / "faults.md", "\n\n".join(text[1:]) + "\n")
    record = {"machine": machine, "faults": parts}
    atomic_write_text(options.out / "faults.json", json.dumps(record, indent=1) + "\n")
    print(f"written: {options.out}/faults.md and faults.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
