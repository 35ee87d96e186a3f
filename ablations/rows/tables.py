"""Rows to tables: pandas frames in the order of the paper, written as CSV, Markdown and LaTeX.

A *section* is what may share a table: rows of one device and one data set, and, for each detector, of one schedule,
image size, backbone, precision and so on. CPU rows and GPU rows therefore never stand in one table. `table.md` and
`table.tex` hold all sections, each behind its machine line; a CSV file holds one: `table.csv` the section that was
started first, `table-2.csv`, `table-3.csv`, ... the others in the order in which they were started.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ablations.experiment.measure import MEASURES
from ablations.files import atomic_write_text
from ablations.rows.gains import GAINS_NOTE, GAINS_TITLE, gains_table
from ablations.rows.machine import machine_line
from ablations.rows.printed import SOURCE, paper_ap
from ablations.rows.store import STATUSES
from heads.dyhead.attention import COARSE_OFFSETS
from heads.dyhead.dyhead import FORMULATIONS
from heads.two_stage.faster_rcnn import PLACEMENTS

AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# paper_AP, and segm_AP of detectors with masks, stand behind delta_AP in tables that have one.
COLUMNS = ("detector", "attentions", "depth", "formulation", "seeds", *AP_COLUMNS, "delta_AP", *MEASURES, "status")
TEXTS = ("detector", "attentions", "formulation", "status")
INTEGERS = ("depth", "seeds")
ATTENTIONS = ("baseline", "none", "L", "S", "C", "LS", "LC", "SC", "LSC")

# What tells the rows of one table apart. All other fields of a cell are the settings they have in common.
VARIED = ("detector", "attentions", "depth", "formulation", "coarse_offsets", "placement", "seed")


@dataclass(frozen=True)
class Section:
    """The rows of one table.

    `rows`: as they were stored. `machine`: the machine line. `title`: data and device in a few words. `notes`:
    sentences that belong under the table. `frame`: the numbers, one line an experiment (`make_frame`).
    """

    rows: list[dict]
    machine: str
    title: str
    notes: list[str]
    frame: pd.DataFrame


def make_sections(rows: Iterable[dict]) -> list[Section]:
    """Split rows into tables, in the order in which the tables were started."""
    groups = defaultdict(list)
    for row in rows:
        cell, machine = row["cell"], row.get("machine") or {}
        groups[_text([cell.get("device_kind"), machine.get("device"), cell.get("data_fingerprint")])].append(row)
    parts = [part for group in groups.values() for part in _split_by_settings(group)]
    parts.sort(key=lambda part: min((str(row.get("started") or "~"), row["key"]) for row in part))
    return [_make_section(part) for part in parts]


def make_frame(rows: Iterable[dict]) -> pd.DataFrame:
    """The table of one section: one line an experiment, seeds averaged, in the order of the paper.

    Columns are `COLUMNS`, with `paper_AP` behind `delta_AP` where the paper has a figure for one of the lines, then
    `segm_AP` where one has masks, and, where a line has several good seeds, `<column>_std` (sample standard deviation)
    behind `status`. `seeds` counts the good rows, which are the ones that are averaged. What was not measured, and a
    size class without ground truth, is NaN. `delta_AP` is AP minus that of the detector's baseline; its deviation is
    that of the differences seed by seed, where both have the same seeds.
    """
    experiments = defaultdict(list)
    for row in rows:
        experiments[_experiment(row["cell"])].append(row)
    baselines = {
        experiment[0]: _good(members)
        for experiment, members in experiments.items()
        if experiment[1] == "baseline" and _good(members)
    }
    lines = [
        _line(experiments[experiment], baselines.get(experiment[0])) for experiment in sorted(experiments, key=_rank)
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
    shown = [name for name in frame if not name.endswith("_std")]
    return pd.DataFrame({name: [_show(line, name) for _, line in frame.iterrows()] for name in shown}, dtype=str)


def write_tables(rows: Iterable[dict], directory: str | Path) -> list[Path]:
    """Write `table.csv` (and `table-2.csv`, ...), `table.md` and `table.tex` into `directory`.

    Args:
        rows: What the tables are made of (`read_rows`).
        directory: Where they go. Tables of an earlier time that these rows do not make are removed.

    Returns:
        The files.

    Raises:
        ValueError: There are no rows.
        OSError: A file cannot be written.
    """
    directory = Path(directory)
    sections = make_sections(rows)
    if not sections:
        raise ValueError(f"{directory} holds no rows to make a table of")
    texts = {f"table{f'-{n}' if n > 1 else ''}.csv": to_csv(section) for n, section in enumerate(sections, 1)}
    for path in directory.glob("table-*.csv"):
        if path.name not in texts:
            path.unlink(missing_ok=True)
    texts["table.md"] = "\n".join(map(to_markdown, sections))
    texts["table.tex"] = "\n".join(to_latex(section, number) for number, section in enumerate(sections, 1))
    for name, text in texts.items():
        atomic_write_text(directory / name, text)
    return [directory / name for name in texts]


def to_csv(section: Section) -> str:
    """The machine line as a comment, then the numbers: `pandas.read_csv(path, comment="#")` reads them back."""
    return f"# {section.machine}\n" + section.frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def to_markdown(section: Section) -> str:
    """The machine line, the title, the table and its notes; then the gains, where there are several detectors."""
    notes = "".join(f"- {note}\n" for note in section.notes)
    text = f"{section.machine}\n\n**{section.title}**\n\n{_markdown(as_text(section.frame))}\n\n{notes}"
    gains = gains_table(section.frame)
    return text if gains.empty else f"{text}\n**{GAINS_TITLE}**\n\n{_markdown(gains)}\n\n- {GAINS_NOTE}\n"


def _markdown(text: pd.DataFrame) -> str:
    text = text.map(lambda cell: cell.replace("|", "\\|"))
    align = ["left" if name in TEXTS else "right" for name in text]
    return text.to_markdown(index=False, colalign=align, disable_numparse=True)


HEADINGS = {
    "AP50": "AP$_{50}$",
    "AP75": "AP$_{75}$",
    "APs": "AP$_S$",
    "APm": "AP$_M$",
    "APl": "AP$_L$",
    "delta_AP": r"$\Delta$AP",
    "paper_AP": "AP (paper)",
    "segm_AP": "AP$^{mask}$",
    "params_M": "params (M)",
    "images_per_s": "images/s",
    "latency_ms_p50": "ms (p50)",
    "latency_ms_p90": "ms (p90)",
    "peak_memory_MB": "MB",
}


def to_latex(section: Section, number: int = 1) -> str:
    """A `table*` for two-column papers, and one of the gains where there are several detectors; needs booktabs.

    Columns without any value are left out.
    """
    notes = "".join(f"% {' '.join(note.split())}\n" for note in section.notes)
    table = _latex(as_text(section.frame), section.title, f"tab:dyhead-ablation-{number}")
    text = f"% {section.machine}\n{notes}{table}"
    gains = gains_table(section.frame)
    return text if gains.empty else f"{text}% {GAINS_NOTE}\n{_latex(gains, GAINS_TITLE, f'tab:dyhead-gains-{number}')}"


def _latex(text: pd.DataFrame, caption: str, label: str) -> str:
    text = text[[name for name in text if (text[name] != "").any()]].map(_escape_latex)
    align = "".join("l" if name in TEXTS else "r" for name in text)
    text.columns = [HEADINGS.get(name, _escape_latex(name)) for name in text]
    tabular = text.to_latex(index=False, escape=False, column_format=align)
    return (
        "\\begin{table*}[t]\n\\centering\n\\scriptsize\n\\setlength{\\tabcolsep}{3pt}\n"
        f"\\caption{{{_escape_latex(caption)}}}\n\\label{{{label}}}\n"
        f"{tabular}\\end{{table*}}\n"
    )


def formulation_name(cell: Mapping) -> str:
    """The `formulation` column: the formulation, and what of coarse offsets and placement is not the default."""
    parts = [cell.get("formulation")]
    parts += [value for value in (cell.get("coarse_offsets"),) if value != COARSE_OFFSETS[0]]
    parts += [value for value in (cell.get("placement"),) if value != PLACEMENTS[0]]
    return ", ".join(part for part in parts if part)


def _experiment(cell: Mapping) -> tuple:
    return tuple(cell.get(name) for name in VARIED[:-1])


def _rank(experiment: tuple) -> tuple:
    """The order of lines: detector, baseline first, subsets by size, depth, formulation."""
    detector, attentions, depth, formulation, coarse_offsets, placement = experiment

    def position(value, known: tuple) -> tuple:
        return (known.index(value), "") if value in known else (len(known), str(value or ""))

    return (
        detector,
        position(attentions, ATTENTIONS),
        -1 if depth is None else depth,
        position(formulation, FORMULATIONS),
        position(coarse_offsets, COARSE_OFFSETS),
        position(placement, PLACEMENTS),
    )


def _good(rows: list[dict]) -> dict[int, float]:
    """AP by seed, of the rows that have one."""
    return {row["cell"]["seed"]: row["metrics"]["AP"] for row in rows if row["status"] == "ok"}


def _line(rows: list[dict], baseline: dict[int, float] | None) -> dict:
    cell = rows[0]["cell"]
    good = [row for row in rows if row["status"] == "ok"]
    line = {
        "detector": cell["detector"],
        "attentions": cell["attentions"],
        "depth": cell["depth"],
        "formulation": formulation_name(cell),
        "seeds": len(good),
        "paper_AP": paper_ap(cell),
        "status": _status(rows),
    }
    for name in (*AP_COLUMNS, *MEASURES):
        values = [row["metrics"].get(name) if name in AP_COLUMNS else row.get(name) for row in good]
        _average(line, name, [value for value in values if value is not None])
    masks = [row["segm_metrics"]["AP"] for row in good if row.get("segm_metrics")]
    _average(line, "segm_AP", [value for value in masks if value is not None])
    own = _good(rows)
    if baseline and own and None not in (*own.values(), *baseline.values()):
        if cell["attentions"] == "baseline":
            line["delta_AP"] = 0.0
        elif own.keys() == baseline.keys():
            _average(line, "delta_AP", [own[seed] - baseline[seed] for seed in sorted(own)])
        else:
            line["delta_AP"] = line["AP"] - sum(baseline.values()) / len(baseline)
    return line


def _average(line: dict, name: str, values: list[float]) -> None:
    if not values:
        return
    mean = sum(values) / len(values)
    line[name] = mean
    if len(values) > 1 and name not in ("params_M", "GMACs"):
        line[f"{name}_std"] = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _status(rows: list[dict]) -> str:
    """`ok` where every seed is; else each status, with its number where there are several rows."""
    counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
    present = {status: count for status, count in counts.items() if count}
    if len(present) == 1:
        return next(iter(present))
    return ", ".join(f"{count} {status}" for status, count in present.items())


def _text(value) -> str:
    return json.dumps(value, sort_keys=True)


def _settings(row: dict) -> dict[str, str]:
    return {name: _text(value) for name, value in row["cell"].items() if name not in VARIED}


def _split_by_settings(rows: list[dict]) -> list[list[dict]]:
    """Split rows by the settings that take several values within one detector.

    A setting that differs only between detectors, a learning rate say, belongs to the detector: they share a table.
    Rows from before a setting existed differ in it from later ones.
    """
    names = {name for row in rows for name in _settings(row)}
    values = defaultdict(set)
    for row in rows:
        settings = _settings(row)
        for name in names:
            values[row["cell"]["detector"], name].add(settings.get(name, ""))
    splitting = sorted({name for (_, name), seen in values.items() if len(seen) > 1})
    parts = defaultdict(list)
    for row in rows:
        settings = _settings(row)
        parts[tuple(settings.get(name, "") for name in splitting)].append(row)
    return list(parts.values())


def _make_section(rows: list[dict]) -> Section:
    rows = sorted(rows, key=lambda row: (str(row.get("started") or "~"), row["key"]))
    frame = make_frame(rows)
    cell, machine = rows[0]["cell"], rows[0].get("machine") or {}
    title = f"{cell.get('data')}, {cell.get('backbone')} backbone, {machine.get('device') or cell.get('device_kind')}"
    line = machine_line(row.get("machine") or {} for row in rows)
    return Section(rows, line, title, _notes(rows, frame), frame)


def _notes(rows: list[dict], frame: pd.DataFrame) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row["cell"] if name not in VARIED)
    common, by_detector = [], []
    for name in names:
        seen = {row["cell"]["detector"]: row["cell"].get(name) for row in rows}
        if len({_text(value) for value in seen.values()}) == 1:
            common.append(f"{name} {_plain(next(iter(seen.values())))}")
        else:
            by_detector.append(f"{name}: " + ", ".join(f"{who} {_plain(value)}" for who, value in seen.items()))
    notes = [f"Common to all rows: {', '.join(common)}."]
    if by_detector:
        notes.append(f"By detector: {'; '.join(by_detector)}.")
    notes.append(_speed_note(rows))
    notes.append(_dropped_note(rows))
    if (frame["seeds"] > 1).any():
        notes.append("mean ± sample standard deviation over the good seeds, whose number is in `seeds`.")
    if any("S" in row["cell"]["attentions"] and row["cell"].get("formulation") == "released" for row in rows):
        notes.append("Offsets of the coarser level: crop, unless the formulation says otherwise.")
    if "segm_AP" in frame:
        notes.append("segm_AP: AP of the masks; every other AP is of the boxes.")
    if "paper_AP" in frame:
        notes.append(f"paper_AP: {SOURCE}.")
    for row in rows:
        if row["status"] != "ok":
            cell = row["cell"]
            depth = "" if cell["depth"] is None else f" depth {cell['depth']}"
            name = f"{cell['detector']} {cell['attentions']}{depth} seed {cell['seed']}"
            reason = " ".join(str(row.get("reason") or "no reason given").split())
            notes.append(f"{row['status']}: {name}: {reason}")
    return [note for note in notes if note]


def _speed_note(rows: list[dict]) -> str:
    def each(name: str) -> str:
        return " and ".join(map(str, sorted({row[name] for row in rows if row.get(name) is not None})))

    size, threads = each("batch_size_measured"), each("threads")
    if not size:
        return ""
    note = f"images_per_s at batch size {size}, latency at batch size 1, from image tensor to boxes after NMS"
    note += f", on {threads} CPU thread{'s' if threads != '1' else ''}." if threads else "."
    if "and" in size or "and" in threads:
        note += " Rows measured differently: their speeds cannot be compared."
    return note


def _dropped_note(rows: list[dict]) -> str:
    """How many annotations of each split were left out, and why; rows of one table read the same data."""
    dropped = next((row["dropped"] for row in rows if row.get("dropped")), {})
    splits = [
        f"{sum(counts.values())} of {split} ({', '.join(f'{reason}: {count}' for reason, count in counts.items())})"
        for split, counts in dropped.items()
    ]
    return f"Annotations left out by --bad-annotations drop: {'; '.join(splits)}." if splits else ""


def _plain(value) -> str:
    if isinstance(value, list | tuple):
        return "/".join(map(str, value))
    return "none" if value is None else str(value)


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
    own = line["attentions"] == "baseline"
    text = f"{value:{'+' if name == 'delta_AP' and not own else ''}.{decimals}f}"
    deviation = line.get(f"{name}_std")
    return text if pd.isna(deviation) else f"{text} ± {deviation:.{decimals}f}"


LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def _escape_latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
