"""The differences of one table and what they are worth, from its rows and their replicates.

The method is that of `ablations.statistics`: each line against the baseline of its detector, paired by seed and by
image, training's variance pooled over the lines of a detector, Holm's correction over the lines of the table.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ablations.evaluation.replicates import FILE, NAMES, read_replicates
from ablations.rows.row import Row, Settings, good, metrics_of
from ablations.rows.store import how_to_mend, warn
from ablations.statistics.intervals import Interval, Run, contrast, holm, resolved
from ablations.statistics.training import Array, Training, pool

# How the replicates of a row are found: (B, len(NAMES)) in percent, or None.
Replicates = Callable[[Row], Array | None]


class Experiment(NamedTuple):
    """What tells the lines of one table apart. Rows of one experiment differ in their seeds."""

    detector: str
    attentions: str
    depth: int | None
    formulation: str | None
    coarse_offsets: str | None
    placement: str | None

    def __str__(self) -> str:
        depth = "" if self.depth is None else f" depth {self.depth}"
        return f"{self.detector} {self.attentions}{depth}"


# All other fields of a cell are the settings that the rows of one table have in common.
VARIED = (*Experiment._fields, "seed")


class Difference(NamedTuple):
    """AP of a line minus that of its baseline.

    Attributes:
        value: Mean over the seeds that both have; NaN where they share none.
        by_seed: The difference of each such seed.
        interval: What it is worth; None where nothing is known of it.
        p: Of no difference, corrected for all differences of the table; None where not both are covered.
    """

    value: float
    by_seed: tuple[float, ...] = ()
    interval: Interval | None = None
    p: float | None = None


def no_replicates(row: Row) -> None:
    """For rows without files beside them."""


def stored_replicates(directory: str | Path) -> Replicates:
    """The replicates that lie beside the rows of a directory; what is damaged is warned of, and counts as absent."""

    def found(row: Row) -> Array | None:
        try:
            return read_replicates(Path(directory) / "cells" / row["key"] / FILE)
        except (OSError, ValueError) as problem:
            warn_once(f"{problem}; {how_to_mend(directory, row)}")
            return None

    return found


@cache
def warn_once(problem: str) -> None:
    """Warn of what tables, pictures and report, which each read all files, would say again."""
    warn(problem)


def experiment_of(cell: Settings) -> Experiment:
    """The line of a table that a cell belongs to."""
    return Experiment(
        cell["detector"],
        cell["attentions"],
        cell["depth"],
        cell.get("formulation"),
        cell.get("coarse_offsets"),
        cell.get("placement"),
    )


def measured(row: Row, name: str) -> float | None:
    """One of `NAMES`: an AP in percent, or AP50 points lost to a type of error; None where a row lacks it."""
    values: Mapping[str, Any] = metrics_of(row) if name.startswith("AP") else row.get("errors") or {}
    return values.get(name)


def run_of(row: Row, name: str, replicates: Array | None) -> Run | None:
    """One of `NAMES` of a row, with its column of the row's replicates; None where the row lacks the number."""
    value = measured(row, name)
    if value is None:
        return None
    return Run(value, None if replicates is None else replicates[:, NAMES.index(name)])


@dataclass(frozen=True)
class Statistics:
    """What the rows of one table say together; made by `make_statistics`.

    Attributes:
        results: The good rows, by experiment and seed.
        replicates: Those of each good row that has them, by its key.
    """

    results: Mapping[Experiment, Mapping[int, Row]]
    replicates: Mapping[str, Array] = field(repr=False)

    def runs(self, name: str) -> dict[Experiment, dict[int, Run]]:
        """One of `NAMES` for each cell that has it."""
        found: dict[Experiment, dict[int, Run]] = {}
        for experiment, by_seed in self.results.items():
            for seed, row in by_seed.items():
                if run := run_of(row, name, self.replicates.get(row["key"])):
                    found.setdefault(experiment, {})[seed] = run
        return found

    def training(self, name: str) -> dict[Experiment, Training[Experiment]]:
        """For each experiment, how the runs of its detector scatter in one of `NAMES`."""
        detectors: defaultdict[str, dict[Experiment, dict[int, float]]] = defaultdict(dict)
        for experiment, by_seed in self.runs(name).items():
            detectors[experiment.detector][experiment] = {seed: run.value for seed, run in by_seed.items()}
        pools = {detector: pool(values) for detector, values in detectors.items()}
        return {each: pools[detector] for detector, values in detectors.items() for each in values}

    @cached_property
    def images(self) -> int | None:
        """How many images were evaluated; None where the rows do not say."""
        return next(
            (n for by_seed in self.results.values() for row in by_seed.values() if (n := row.get("images"))), None
        )

    @cached_property
    def differences(self) -> dict[Experiment, Difference]:
        """Of each line whose detector has a baseline, that of the baseline aside."""
        runs, training = self.runs("AP"), self.training("AP")
        baselines = {each.detector: each for each in runs if each.attentions == "baseline"}
        found: dict[Experiment, Difference] = {}
        for each in runs:
            baseline = baselines.get(each.detector)
            if baseline is None or each == baseline:
                continue
            value, interval = contrast({each: 1.0, baseline: -1.0}, runs, training, self.images) or (np.nan, None)
            seeds = sorted(runs[each].keys() & runs[baseline].keys())
            by_seed = tuple(runs[each][seed].value - runs[baseline][seed].value for seed in seeds)
            found[each] = Difference(value, by_seed, interval)
        corrected = holm([each.interval.p if each.interval else None for each in found.values()])
        return {name: each._replace(p=p) for (name, each), p in zip(found.items(), corrected, strict=True)}

    def notes(self) -> list[str]:
        """What a reader has to know of the differences of the table, in sentences."""
        found = self.differences
        intervals = [each.interval for each in found.values() if each.interval]
        if not found:
            return []
        notes = [_basis(intervals, self.images, self.training("AP"))] if intervals else []
        kinds = {interval.covers for interval in intervals}
        if "images only" in kinds:
            notes.append(
                "images only: one seed, so the interval says nothing of another training run; --seeds 3 would."
            )
        if "training only" in kinds:
            notes.append("training only: no replicates are stored, so the interval says nothing of other images.")
        if len(intervals) < len(found):
            notes.append("delta_AP without ±: one seed and no replicates, so nothing is known of what it is worth.")
        unpaired = [str(name) for name, each in found.items() if not each.by_seed]
        if unpaired:
            notes.append(f"No delta_AP, for want of a seed that the baseline has, too: {', '.join(unpaired)}.")
        shared = {name: each.by_seed for name, each in found.items()}
        fewer = [str(name) for name, each in shared.items() if each and len(each) < len(self.results[name])]
        if fewer:
            notes.append(f"delta_AP over the seeds that the baseline has, too, and AP over all: {', '.join(fewer)}.")
        compared = sum(each.p is not None for each in found.values())
        size = resolved(intervals, compared) if compared else None
        if size is not None:
            plural = "" if compared == 1 else "s"
            notes.append(
                f"*: not the baseline's AP at 5 %, by Holm's correction over {compared} comparison{plural}. "
                f"A true difference of {size:.1f} AP would be marked in four of five such tables; "
                "no mark does not mean no difference."
            )
        return notes


def make_statistics(rows: Iterable[Row], replicates: Replicates = no_replicates) -> Statistics:
    """The statistics of rows that share a table, in any order.

    Args:
        rows: Good and failed ones.
        replicates: How those of a row are found; rows of one table were evaluated on the same images.
    """
    results: defaultdict[Experiment, dict[int, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: (str(experiment_of(row["cell"])), row["cell"]["seed"], row["key"])):
        if good(row):
            results[experiment_of(row["cell"])][row["cell"]["seed"]] = row
    good_rows = [row for by_seed in results.values() for row in by_seed.values()]
    draws = {row["key"]: found for row in good_rows if (found := replicates(row)) is not None}
    return Statistics(dict(results), draws)


def _basis(intervals: list[Interval], images: int | None, training: Mapping[Experiment, Training[Experiment]]) -> str:
    """What the intervals were made from."""
    seeds = sorted({len(interval.seeds) for interval in intervals})
    words = [f"{' or '.join(map(str, seeds))} seed{'' if seeds == [1] else 's'} a cell"]
    if images and any(interval.covers != "training only" for interval in intervals):
        words.insert(0, f"{images} images")
    pools = {each.detector: pool for each, pool in training.items()}
    for detector, found in sorted(pools.items()):
        if found.pooled:
            of = f"{detector}: " if len(pools) > 1 else ""
            words.append(
                f"{of}training's variance pooled over {found.cells} cells ({found.pooled.freedom:g} degrees of "
                f"freedom; beside what a seed does to all of them, runs have a standard deviation of "
                f"{found.pooled.variance**0.5:.1f} AP)"
            )
        if found.own:
            own = ", ".join(map(str, found.own))
            words.append(f"out of line at 1 % by Brown and Forsythe's test, so with a variance of its own: {own}")
    return (
        "delta_AP ± half of its 95 % interval, against the detector's baseline, paired by seed and by image. "
        f"From {'; '.join(words)}."
    )
