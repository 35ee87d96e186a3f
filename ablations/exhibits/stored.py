"""Which cell of a table is exhibited, and where its exhibit is kept: `exhibits/<key>.json` beside `cells`.

Published rows have neither weights nor data, so an exhibit is computed once, where both are, and travels with the rows.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ablations.rows.row import Row, good
from ablations.rows.sections import Section
from heads.dyhead.dyhead import FORMULATIONS

FOLDER = "exhibits"
Exhibit = dict[str, Any]


class Subject(NamedTuple):
    """The cell that a table's exhibit is about, and what it is compared with: the baseline of the same seed, if any."""

    row: Row
    baseline: Row | None


def subject_of(section: Section) -> Subject | None:
    """The deepest good LSC cell of the table's first detector that has one, of its lowest seed; None without any."""

    def rank(row: Row) -> tuple[Any, ...]:
        cell = row["cell"]
        formulation = cell.get("formulation")
        known = FORMULATIONS.index(formulation) if formulation in FORMULATIONS else len(FORMULATIONS)
        return detectors.index(cell["detector"]), -(cell["depth"] or 0), known, cell["seed"], row["key"]

    detectors = list(dict.fromkeys(section.frame["detector"]))
    rows = [row for row in section.rows if good(row)]
    row = min((row for row in rows if row["cell"]["attentions"] == "LSC"), key=rank, default=None)
    if row is None:
        return None
    same = [
        other
        for other in rows
        if other["cell"]["attentions"] == "baseline"
        and (other["cell"]["detector"], other["cell"]["seed"]) == (row["cell"]["detector"], row["cell"]["seed"])
    ]
    return Subject(row, min(same, key=lambda other: other["key"], default=None))


def name_of(row: Row) -> str:
    """A cell in words, `atss LSC, depth 2, seed 0`."""
    cell = row["cell"]
    depth = "" if cell["depth"] is None else f", depth {cell['depth']}"
    return f"{cell['detector']} {cell['attentions']}{depth}, seed {cell['seed']}"


def exhibit_path(directory: Path, key: str) -> Path:
    """Where the exhibit of a cell is kept."""
    return directory / FOLDER / f"{key}.json"


def read_exhibit(directory: Path, key: str) -> Exhibit | None:
    """The exhibit of a cell, or None where there is none that can be read."""
    try:
        exhibit = json.loads(exhibit_path(directory, key).read_text())
    except (OSError, ValueError):
        return None
    return exhibit if isinstance(exhibit, dict) else None
