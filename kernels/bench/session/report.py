"""The rows of a session as tables: `kernels.md`, in the form of the other results, and `session.csv`."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from kernels.bench.goals import Name
from kernels.bench.session.probes import ASSUMED, COPY, DENSE, MATMUL
from kernels.bench.session.stages import REHEARSAL, ROWS, TUNED_ROWS, Stage
from kernels.bench.session.store import Row, Store
from kernels.bench.table import Measurement, read, to_markdown

PREDICTIONS = f"""\
What was predicted stands beside what was measured. Of an operator it is the least time, of bytes at {COPY / 1e12} TB/s
and of operations at {MATMUL / 1e12:.0f} TFLOP/s, a dense convolution's at {DENSE / 1e12:.0f}; of rows in 16 bits alone.
"""


def write(store: Store, stages: Iterable[Stage], command: str) -> None:
    """Write both files into the session's directory; `stages` are all that it should run."""
    before, tuned = (_read(store.directory / name) for name in (ROWS, TUNED_ROWS))
    found = before or tuned
    if before and tuned:
        found = replace(before, rows=before.rows | tuned.rows, missing=before.missing | tuned.missing)
    rows = store.rows() + [row for part in (before, tuned) if part for row in _operators(part, part is tuned)]
    _write_csv(store, rows)
    # A line above all others, so that nobody takes a copy of the file for something else.
    parts = [f"**A rehearsal: {REHEARSAL}.**\n"] if store.rehearsed else []
    if found:
        parts.append(to_markdown(replace(found, commands=[command])))
    else:
        parts.append(f"{store.machine}\n\n    {command}\n")
    parts.append(f"## Stages\n\n{_stages(store, stages)}\n")
    parts.append(f"## Predictions\n\n{PREDICTIONS}\n{_predictions(rows, store.rehearsed)}\n")
    if before and tuned:
        parts.append(f"## Tuned tiles\n\n{_tuned(before, tuned)}\n")
    (store.directory / "kernels.md").write_text("\n".join(parts))


def _read(path: Path) -> Measurement | None:
    return read(path) if path.exists() else None


def _operators(found: Measurement, tuned: bool) -> list[Row]:
    """The benchmarks' rows, with the least time that the assumed roofs allow."""
    stage = "benchmarks, tuned tiles" if tuned else "benchmarks"
    rows = []
    for name, row in found.rows.items():
        predicted = _least(name, row)
        what = f"{name.op} {name.shape} {name.precision} {name.mode} {name.provider}"
        basis = f"least time, roofs {ASSUMED}" if predicted else ""
        rows.append(Row(stage, what, row["ms_p50"], "ms", predicted, basis))
    return rows


def _least(name: Name, row: dict[str, Any]) -> str:
    if (
        name.device != "cuda"
        or name.precision not in ("fp16", "bf16")
        or name.provider not in ("ours", "graph", "dense")
    ):
        return ""
    milliseconds = row["ms_p50"]
    # TFLOP/s are 10^9 operations in a millisecond, GB/s are 10^6 bytes.
    operations, moved = 1e9 * row["TFLOP/s"] * milliseconds, 1e6 * row["GB/s"] * milliseconds
    return f"{1e3 * max(operations / (DENSE if name.provider == 'dense' else MATMUL), moved / COPY):.4f}"


def _write_csv(store: Store, rows: list[Row]) -> None:
    names = [*(field.name for field in fields(Row)), "rehearsed", "machine"]
    with (store.directory / "session.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(asdict(row) | {"rehearsed": store.rehearsed, "machine": store.machine} for row in rows)


def _stages(store: Store, stages: Iterable[Stage]) -> str:
    outcomes = store.outcomes()
    lines = []
    for stage in stages:
        ended = outcomes.get(stage.name)
        spent = f"{ended.seconds:.0f}" if ended else ""
        lines.append([stage.name, ended.outcome.replace("|", "/") if ended else "not run", spent, stage.seconds])
    return tabulate(lines, headers=["stage", "outcome", "s", "s expected"], tablefmt="github", disable_numparse=True)


def _predictions(rows: list[Row], rehearsed: bool) -> str:
    lines = [
        [
            row.stage,
            row.what,
            "" if row.value is None else f"{row.value:.4g}",
            row.unit,
            row.predicted,
            row.basis,
            row.note,
        ]
        for row in rows
        if row.predicted or not row.stage.startswith("benchmarks")
    ]
    headers = ["stage", "what", "rehearsed" if rehearsed else "measured", "unit", "predicted", "basis", "note"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _tuned(before: Measurement, tuned: Measurement) -> str:
    lines = [
        [name.op, name.shape, name.precision, name.mode, name.provider, f"{old['ms_p50']:.4g}", f"{new['ms_p50']:.4g}"]
        for name, new in tuned.rows.items()
        if (old := before.rows.get(name))
    ]
    headers = ["operator", "shape", "precision", "mode", "provider", "ms before", "ms"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
