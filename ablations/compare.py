"""`python -m ablations.compare A B`: what B has more than A, and what that difference is worth.

A and B are two cells or two directories of results. A cell is named by a key or the beginning of one: as DIR/KEY, as
the file DIR/cells/KEY.json, or as KEY with --out DIR; all seeds of its settings in that directory take part. Cells of
two directories are paired by equal settings. Pairs are compared seed by seed on the same images.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ablations.data.coco import read_dataset
from ablations.data.split import Dataset
from ablations.evaluation.detections import FILE, by_image, read_detections
from ablations.evaluation.matches import match
from ablations.evaluation.replicates import category_names, image_weights
from ablations.evaluation.weighted import in_blocks, precisions
from ablations.rows.frame import AP_COLUMNS, difference_text, rank_of
from ablations.rows.row import Row, good
from ablations.rows.sections import setting_text
from ablations.rows.statistics import VARIED, Experiment, Replicates, experiment_of, run_of, stored_replicates
from ablations.rows.store import how_to_mend, read_rows
from ablations.statistics.intervals import Interval, Run, contrast, holm
from ablations.statistics.training import Array, Training, pool

OK, USAGE = 0, 2
# Which data a cell was evaluated on is said by their fingerprint; the path may be another on another machine.
PATHS = ("data",)
UNKNOWN = "Without ±: one seed and no replicates, so nothing is known of what a difference is worth."


class Node(NamedTuple):
    """All seeds of one cell.

    Attributes:
        directory: Where its rows lie.
        settings: All fields of the cell but the seed, as JSON.
    """

    directory: Path
    settings: str


# Good rows by seed.
Nodes = Mapping[Node, Mapping[int, Row]]


@dataclass(frozen=True)
class Pair:
    """Two cells and the runs that say how training scatters.

    Attributes:
        a, b: The cells.
        nodes: Those that share a table with one of them, themselves among them.
    """

    a: Node
    b: Node
    nodes: Nodes

    def compare(
        self, runs: Mapping[Node, Mapping[int, Run]], images: int | None
    ) -> tuple[float, Interval | None] | None:
        """B minus A in one number; None where they share no seed that has it."""
        if not runs.keys() >= {self.a, self.b}:
            return None
        training = self.training(runs)
        return contrast({self.b: 1.0, self.a: -1.0}, runs, dict.fromkeys(runs, training), images)

    def training(self, runs: Mapping[Node, Mapping[int, Run]]) -> Training[Node]:
        """How the runs scatter in one number."""
        return pool({node: {seed: run.value for seed, run in by_seed.items()} for node, by_seed in runs.items()})

    def seeds(self) -> list[int]:
        """Those that both have."""
        return sorted(self.nodes[self.a].keys() & self.nodes[self.b].keys())

    def images(self) -> int | None:
        """How many were evaluated; None where the rows do not say."""
        return next((n for row in self.nodes[self.a].values() if (n := row.get("images"))), None)


def compare_cells(pair: Pair, data: Dataset | None) -> str:
    """What two cells differ by: every AP, then AP by category; intervals of the latter need the data."""
    stored = {directory: stored_replicates(directory) for directory in {node.directory for node in pair.nodes}}
    lines = []
    for name in AP_COLUMNS:
        lines.append(_line(name, pair, _runs(pair.nodes, name, stored)))
    parts = [_heading(pair), _markdown(lines), _basis(pair, _runs(pair.nodes, "AP", stored))]
    classes = _class_runs(pair, data)
    if classes:
        lines = [_line(name, pair, runs) for name, runs in classes.items()]
        parts += ["AP by category", _markdown(lines)]
        if data is None:
            parts.append("Without --data DIR no interval of a category's AP covers other images.")
    else:
        parts.append("The rows hold no AP by category.")
    return "\n\n".join(parts)


def compare_folders(a: Path, b: Path) -> str:
    """What the cells of two directories differ by in AP.

    Raises:
        ValueError: They are one, share no cell, or were evaluated on different data.
    """
    if a.resolve() == b.resolve():
        raise ValueError(f"{a} and {b} are one directory")
    sides = {directory: _nodes(directory) for directory in (a, b)}
    pairs = _pairs(sides[a], sides[b])
    if not pairs:
        raise ValueError(f"{a} and {b} share no cell with a good row: neither settings nor detector, subset and depth")
    stored = {directory: stored_replicates(directory) for directory in sides}
    everything = {node: rows for nodes in sides.values() for node, rows in nodes.items()}
    found = []
    for one, other in pairs:
        detector = _cell(one)["detector"]
        pair = Pair(
            one, other, {node: rows for node, rows in everything.items() if _cell(node)["detector"] == detector}
        )
        _check_images(pair)
        found.append((pair, _runs(pair.nodes, "AP", stored)))
    compared = [pair.compare(runs, pair.images()) for pair, runs in found]
    corrected = holm([each[1].p if each and each[1] else None for each in compared])
    lines = []
    for (pair, runs), p in zip(found, corrected, strict=True):
        line = _line(str(_experiment(pair.a)), pair, runs, p)
        changed = _changed(pair)
        lines.append(line | {"seeds": " ".join(map(str, pair.seeds())), "settings that differ": changed})
    number = sum(p is not None for p in corrected)
    parts = [f"A: {a}\nB: {b}\nB minus A in AP, each cell paired by seed and by image", _markdown(lines)]
    if number:
        parts.append(f"* and p: after Holm's correction over {number} comparisons.")
    if any(each and each[1] is None for each in compared):
        parts.append(UNKNOWN)
    paired = {node for pair in pairs for node in pair}
    alone = sorted((_experiment(node) for node in everything if node not in paired), key=rank_of)
    if alone:
        parts.append(f"In one of the two alone: {', '.join(map(str, alone))}.")
    return "\n\n".join(parts)


def find_cell(text: str, out: Path | None) -> tuple[Node, Nodes]:
    """The cell that an argument names, and all cells that share a table with it.

    Raises:
        ValueError: There is none, there are several, or none of its rows is good.
    """
    path = Path(text)
    directory = path.parent.parent if path.parent.name == "cells" else path.parent
    if path.name == text:
        if out is None:
            raise ValueError(f"{text} is no directory of results; a cell is named DIR/KEY, or KEY with --out DIR")
        directory = out
    if not (directory / "cells").is_dir():
        raise ValueError(f"{directory} is no directory of results: it has no cells/")
    prefix = path.name.removesuffix(".json")
    rows = [row for row in read_rows(directory) if row["key"].startswith(prefix)]
    if len(rows) != 1:
        shown = ", ".join(row["key"] for row in rows[:5]) + (" ..." if len(rows) > 5 else "")
        raise ValueError(f"{directory} has {len(rows)} cells whose key begins with {prefix!r}{shown and ': '}{shown}")
    nodes = _nodes(directory)
    node = _node(directory, rows[0])
    if node not in nodes:
        raise ValueError(f"{directory} has no good row of {_name(node)}: {rows[0].get('reason') or rows[0]['status']}")
    common = _table(node)
    return node, {each: rows for each, rows in nodes.items() if _table(each) == common}


def _node(directory: Path, row: Row) -> Node:
    return Node(
        directory, json.dumps({k: v for k, v in row["cell"].items() if k not in ("seed", *PATHS)}, sort_keys=True)
    )


def _nodes(directory: Path) -> dict[Node, dict[int, Row]]:
    nodes: defaultdict[Node, dict[int, Row]] = defaultdict(dict)
    for row in read_rows(directory):
        if good(row):
            nodes[_node(directory, row)][row["cell"]["seed"]] = row
    return dict(nodes)


def _cell(node: Node) -> dict[str, object]:
    cell: dict[str, object] = json.loads(node.settings)
    return cell


def _experiment(node: Node) -> Experiment:
    return experiment_of(json.loads(node.settings))


def _name(node: Node) -> str:
    return f"{_experiment(node)} in {node.directory}"


def _table(node: Node) -> tuple[Path, str]:
    """What the cells of one detector in one table have in common."""
    cell = _cell(node)
    return node.directory, json.dumps({k: v for k, v in cell.items() if k == "detector" or k not in VARIED})


def _pairs(a: Nodes, b: Nodes) -> list[tuple[Node, Node]]:
    """Cells of equal settings; of the rest those that are the one of their detector, subset and depth on both sides."""
    equal = {node.settings: node for node in b}
    pairs = [(node, equal[node.settings]) for node in a if node.settings in equal]
    done = {node for pair in pairs for node in pair}
    rest: tuple[defaultdict[Experiment, list[Node]], ...] = (defaultdict(list), defaultdict(list))
    for side, nodes in zip(rest, (a, b), strict=True):
        for node in nodes:
            if node not in done:
                side[_experiment(node)].append(node)
    for name, ones in rest[0].items():
        others = rest[1].get(name, [])
        if len(ones) == len(others) == 1:
            pairs.append((ones[0], others[0]))
    return sorted(pairs, key=lambda pair: rank_of(_experiment(pair[0])))


def _check_images(pair: Pair) -> None:
    """Raise where two cells were evaluated on different images, so that nothing can be paired."""
    a, b = (_cell(node).get("data_fingerprint") for node in (pair.a, pair.b))
    if a != b:
        raise ValueError(f"{_name(pair.a)} and {_name(pair.b)} were evaluated on different data ({a} and {b})")


def _changed(pair: Pair) -> str:
    a, b = _cell(pair.a), _cell(pair.b)
    names = [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]
    return ", ".join(f"{name} {setting_text(a.get(name))} → {setting_text(b.get(name))}" for name in names)


def _runs(nodes: Nodes, name: str, stored: Mapping[Path, Replicates]) -> dict[Node, dict[int, Run]]:
    """One AP of each cell that has it."""
    runs: dict[Node, dict[int, Run]] = {}
    for node, by_seed in nodes.items():
        for seed, row in by_seed.items():
            if run := run_of(row, name, stored[node.directory](row)):
                runs.setdefault(node, {})[seed] = run
    return runs


def _class_runs(pair: Pair, data: Dataset | None) -> dict[str, dict[Node, dict[int, Run]]]:
    """AP of each category by cell and seed, with replicates of the compared ones where the data are there."""
    classes: dict[str, dict[Node, dict[int, Run]]] = {}
    for node, by_seed in pair.nodes.items():
        for seed, row in by_seed.items():
            drawn = class_replicates(node.directory, row, data) if data and node in (pair.a, pair.b) else {}
            for name, ap in (row.get("class_AP") or {}).items():
                if ap is not None:
                    classes.setdefault(name, {}).setdefault(node, {})[seed] = Run(ap, drawn.get(name))
    return {name: runs for name, runs in classes.items() if runs.keys() & {pair.a, pair.b}}


def class_replicates(directory: Path, row: Row, data: Dataset) -> dict[str, Array]:
    """AP in percent of each category by name, (B,) under the draws of images that all cells share.

    Empty where the row's detections are not kept.

    Raises:
        ValueError: The data are not those that the row was evaluated on, or the detections are damaged.
    """
    path = directory / "cells" / row["key"] / FILE
    if not path.is_file():
        return {}
    if row["cell"].get("data_fingerprint") != data.fingerprint:
        raise ValueError(f"{data.root} holds other data than {row['key']} was evaluated on")
    truth, categories = data.val.ground_truth, data.val.category_ids
    try:
        entries = read_detections(path)
    except ValueError as problem:
        raise ValueError(f"{problem}; {how_to_mend(directory, row)}") from problem
    stored = by_image(entries, [record.image_id for record in data.val.images], categories)
    matches = match(truth, stored, categories)
    draws = in_blocks(matches, image_weights(matches.images, data.fingerprint), np.float64)
    names = category_names(truth)
    precision = 100 * precisions(matches, draws)[0].mean(axis=0)
    return {names[category]: ap for category, ap in zip(categories, precision, strict=True)}


def _line(name: str, pair: Pair, runs: Mapping[Node, Mapping[int, Run]], p: float | None = None) -> dict[str, str]:
    """A line of a table; without a corrected p the interval's own is shown, and nothing is marked."""
    line = {"": name}
    found = pair.compare(runs, pair.images())
    seeds = pair.seeds() if found else []
    for side, node in (("A", pair.a), ("B", pair.b)):
        values = [run.value for seed, run in runs.get(node, {}).items() if not seeds or seed in seeds]
        line[side] = f"{np.mean(values):.1f}" if values else ""
    if found is None:
        return line | {"B − A": "", "p": ""}
    value, interval = found
    text = difference_text(value, interval.half_width if interval else np.nan, np.nan if p is None else p)
    if interval and interval.covers != "training and images":
        text += f" ({interval.covers})"
    shown = p if p is not None else interval.p if interval else None
    return line | {"B − A": text, "p": "" if shown is None else f"{shown:.2g}"}


def _heading(pair: Pair) -> str:
    changed = _changed(pair)
    differ = f"They differ in: {changed}.\n" if changed else ""
    return f"A: {_name(pair.a)}\nB: {_name(pair.b)}\n{differ}B minus A, paired by seed and by image"


def _basis(pair: Pair, runs: Mapping[Node, Mapping[int, Run]]) -> str:
    """What the intervals of AP were made from."""
    found = pair.compare(runs, pair.images())
    if found is None:
        return "No difference: the two share no seed."
    if found[1] is None:
        return UNKNOWN
    seeds, images, training = pair.seeds(), pair.images(), pair.training(runs)
    words = [f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'} ({', '.join(map(str, seeds))})"]
    words = [f"{images} images", *words] if images else words
    if training.pooled:
        words.append(
            f"variance of training pooled over {training.cells} cells ({training.pooled.freedom:g} degrees of freedom)"
        )
    own = [_name(node) for node in (pair.a, pair.b) if node in training.own]
    words += [f"out of line, with a variance of its own: {' and '.join(own)}"] if own else []
    return (
        f"± half of the 95 % interval, from {'; '.join(words)}. p is that of a line chosen beforehand: it is not "
        "corrected for the number of lines."
    )


def _markdown(lines: Iterable[Mapping[str, str]]) -> str:
    table = pd.DataFrame(list(lines), dtype=str).fillna("")
    align = ["left" if name in ("", "settings that differ") else "right" for name in table]
    return table.to_markdown(index=False, disable_numparse=True, colalign=align)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where A and B cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m ablations.compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="a cell (DIR/KEY or KEY) or a directory of results")
    parser.add_argument("b", metavar="B", help="the same, for what is compared with A")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where cells that are named by a key alone lie")
    data = "the data of the cells: with it, AP by category has intervals that cover other images"
    parser.add_argument("--data", type=Path, metavar="DIR", help=data)
    options = parser.parse_args(arguments)
    try:
        folders = [Path(text) for text in (options.a, options.b) if (Path(text) / "cells").is_dir()]
        if len(folders) == 2:
            print(compare_folders(*folders))
            return OK
        if folders:
            raise ValueError(f"{folders[0]} is a directory of results and the other is a cell; name two of a kind")
        (a, near_a), (b, near_b) = find_cell(options.a, options.out), find_cell(options.b, options.out)
        pair = Pair(a, b, {**near_a, **near_b})
        if a == b:
            raise ValueError(f"both are seeds of one cell, {_name(a)}: seeds are repetitions, and nothing to compare")
        _check_images(pair)
        print(compare_cells(pair, read_dataset(options.data) if options.data else None))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    return OK


if __name__ == "__main__":
    sys.exit(main())
