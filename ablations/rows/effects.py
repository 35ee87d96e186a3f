"""Main effects and interactions of the three attentions, from the eight subsets of one detector and depth.

A 2 × 2 × 2 design: each effect is a mean over all combinations of the other letters, so it uses all eight cells.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ablations.rows.frame import SUBSETS, formulation_name
from ablations.rows.row import Row, good, metrics_of

EFFECTS = ("L", "S", "C", "L×S", "L×C", "S×C", "L×S×C")


# Detector, depth, formulation, placement: what the eight subsets of one line have in common.
Group = tuple[str, int | None, str | None, str | None]


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
    total = 0.0
    for on in itertools.product((False, True), repeat=3):
        subset = "".join(letter for letter, there in zip("LSC", on, strict=True) if there)
        sign = math.prod(1 if letter in subset else -1 for letter in letters)
        total += sign * ap[subset or "none"]
    # The other letters have 2^(3 - len) settings to average over.
    return total / 2 ** (3 - len(letters))


def effects_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Effects in points of AP, one line a detector, depth and formulation that has all eight subsets; perhaps empty.

    Columns `detector, depth, formulation, seeds` and `EFFECTS`, and `<effect>_std` where all eight have the same seeds
    and there are several: the sample standard deviation of the effect over the seeds.
    """
    groups: defaultdict[Group, defaultdict[tuple[str, str | None], dict[int, float]]]
    groups = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cell = row["cell"]
        ap = metrics_of(row)["AP"] if good(row) else None
        if ap is None or cell["attentions"] not in SUBSETS:
            continue
        group = (cell["detector"], cell["depth"], cell.get("formulation"), cell.get("placement"))
        # Without S there are no offsets, so a cell without S serves every treatment of them.
        offsets = cell.get("coarse_offsets") if "S" in cell["attentions"] else None
        groups[group][cell["attentions"], offsets][cell["seed"]] = ap
    lines = []
    for (detector, depth, formulation, placement), known in sorted(groups.items(), key=str):
        for offsets in sorted({offsets for subset, offsets in known if "S" in subset}, key=str):
            seeds = {subset: known.get((subset, offsets if "S" in subset else None), {}) for subset in SUBSETS}
            if all(seeds.values()):
                name = formulation_name(formulation, offsets, placement)
                lines.append({"detector": detector, "depth": depth, "formulation": name, **_effects(seeds)})
    return pd.DataFrame(lines)


def _effects(seeds: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """One line's numbers, from the AP of each subset by seed."""
    if len({frozenset(values) for values in seeds.values()}) > 1:
        means = {subset: sum(values.values()) / len(values) for subset, values in seeds.items()}
        effects = {name: effect(means, name.replace("×", "")) for name in EFFECTS}
        return {"seeds": min(map(len, seeds.values())), **effects}
    numbers = sorted(seeds["none"])
    line: dict[str, Any] = {"seeds": len(numbers)}
    for name in EFFECTS:
        by_seed = [{subset: seeds[subset][number] for subset in SUBSETS} for number in numbers]
        each = pd.Series([effect(ap, name.replace("×", "")) for ap in by_seed])
        line[name] = each.mean()
        if len(numbers) > 1:
            line[f"{name}_std"] = each.std()
    return line
