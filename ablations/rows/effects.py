"""What each attention buys: main effects and interactions of L, S and C, from the eight subsets of a detector.

A 2 × 2 × 2 design: each effect is a mean over all combinations of the other letters, so it uses all eight cells, and
over depths all cells of all depths. It is a contrast of their APs, and its interval is made as that of a difference.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping

import pandas as pd

from ablations.evaluation.replicates import NAMES
from ablations.rows.frame import SUBSETS, difference_text, formulation_name
from ablations.rows.statistics import Experiment, Statistics
from ablations.statistics.intervals import Interval, contrast, holm

EFFECTS = ("L", "S", "C", "L×S", "L×C", "S×C", "L×S×C")
EFFECTS_COLUMNS = (
    "detector",
    "depth",
    "formulation",
    "seeds",
    "metric",
    "effect",
    "value",
    "half_width",
    "p",
    "covers",
)
EFFECTS_TITLE = "What each attention buys"
# Detectors and depths that a line is a mean over.
ALL = "all"

# The eight cells of one depth, by subset.
Cube = Mapping[str, Experiment]
# Detector, depth and formulation, as they are shown.
Line = tuple[str, str, str]


def effect(ap: Mapping[str, float], letters: str) -> float:
    """What `letters` change in AP, in points.

    One letter: AP with it minus AP without it, the mean over the four settings of the others. Two: how much more the
    one brings where the other is on than where it is off, the mean over the third. Three: how much larger that
    difference is where the third is on than where it is off.

    Args:
        ap: AP of each of the eight subsets; `none` is the empty one.
        letters: One to three of L, S, C.

    Example:
        >>> from ablations.rows.effects import effect
        >>> ap = {"none": 20, "L": 21, "S": 23, "C": 20, "LS": 25, "LC": 21, "SC": 23, "LSC": 25}
        >>> effect(ap, "S"), effect(ap, "LS"), effect(ap, "C")
        (3.5, 1.0, 0.0)
    """
    return sum(weight * ap[subset] for subset, weight in effect_weights(letters).items())


def effect_weights(letters: str) -> dict[str, float]:
    """The weight of each subset in the effect of `letters`."""
    weights = {}
    for on in itertools.product((False, True), repeat=3):
        subset = "".join(letter for letter, there in zip("LSC", on, strict=True) if there)
        sign = math.prod(1 if letter in subset else -1 for letter in letters)
        # The other letters have 2^(3 - len) settings to average over.
        weights[subset or "none"] = sign / 2 ** (3 - len(letters))
    return weights


def effects_table(statistics: Statistics) -> pd.DataFrame:
    """Effects on every AP and type of error, for each detector, formulation and depth that has all eight subsets.

    Where there are several depths, lines with depth `all` are the mean over these depths (the depths that were run, not
    depths in general); where several detectors share a formulation, lines with detector `all` are the mean over them.

    Returns:
        One line an effect: `EFFECTS_COLUMNS`. `value` in points: of AP, or of AP50 lost to a type of error (less is
        better); `half_width` and corrected `p` (over all effects of the table) NaN where they cannot be told.
        Perhaps empty.
    """
    lines: list[tuple[str, str, str, str, str, float, Interval | None]] = []
    cubes = _cubes(statistics)
    for metric in NAMES:
        runs, training = statistics.runs(metric), statistics.training(metric)
        for (detector, depth, formulation), members in cubes.items():
            if not all(experiment in runs for cube in members for experiment in cube.values()):
                continue
            for name in EFFECTS:
                weights: defaultdict[Experiment, float] = defaultdict(float)
                for cube in members:
                    for subset, weight in effect_weights(name.replace("×", "")).items():
                        # A cell without S can serve several treatments of offsets.
                        weights[cube[subset]] += weight / len(members)
                found = contrast(weights, runs, training, statistics.images)
                if found is not None:
                    lines.append((detector, depth, formulation, metric, name, *found))
    intervals = [line[-1] for line in lines]
    corrected = holm([interval.p if interval else None for interval in intervals])
    records = [
        {
            **dict(zip(("detector", "depth", "formulation", "metric", "effect", "value"), line, strict=False)),
            "seeds": len(interval.seeds) if interval else 1,
            "half_width": interval.half_width if interval else None,
            "p": p,
            "covers": interval.covers if interval else "",
        }
        for line, interval, p in zip(lines, intervals, corrected, strict=True)
    ]
    return pd.DataFrame(records, columns=EFFECTS_COLUMNS).astype({"value": float, "half_width": float, "p": float})


def effects_text(table: pd.DataFrame) -> pd.DataFrame:
    """`effects_table` as it is read: one line an effect, one column a metric, `value ± half_width`, marked by `*`."""
    names = ["detector", "depth", "formulation", "effect"]
    shown = table.assign(
        text=[difference_text(*line) for line in table[["value", "half_width", "p"]].itertuples(index=False)]
    )
    metrics = [name for name in NAMES if (table["metric"] == name).any()]
    lines = []
    for key, part in shown.groupby(names, sort=False):
        lines.append(dict(zip(names, key, strict=True)) | dict(zip(part["metric"], part["text"], strict=True)))
    return pd.DataFrame(lines, columns=[*names, *metrics], dtype=str).fillna("")


def effects_notes(table: pd.DataFrame) -> list[str]:
    """What a reader has to know of the effects of a table, in sentences."""
    if table.empty:
        return []
    notes = [
        "In points, over all eight subsets. L: with scale attention minus without it, the mean over the four settings "
        "of S and C; S and C alike. L×S: how much more L brings where S is on than where it is off. L×S×C: how much "
        "that changes when C is switched on."
    ]
    if not set(NAMES[6:]).isdisjoint(table["metric"]):
        notes.append(
            "cls, loc, both, dup, bkg, miss: AP50 that mending this type of error alone would give back (TIDE, Bolya "
            "et al., ECCV 2020); a negative effect is an improvement."
        )
    if (table["depth"] == ALL).any():
        notes.append("depth all: the mean over the depths of this table.")
    compared = int(table["p"].notna().sum())
    covers = sorted(set(table["covers"]) - {"", "training and images"})
    if compared:
        notes.append(
            f"± half of the 95 % interval, as for delta_AP; *: not zero at 5 %, by Holm's correction over all "
            f"{compared} numbers of this table."
        )
    if covers:
        notes.append(f"{' and '.join(covers)}: what the intervals cover where there is no more to go by.")
    if (table["covers"] == "").all():
        notes.append("One seed and no replicates: how much of this is chance cannot be told.")
    return notes


def _cubes(statistics: Statistics) -> dict[Line, list[Cube]]:
    """For each line of the table the cells behind it: depth by depth, over depths, over detectors."""
    # Without S there are no offsets, so a cell without S serves every treatment of them.
    known = {
        each if "S" in each.attentions else each._replace(coarse_offsets=None): each for each in statistics.results
    }
    single: dict[tuple[str, str, int], Cube] = {}
    for full in known:
        if full.attentions != "LSC" or full.depth is None:
            continue
        wanted = {
            subset: full._replace(attentions=subset, coarse_offsets=full.coarse_offsets if "S" in subset else None)
            for subset in SUBSETS
        }
        if all(experiment in known for experiment in wanted.values()):
            name = formulation_name(full.formulation, full.coarse_offsets, full.placement)
            single[full.detector, name, full.depth] = {subset: known[each] for subset, each in wanted.items()}
    lines: dict[Line, list[Cube]] = {}
    by_detector: defaultdict[tuple[str, str], list[Cube]] = defaultdict(list)
    for (detector, name, depth), cube in sorted(single.items()):
        lines[detector, str(depth), name] = [cube]
        by_detector[detector, name].append(cube)
    for (detector, name), cubes in by_detector.items():
        if len(cubes) > 1:
            lines[detector, ALL, name] = cubes
    for name in sorted({name for _, name in by_detector}):
        sharing = [cubes for (_, formulation), cubes in by_detector.items() if formulation == name]
        if len(sharing) > 1:
            lines[ALL, ALL, name] = [cube for cubes in sharing for cube in cubes]
    # Stable: within a detector and formulation the depths stay in order, with their mean behind them.
    return dict(sorted(lines.items(), key=lambda item: (item[0][0] == ALL, item[0][0], item[0][2])))
