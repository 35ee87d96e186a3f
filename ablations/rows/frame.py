"""Rows to numbers: one line an experiment, seeds averaged, in the order of the paper."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pandas as pd

from ablations.rows.printed import paper_ap
from ablations.rows.row import MEASURES, STATUSES, Row, good, metrics_of
from ablations.rows.statistics import Difference, Experiment, Statistics, experiment_of, make_statistics
from ablations.statistics.intervals import CONFIDENCE
from heads.dyhead.dyhead import FORMULATIONS
from heads.two_stage.faster_rcnn import PLACEMENTS
from kernels.block.parameters import COARSE_OFFSETS

AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# paper_AP, and segm_AP of detectors with masks, stand behind what belongs to delta_AP in tables that have one.
WORTH = ("delta_AP_half_width", "delta_AP_p", "delta_AP_covers")
COLUMNS = (
    *("detector", "attentions", "depth", "formulation", "seeds", *AP_COLUMNS),
    *("delta_AP", *WORTH, *MEASURES, "status"),
)
# Of frames and of what is shown of effects.
TEXTS = ("detector", "attentions", "formulation", "effect", "delta_AP_covers", "status")
INTEGERS = ("depth", "seeds")
# What `attentions` of a row can be beside `baseline`, in the order of the tables.
SUBSETS = ("none", "L", "S", "C", "LS", "LC", "SC", "LSC")


def make_frame(rows: Iterable[Row], statistics: Statistics | None = None) -> pd.DataFrame:
    """The table of one section: one line an experiment, seeds averaged, in the order of the paper.

    Columns are `COLUMNS`, with `paper_AP` behind those of delta_AP where the paper has a figure for one of the lines,
    then `segm_AP` where one has masks, and, where a line has several good seeds, `<column>_std` (sample standard
    deviation) behind `status`. `seeds` counts the good rows, which are the ones that are averaged. What was not
    measured, and a size class without ground truth, is NaN. `delta_AP` is AP minus that of the detector's baseline,
    over the seeds that both have; `delta_AP_half_width` is that of its 95 % interval, `delta_AP_p` is corrected for all
    lines of the table, and `delta_AP_covers` says what the interval holds for (`ablations.rows.statistics`).

    Args:
        rows: Of one section.
        statistics: Theirs; without, they are made from the rows alone, so no interval covers other images.
    """
    rows = list(rows)
    statistics = statistics or make_statistics(rows)
    experiments: defaultdict[Experiment, list[Row]] = defaultdict(list)
    for row in rows:
        experiments[experiment_of(row["cell"])].append(row)
    lines = [
        _line(experiments[experiment], statistics.differences.get(experiment))
        for experiment in sorted(experiments, key=_rank)
    ]
    frame = pd.DataFrame(lines)
    columns = list(COLUMNS)
    for name in ("segm_AP", "paper_AP"):
        if name in frame and frame[name].notna().any():
            columns.insert(columns.index(WORTH[-1]) + 1, name)
    columns += [f"{name}_std" for name in columns if f"{name}_std" in frame]
    frame = frame.reindex(columns=columns)
    types = {name: "Int64" if name in INTEGERS else "float64" for name in columns if name not in TEXTS}
    return frame.astype(types)


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame as it is read: percent with one decimal, four digits elsewhere, empty for nothing.

    The one ± of a table is that of `delta_AP`, the half-width of its interval; `*` marks p below 0.05.
    """
    shown = [name for name in map(str, frame) if not name.endswith("_std") and name not in WORTH]
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


def _line(rows: list[Row], difference: Difference | None) -> dict[str, Any]:
    """The columns of one experiment, and the deviation of each where there are several good seeds."""
    cell = rows[0]["cell"]
    done = [row for row in rows if good(row)]
    line: dict[str, Any] = {
        "detector": cell["detector"],
        "attentions": cell["attentions"],
        "depth": cell["depth"],
        "formulation": formulation_name(cell.get("formulation"), cell.get("coarse_offsets"), cell.get("placement")),
        "seeds": len(done),
        "delta_AP_covers": "",
        "paper_AP": paper_ap(cell),
        "status": _status(rows),
    }
    for name in AP_COLUMNS:
        _average(line, name, [metrics_of(row).get(name) for row in done])
    for measure in MEASURES:
        _average(line, measure, [row.get(measure) for row in done])
    _average(line, "segm_AP", [masks["AP"] for row in done if (masks := row.get("segm_metrics"))])
    if cell["attentions"] == "baseline" and "AP" in line:
        line["delta_AP"] = 0.0
    if difference:
        _average(line, "delta_AP", list(difference.by_seed))
        line["delta_AP_p"] = difference.p
        if difference.interval:
            line["delta_AP_half_width"] = difference.interval.half_width
            line["delta_AP_covers"] = difference.interval.covers
    return line


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
    if name == "delta_AP" and line["attentions"] != "baseline":
        return delta_text(line)
    if name in AP_COLUMNS or name in ("delta_AP", "paper_AP", "segm_AP"):
        decimals = 1
    else:
        decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{decimals}f}"


def delta_text(line: pd.Series) -> str:
    """`delta_AP` of a line of a frame as it is read, with what it is worth."""
    if pd.isna(line["delta_AP"]):
        return ""
    text = difference_text(*(line[name] for name in ("delta_AP", "delta_AP_half_width", "delta_AP_p")))
    only = line["delta_AP_covers"] in ("images only", "training only")
    return f"{text} ({line['delta_AP_covers']})" if only else text


def difference_text(value: float, half_width: float, p: float) -> str:
    """A difference in points with one decimal, half of its interval, and `*` where the corrected p is below 0.05.

    Example:
        >>> import math
        >>> from ablations.rows.frame import difference_text
        >>> difference_text(2.14, 1.3, 0.001), difference_text(-0.2, 1.3, 0.7), difference_text(1.0, math.nan, math.nan)
        ('+2.1 ± 1.3*', '-0.2 ± 1.3', '+1.0')
    """
    text = f"{value:+.1f}"
    if not pd.isna(half_width):
        text += f" ± {half_width:.1f}"
    return f"{text}*" if not pd.isna(p) and p < 1 - CONFIDENCE else text
