"""What may share a table, and what has to be said under it.

A *section* is rows of one device and one data set, and, for each detector, of one schedule, image size, backbone,
precision and so on. CPU rows and GPU rows therefore never stand in one table.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from ablations.rows.effects import effects_table
from ablations.rows.frame import make_frame
from ablations.rows.machine import machine_line
from ablations.rows.printed import SOURCE
from ablations.rows.row import Row, good, machine_of, training_of
from ablations.rows.statistics import VARIED, Replicates, Statistics, make_statistics, no_replicates


@dataclass(frozen=True)
class Section:
    """The rows of one table.

    Attributes:
        rows: As they were stored, in the order in which they were started.
        machine: The machine line.
        title: Data and device in a few words.
        notes: Sentences that belong under the table.
        frame: The numbers, one line an experiment (`make_frame`).
        replicates: How the replicates of a row are found.
        statistics: What the differences of the table are worth.
        effects: What each attention buys (`effects_table`); perhaps empty.
    """

    rows: list[Row]
    machine: str
    title: str
    notes: list[str]
    frame: pd.DataFrame
    replicates: Replicates
    statistics: Statistics
    effects: pd.DataFrame


def make_sections(rows: Iterable[Row], replicates: Replicates = no_replicates) -> list[Section]:
    """Split rows into tables, in the order in which the tables were started.

    Args:
        rows: In any order.
        replicates: How the replicates of a row are found (`ablations.rows.statistics.stored_replicates`); without, no
            interval covers other images.
    """
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cell = row["cell"]
        name = machine_of(row).get("device")
        groups[_canonical([cell.get("device_kind"), name, cell.get("data_fingerprint")])].append(row)
    parts = [part for group in groups.values() for part in _split_by_settings(group)]
    parts.sort(key=lambda part: min(_start(row) for row in part))
    return [_make_section(part, replicates) for part in parts]


def _start(row: Row) -> tuple[str, str]:
    """The order in which cells were started; those that do not say when come last."""
    return str(row.get("started") or "~"), row["key"]


def _canonical(value: object) -> str:
    """Text that is the same for equal values, also for those that cannot be keys."""
    return json.dumps(value, sort_keys=True)


def _settings(row: Row) -> dict[str, object]:
    """The fields of a cell that the rows of one table have in common."""
    cell: Mapping[str, object] = row["cell"]
    return {name: value for name, value in cell.items() if name not in VARIED}


def _split_by_settings(rows: list[Row]) -> list[list[Row]]:
    """Split rows by the settings that take several values within one detector.

    A setting that differs only between detectors, a learning rate say, belongs to the detector: they share a table.
    Rows from before a setting existed differ in it from later ones.
    """
    settings = [{name: _canonical(value) for name, value in _settings(row).items()} for row in rows]
    values: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for name in {name for each in settings for name in each}:
        for row, each in zip(rows, settings, strict=True):
            values[row["cell"]["detector"], name].add(each.get(name, ""))
    splitting = sorted({name for (_, name), seen in values.items() if len(seen) > 1})
    parts: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row, each in zip(rows, settings, strict=True):
        parts[tuple(each.get(name, "") for name in splitting)].append(row)
    return list(parts.values())


def _make_section(rows: list[Row], replicates: Replicates) -> Section:
    rows = sorted(rows, key=_start)
    statistics = make_statistics(rows, replicates)
    frame = make_frame(rows, statistics)
    cell = rows[0]["cell"]
    device = machine_of(rows[0]).get("device") or cell.get("device_kind")
    title = f"{cell.get('data')}, {cell.get('backbone')} backbone, {device}"
    machine, notes = machine_line(map(machine_of, rows)), _notes(rows, frame, statistics)
    return Section(rows, machine, title, notes, frame, replicates, statistics, effects_table(statistics))


def _notes(rows: list[Row], frame: pd.DataFrame, statistics: Statistics) -> list[str]:
    notes = [*statistics.notes(), *_settings_notes(rows), _speed_note(rows), _dropped_note(rows), *_memory_notes(rows)]
    if (frame["seeds"] > 1).any():
        notes.append("Means over the good seeds, whose number is in `seeds`; their standard deviations: table.csv.")
    if any("S" in row["cell"]["attentions"] and row["cell"].get("formulation") == "released" for row in rows):
        notes.append("Offsets of the coarser level: crop, unless the formulation says otherwise.")
    if "segm_AP" in frame:
        notes.append("segm_AP: AP of the masks; every other AP is of the boxes.")
    if "paper_AP" in frame:
        notes.append(f"paper_AP: {SOURCE}.")
    notes += [_failure_note(row) for row in rows if not good(row)]
    return [note for note in notes if note]


def _settings_notes(rows: list[Row]) -> list[str]:
    """The settings that all rows have in common, and those that differ from detector to detector."""
    settings = [(row["cell"]["detector"], _settings(row)) for row in rows]
    common, by_detector = [], []
    for name in dict.fromkeys(name for _, each in settings for name in each):
        seen = {detector: each.get(name) for detector, each in settings}
        if len({_canonical(value) for value in seen.values()}) == 1:
            common.append(f"{name} {setting_text(next(iter(seen.values())))}")
        else:
            by_detector.append(f"{name}: " + ", ".join(f"{who} {setting_text(value)}" for who, value in seen.items()))
    notes = [f"Common to all rows: {', '.join(common)}."]
    return [*notes, f"By detector: {'; '.join(by_detector)}."] if by_detector else notes


def _name(row: Row) -> str:
    cell = row["cell"]
    depth = "" if cell["depth"] is None else f" depth {cell['depth']}"
    return f"{cell['detector']} {cell['attentions']}{depth} seed {cell['seed']}"


def _failure_note(row: Row) -> str:
    reason = " ".join(str(row.get("reason") or "no reason given").split())
    return f"{row['status']}: {_name(row)}: {reason}"


def _memory_notes(rows: list[Row]) -> Iterator[str]:
    """The cells whose images a step were trained on in more parts than their settings say."""
    for row in rows:
        if halved := training_of(row).get("halved"):
            parts = row["cell"].get("accumulate", 1) * 2 ** len(halved)
            steps = f"Memory was short behind step {' and '.join(map(str, halved))}"
            yield f"{steps}: from there {_name(row)} was trained on in {parts} parts a step."


def _speed_note(rows: list[Row]) -> str:
    def each(values: Iterable[int | None]) -> str:
        return " and ".join(map(str, sorted({value for value in values if value is not None})))

    size = each(row.get("batch_size_measured") for row in rows)
    threads = each(row.get("threads") for row in rows)
    if not size:
        return ""
    note = f"images_per_s at batch size {size}, latency at batch size 1, from image tensor to boxes after NMS"
    note += f", on {threads} CPU thread{'s' if threads != '1' else ''}." if threads else "."
    if "and" in size or "and" in threads:
        note += " Rows measured differently: their speeds cannot be compared."
    return note


def _dropped_note(rows: list[Row]) -> str:
    """How many annotations of each split were left out, and why; rows of one table read the same data."""
    dropped = next((counts for row in rows if (counts := row.get("dropped"))), {})
    splits = [
        f"{sum(counts.values())} of {split} ({', '.join(f'{reason}: {count}' for reason, count in counts.items())})"
        for split, counts in dropped.items()
    ]
    return f"Annotations left out by --bad-annotations drop: {'; '.join(splits)}." if splits else ""


def setting_text(value: object) -> str:
    """The value of a setting as notes say it."""
    if isinstance(value, list | tuple):
        return "/".join(map(str, value))
    return "none" if value is None else str(value)
