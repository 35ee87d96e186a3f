"""`python -m ablations.simulate`: the proof that 95 % intervals hold the truth in 95 of 100 tables.

Tables of 16 cells and a baseline are drawn from simulated detectors whose true AP is known (from 100,000 images), for
several numbers of images and seeds; each difference and each effect gets its interval by the code that makes the
tables, and by simpler methods for comparison. `coverage.csv` and `coverage.md` say how many held the truth.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from ablations.files import atomic_write_text
from ablations.rows.machine import machine_info, machine_line, own_command
from ablations.simulation.coverage import METHODS, Coverage, coverage, holds, make_design, true_ap

# Images and seeds.
SIZES = ((150, 3), (600, 3), (600, 5), (5000, 2))
TRUTH_IMAGES = 100_000


def write_coverage(lines: list[Coverage], draws: int, replicates: int, machine: str, directory: Path) -> list[Path]:
    """Write `coverage.csv` and `coverage.md` into `directory`.

    Raises:
        OSError: A file cannot be written.
    """
    frame = pd.DataFrame(lines)
    shown = []
    for (images, seeds, kind), part in frame.groupby(["images", "seeds", "kind"], sort=False):
        by_method = {line["method"]: line for _, line in part.iterrows()}
        cells = [f"{by_method[name]['coverage']:.3f}" if name in by_method else "" for name in METHODS]
        reported = by_method[METHODS[0]]
        cells[0] += f" ± {reported['error']:.3f}"
        shown.append([images, seeds, kind, *cells, f"{reported['half_width']:.2f}"])
    names = ["images", "seeds", "kind", *METHODS, "half-width (AP)"]
    align = ["right", "right", "left", *["right"] * (len(METHODS) + 1)]
    table = pd.DataFrame(shown, columns=names, dtype=str)
    text = (
        f"{machine}\n\n**Share of 95 % intervals that hold the true difference**\n\n"
        f"{table.to_markdown(index=False, disable_numparse=True, colalign=align)}\n\n"
        f"- {draws} tables of 16 cells and a baseline for each line, {replicates} replicates of the images of each; "
        f"true values from {TRUTH_IMAGES:,} images. Differences: the 16 lines against the baseline; effects: the seven "
        "of L, S and C at each of two depths and over both.\n"
        "- ± standard error of the share; the intervals of one table count as one draw. Half-width: the median of the "
        "first method.\n"
        "- as in the tables: training's variance from what cell and seed leave in the whole table, that of images from "
        "the covariance of replicates between seeds. one part counted twice: the variance of the mean over seeds "
        "instead, so that what single runs do with single images is in both parts. variances of differences averaged: "
        "the same, and training's variance as the mean over cells of the variance of their difference to the one "
        "baseline, with cells × (seeds − 1) degrees of freedom. training only, images only: the other part left out.\n"
    )
    texts = {
        "coverage.csv": f"# {machine}\n" + frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
        "coverage.md": text,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        atomic_write_text(directory / name, content)
    return [directory / name for name in texts]


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 1 where the share is not 0.95 ± 0.02 somewhere."""
    parser = argparse.ArgumentParser(prog="python -m ablations.simulate", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/statistics"), metavar="DIR", help="where it goes")
    parser.add_argument("--draws", type=int, default=400, metavar="N", help="tables for each line (default: 400)")
    parser.add_argument("--replicates", type=int, default=100, metavar="N", help="of images (default: 100)")
    options = parser.parse_args(arguments)
    if options.draws < 2 or options.replicates < 2:
        parser.error("--draws and --replicates must be 2 or more")
    # What is running; the checkout may have moved on by the end.
    machine = machine_line([machine_info("cpu", own_command())])
    design = make_design()
    truth = true_ap(design, TRUTH_IMAGES, np.random.default_rng(0))
    lines: list[Coverage] = []
    for images, seeds in SIZES:

        def tell(draw: int, images: int = images, seeds: int = seeds) -> None:
            if (draw + 1) % 50 == 0:
                print(f"{images} images, {seeds} seeds: table {draw + 1} of {options.draws}", file=sys.stderr)

        lines += coverage(design, truth, images, seeds, options.draws, options.replicates, tell)
        # What is done stands, should the rest be stopped.
        paths = write_coverage(lines, options.draws, options.replicates, machine, options.out)
    print(*paths, sep="\n")
    wrong = [line for line in lines if line.method == METHODS[0] and not holds(line)]
    for line in wrong:
        print(f"{line.images} images, {line.seeds} seeds, {line.kind}: {line.coverage:.3f}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
