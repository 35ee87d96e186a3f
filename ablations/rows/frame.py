"""Rows to numbers: one line an experiment, seeds averaged, in the order of the paper."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import pandas as pd

from ablations.rows.printed import paper_ap
from ablations.rows.row import MEASURES, STATUSES, Row, Settings, good, metrics_of
from heads.dyhead.dyhead import FORMULATIONS
from heads.two_stage.faster_rcnn import PLACEMENTS
from kernels.block.parameters import COARSE_OFFSETS

AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# paper_AP, and segm_AP of detectors with masks, stand behind delta_AP in tables that have one.
COLUMNS = ("detector", "attentions", "depth", "formulation", "seeds", *AP_COLUMNS, "delta_AP", *MEASURES, "status")
TEXTS = ("detector", "attentions", "formulation", "status")
INTEGERS = ("depth", "seeds")
# What `attentions` of a row can be beside `baseline`, in the order of the tables.
SUBSETS = ("none", "L", "S", "C", "LS", "LC", "SC", "LSC")


class Experiment(NamedTuple):
    """What tells the lines of one table apart. Rows of one experiment differ in their seeds."""

    detector: str
    attentions: str
    depth: int | None
    formulation: str | None
    coarse_offsets: str | None
    placement: str | None


# All other fields of a cell are the settings that the rows of one table have in common.
VARIED = (*Experiment._fields, "seed")


def make_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The table of one section: one line an experiment, seeds averaged, in the order of the paper.

    Columns are `COLUMNS`, with `paper_AP` behind `delta_AP` where the paper has a figure for one of the lines, then
    `segm_AP` where one has masks, and, where a line has several good seeds, `<column>_std` (sample standard deviation)
    behind `status`. `seeds` counts the good rows, which are the ones that are averaged. What was not measured, and a
    size class without ground truth, is NaN. `delta_AP` is AP minus that of the detector's baseline; its deviation is
    that of the differences seed by seed, where both have the same seeds.
    """
    experiments: defaultdict[Experiment, list[Row]] = defaultdict(list)
    for row in rows:
        experiments[_experiment(row["cell"])].append(row)
    baselines = {
        experiment.detector: by_seed
        for experiment, members in experiments.items()
        if experiment.attentions == "baseline" and (by_seed := _ap_by_seed(members))
    }
    lines = [
        _line(experiments[experiment], baselines.get(experiment.detector))
        for experiment in sorted(experiments, key=_rank)
    ]
    frame = pd.DataFrame(lines)
    columns = list(COLUMNS)
    for name in ("segm_AP", "paper_AP"):
        if name in frame and frame[name].notna().any():
            columns.insert(columns.index("delta_AP") + 1, name)
    columns += [f"{name}_std" for name in columns if f"{name}_std" in frame]
    frame = frame.reindex(columns=columns)
    types = {name: "Int64" if name in INTEGERS else "float64" for name in columns if name not in TEXTS}
    return frame.astype(types)


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame as it is read: percent with one decimal, four digits elsewhere, `mean ± deviation`, empty for nothing."""
    shown = [name for name in map(str, frame) if not name.endswith("_std")]
    return pd.DataFrame({name: [_show(line, name) for _, line in frame.iterrows()] for name in shown}, dtype=str)


def formulation_name(formulation: str | None, coarse_offsets: str | None, placement: str | None) -> str:
    """The `formulation` column: the formulation, and what of coarse offsets and placement is not the default.

    Example:
        >>> from ablations.rows.frame import formulation_name
        >>> formulation_name("released", "crop", "trunk"), formulation_name("released", "prefix", "trunk")
        ('released', 'released, prefix')
    """
    parts = [formulation]
    parts += [coarse_offsets] if coarse_offsets != COARSE_OFFSETS[0] else []
    parts += [placement] if placement != PLACEMENTS[0] else []
    return ", ".join(part for part in parts if part)


def _experiment(cell: Settings) -> Experiment:
    return Experiment(
        cell["detector"],
        cell["attentions"],
        cell["depth"],
        cell.get("formulation"),
        cell.get("coarse_offsets"),
        cell.get("placement"),
    )


def _rank(experiment: Experiment) -> tuple[Any, ...]:
    """The order of lines: detector, baseline first, subsets by size, depth, formulation."""

    def position(value: str | None, known: tuple[str, ...]) -> tuple[int, str]:
        return (known.index(value), "") if value in known else (len(known), str(value or ""))

    return (
        experiment.detector,
        position(experiment.attentions, ("baseline", *SUBSETS)),
        -1 if experiment.depth is None else experiment.depth,
        position(experiment.formulation, FORMULATIONS),
        position(experiment.coarse_offsets, COARSE_OFFSETS),
        position(experiment.placement, PLACEMENTS),
    )


def _ap_by_seed(rows: list[Row]) -> dict[int, float | None]:
    return {row["cell"]["seed"]: metrics_of(row)["AP"] for row in rows if good(row)}


def _line(rows: list[Row], baseline: dict[int, float | None] | None) -> dict[str, Any]:
    """The columns of one experiment, and the deviation of each where there are several good seeds."""
    cell = rows[0]["cell"]
    done = [row for row in rows if good(row)]
    line: dict[str, Any] = {
        "detector": cell["detector"],
        "attentions": cell["attentions"],
        "depth": cell["depth"],
        "formulation": formulation_name(cell.get("formulation"), cell.get("coarse_offsets"), cell.get("placement")),
        "seeds": len(done),
        "paper_AP": paper_ap(cell),
        "status": _status(rows),
    }
    for name in AP_COLUMNS:
        _average(line, name, [metrics_of(row).get(name) for row in done])
    for measure in MEASURES:
        _average(line, measure, [row.get(measure) for row in done])
    _average(line, "segm_AP", [masks["AP"] for row in done if (masks := row.get("segm_metrics"))])
    _compare(line, _known(_ap_by_seed(rows)), None if baseline is None else _known(baseline))
    return line


def _known(by_seed: dict[int, float | None]) -> dict[int, float]:
    """AP by seed; nothing at all where one of them is missing, because a mean of the others would mislead."""
    known = {seed: ap for seed, ap in by_seed.items() if ap is not None}
    return known if len(known) == len(by_seed) else {}


def _compare(line: dict[str, Any], aps: dict[int, float], baseline: dict[int, float] | None) -> None:
    """Add `delta_AP` to a line that has a baseline to be compared with."""
    if not baseline or not aps:
        return
    if line["attentions"] == "baseline":
        line["delta_AP"] = 0.0
    elif aps.keys() == baseline.keys():
        _average(line, "delta_AP", [aps[seed] - baseline[seed] for seed in sorted(aps)])
    else:
        line["delta_AP"] = line["AP"] - sum(baseline.values()) / len(baseline)


def _average(line: dict[str, Any], name: str, seeds: list[float | None]) -> None:
    values = [value for value in seeds if value is not None]
    if not values:
        return
    mean = sum(values) / len(values)
    line[name] = mean
    if len(values) > 1 and name not in ("params_M", "GMACs"):
        line[f"{name}_std"] = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _status(rows: list[Row]) -> str:
    """`ok` where every seed is; else each status, with its number where there are several rows."""
    counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
    present = {status: count for status, count in counts.items() if count}
    if len(present) == 1:
        return next(iter(present))
    return ", ".join(f"{count} {status}" for status, count in present.items())


def _show(line: pd.Series, name: str) -> str:
    value = line[name]
    if pd.isna(value):
        return ""
    if name in TEXTS or name in INTEGERS:
        return str(value)
    if name in AP_COLUMNS or name in ("delta_AP", "paper_AP", "segm_AP"):
        decimals = 1
    else:
        decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    baseline = line["attentions"] == "baseline"
    text = f"{value:{'+' if name == 'delta_AP' and not baseline else ''}.{decimals}f}"
    deviation = line.get(f"{name}_std")
    return text if pd.isna(deviation) else f"{text} ± {deviation:.{decimals}f}"
